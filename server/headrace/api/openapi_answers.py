"""What each route answers, for /openapi.json: structs that only describe, and are never filled.

Fields that may be absent have UNSET as their default. Loaded when the document is asked for.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

# --- errors -------------------------------------------------------------------------------------


class ErrorDetail(Struct):
    message: str
    """What is wrong, and what to do about it."""
    type: str
    param: str | None
    code: str | None


class Error(Struct):
    """OpenAI's error."""

    error: ErrorDetail


class MessagesErrorDetail(Struct):
    type: str
    message: str


class MessagesError(Struct):
    """Anthropic's error."""

    type: Literal["error"]
    error: MessagesErrorDetail
    request_id: str | None


# --- text ---------------------------------------------------------------------------------------


class Ignored(Struct):
    """What this server adds to answers."""

    ignored_fields: list[str] | UnsetType = UNSET


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | UnsetType = UNSET
    completion_tokens_details: dict[str, int] | UnsetType = UNSET
    headrace: dict[str, Any] | UnsetType = UNSET
    """Milliseconds in the queue, in prefill and in decode, and preemptions."""


class CalledFunction(Struct):
    name: str
    arguments: str
    """JSON."""


class ToolCall(Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]
    token_ids: list[int] | UnsetType = UNSET


class _Completion(Struct, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    headrace: Ignored | UnsetType = UNSET


class ChatCompletion(_Completion, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | UnsetType = UNSET


class Completion(_Completion, kw_only=True):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Response(Struct, kw_only=True):
    """https://platform.openai.com/docs/api-reference/responses/object"""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: dict[str, Any] | None


class InputTokens(Struct):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Message(Struct, kw_only=True):
    """https://docs.anthropic.com/en/api/messages"""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class CountedTokens(Struct):
    input_tokens: int


# --- vectors ------------------------------------------------------------------------------------


class PoolingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class Embedding(Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of float32 in little-endian order."""


class Embeddings(Struct):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PoolingUsage


class RankedDocument(Struct):
    index: int
    relevance_score: float
    document: dict[str, str] | UnsetType = UNSET


class Ranking(Struct):
    id: str
    model: str
    results: list[RankedDocument]
    usage: PoolingUsage


class Scores(Struct):
    id: str
    object: Literal["list"]
    model: str
    data: list[dict[str, Any]]
    usage: PoolingUsage


class Moderations(Struct):
    id: str
    model: str
    results: list[dict[str, Any]]


# --- what is kept -------------------------------------------------------------------------------


class File(Struct, kw_only=True):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]


class Batch(Struct, kw_only=True):
    id: str
    object: Literal["batch"]
    endpoint: str
    status: Literal[
        "validating",
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    request_counts: dict[str, int]
    metadata: dict[str, str] | None


class _List(Struct, kw_only=True):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Files(_List, kw_only=True):
    data: list[File]


class Batches(_List, kw_only=True):
    data: list[Batch]


class InputItems(_List, kw_only=True):
    data: list[dict[str, Any]]


class Deleted(Struct):
    id: str
    object: str
    deleted: bool


# --- the server ---------------------------------------------------------------------------------


class Model(Struct, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int | None
    digest: str | None
    revision: str | None
    state: str
    engine: dict[str, Any] | None | UnsetType = UNSET


class Models(Struct):
    object: Literal["list"]
    data: list[Model]


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(Struct):
    prompt: str


class TokenizerInfo(Struct):
    bos_token: Any
    eos_token: Any
    vocab_size: int
    model_max_length: int
    chat_template: str | None


class Alive(Struct):
    status: Literal["alive", "dead"]
    engines: dict[str, Any]


class Ready(Struct):
    status: str


class Load(Struct):
    version: int
    model: str
    revision: str
    digest: str
    ready: bool
    draining: bool
    running: int
    queued: int
    queued_tokens: int
    kv_used_blocks: int
    kv_total_blocks: int
    block_size: int
    step_age_s: float
    prefill_tokens_per_s: float
    decode_step_s: float
    prefix_query_tokens: int
    prefix_hit_tokens: int
    max_num_seqs: int
    since: int | UnsetType = UNSET
    prefixes: list[str] | UnsetType = UNSET


class Version(Struct):
    version: str


class ServerInfo(Struct):
    version: str
    draining: bool
    api: dict[str, Any]
    models: list[dict[str, Any]]


class Reset(Struct):
    reset: bool


ANSWERS: dict[str, type[Struct]] = {
    "POST /v1/chat/completions": ChatCompletion,
    "POST /v1/completions": Completion,
    "POST /v1/responses": Response,
    "POST /v1/responses/input_tokens": InputTokens,
    "GET /v1/responses/{response_id}": Response,
    "DELETE /v1/responses/{response_id}": Deleted,
    "POST /v1/responses/{response_id}/cancel": Response,
    "GET /v1/responses/{response_id}/input_items": InputItems,
    "POST /v1/messages": Message,
    "POST /v1/messages/count_tokens": CountedTokens,
    "POST /v1/embeddings": Embeddings,
    "POST /v1/rerank": Ranking,
    "POST /v2/rerank": Ranking,
    "POST /rerank": Ranking,
    "POST /v1/score": Scores,
    "POST /score": Scores,
    "POST /v1/moderations": Moderations,
    "GET /v1/files": Files,
    "POST /v1/files": File,
    "GET /v1/files/{file_id}": File,
    "DELETE /v1/files/{file_id}": Deleted,
    "GET /v1/batches": Batches,
    "POST /v1/batches": Batch,
    "GET /v1/batches/{batch_id}": Batch,
    "POST /v1/batches/{batch_id}/cancel": Batch,
    "GET /v1/models": Models,
    "GET /v1/models/{model_id}": Model,
    "POST /tokenize": Tokens,
    "POST /detokenize": Prompt,
    "POST /apply-template": Prompt,
    "GET /tokenizer_info": TokenizerInfo,
    "GET /livez": Alive,
    "GET /readyz": Ready,
    "GET /health": Ready,
    "GET /load": Load,
    "GET /version": Version,
    "GET /server_info": ServerInfo,
    "POST /reset_prefix_cache": Reset,
}
OTHER_CONTENT: dict[str, str] = {
    "GET /metrics": "text/plain",
    "GET /v1/files/{file_id}/content": "application/octet-stream",
}
"""Routes whose answer is not JSON."""
STREAMS = {
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "POST /v1/messages",
}
"""May also answer with server-sent events."""


def schemas(ref_template: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The schema of each route's answer, and the definitions that they refer to."""
    kinds = [*dict.fromkeys(ANSWERS.values()), Error, MessagesError]
    shaped, definitions = msgspec.json.schema_components(kinds, ref_template=ref_template)
    by_kind = dict(zip(kinds, shaped, strict=True))
    answers = {route: by_kind[kind] for route, kind in ANSWERS.items()}
    return answers, definitions
