"""The request bodies: fields that are honoured, their types, and what they mean for sampling.

All other fields are judged by field_policy.py. Ranges are checked by SamplingParams.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from headrace.api.beam_search import BeamFields
from headrace.api.bounds import FIRST_ERROR, MAX_TOOLS, at_most
from headrace.api.reasoning import ReasoningFields
from headrace.api.structured_output import StructuredFields
from headrace.api.template_fields import TemplateFields
from headrace.errors import InvalidRequestError, UnsupportedParameterError
from headrace.sampling_params import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens on /v1/completions
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_TOKEN_BIASES = 4096  # each is added in each step
MAX_ALLOWED_TOKEN_IDS = 2**18
MAX_MESSAGES = 2**16
MAX_BAD_WORDS = 1024
MAX_BAD_WORDS_CHARACTERS = 8192  # together: they are tokenized before anything else happens

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
AllowedTokenIds = Annotated[list[Int], FIRST_ERROR, Field(max_length=MAX_ALLOWED_TOKEN_IDS)]
Prompt = str | list[str] | list[int] | list[list[int]]


def _check_prompt(value: Any) -> Any:
    """Tells the four kinds of prompt apart by hand: a union would answer with four errors, and
    take seconds for a long array."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(type(item) is str for item in value) or all(type(item) is int for item in value):
            return value
        if all(
            type(item) is list and item and all(type(token) is int for token in item)
            for item in value
        ):
            return value
    raise ValueError("must be a string, token ids, or a non-empty array of strings or of token ids")


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings")
    if len(stops) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(
            f"must hold at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_CHARACTERS} "
            "characters"
        )
    return tuple(stops)


Stop = Annotated[
    tuple[str, ...],
    BeforeValidator(_check_stop, json_schema_input_type=str | list[str] | None),
]


def _check_bad_words(value: Any) -> Any:
    words = () if value is None else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError("must be an array of strings")
    if len(words) > MAX_BAD_WORDS or sum(map(len, words)) > MAX_BAD_WORDS_CHARACTERS:
        raise ValueError(
            f"must hold at most {MAX_BAD_WORDS} strings, of at most {MAX_BAD_WORDS_CHARACTERS} "
            "characters together"
        )
    return tuple(words)


BadWords = Annotated[
    tuple[str, ...], BeforeValidator(_check_bad_words, json_schema_input_type=list[str] | None)
]


def _check_content(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return value
    raise ValueError("must be a string or an array of objects")


Content = Annotated[str | list[dict[str, Any]] | None, BeforeValidator(_check_content)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Body):
    include_usage: bool | None = None
    """A last event with empty choices carries the usage."""
    continuous_usage_stats: bool | None = None
    """Every event carries the usage so far."""
    include_obfuscation: bool | None = None
    """Accepted; no padding is sent."""


class _GenerationBody(StructuredFields, BeamFields, _Body):
    """What both endpoints share. null is the same as leaving a field out."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int | None = None
    seed: Int | None = None
    max_tokens: Int | None = None
    stop: Stop = ()
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], at_most(MAX_TOKEN_BIASES)] | None = None
    # Extensions
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    bad_words: BadWords = ()
    allowed_token_ids: AllowedTokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    strict_fields: bool | None = None

    _passed_on: ClassVar[tuple[str, ...]] = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "n",
        "min_tokens",
        "ignore_eos",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "prompt_logprobs",
    )

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check_combinations(self) -> None:
        """Raises InvalidRequestError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed with stream: true.", param="stream_options"
            )
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise InvalidRequestError(
                "truncation_side needs truncate_prompt_tokens.", param="truncation_side"
            )

    def _sampling(self, **values: Any) -> SamplingParams:
        for name in self._passed_on:
            value = getattr(self, name)
            if value is not None:
                values.setdefault(name, value)
        allowed = self.allowed_token_ids
        return SamplingParams(
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            bad_words=self.bad_words,
            allowed_token_ids=allowed if allowed is None else tuple(dict.fromkeys(allowed)),
            logit_bias=_token_biases(self.logit_bias),
            **values,
        )


class FunctionCall(_Body):
    name: str
    arguments: str | dict[str, Any] | None = None
    """JSON text, as it was given; an object is taken, too."""


class MessageToolCall(_Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Body):
    role: Annotated[str, Field(max_length=64)]
    content: Content = None
    tool_calls: Annotated[list[MessageToolCall], FIRST_ERROR] | None = None
    tool_call_id: str | None = None


class Function(_Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of type object."""
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: Function


Messages = Annotated[list[ChatMessage], FIRST_ERROR, Field(min_length=1, max_length=MAX_MESSAGES)]


class _ChatPrompt(TemplateFields, _Body):
    """How messages become a prompt."""

    tools: Annotated[list[Tool], FIRST_ERROR, Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False


class ChatCompletionRequest(ReasoningFields, _GenerationBody, _ChatPrompt):
    messages: Messages
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    echo: bool | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], FIRST_ERROR, Field(max_length=MAX_TOOLS)] | None = None
    function_call: Any = None

    def check_combinations(self) -> None:
        super().check_combinations()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true.", param="top_logprobs")

    def sampling(self) -> SamplingParams:
        """Raises InvalidRequestError for a value out of range."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        limit = self.max_completion_tokens
        try:
            return self._sampling(
                max_tokens=self.max_tokens if limit is None else limit, logprobs=logprobs
            )
        except InvalidRequestError as error:
            if limit is not None:
                error = _renamed(error, "max_tokens", "max_completion_tokens")
            raise _renamed(error, "logprobs", "top_logprobs") from error


class CompletionRequest(_GenerationBody):
    prompt: Annotated[Prompt, PlainValidator(_check_prompt, json_schema_input_type=Prompt)]
    add_special_tokens: bool = True
    echo: bool | None = None
    logprobs: Int | None = None
    best_of: Int | None = None

    def check_combinations(self) -> None:
        super().check_combinations()
        n = self.n or 1
        if self.best_of is not None and not n <= self.best_of <= 128:
            raise InvalidRequestError("best_of must be in [n, 128].", param="best_of")
        if self.num_tried > n and (self.stream or self.use_beam_search):
            raise UnsupportedParameterError(
                "best_of above n is not supported with stream or use_beam_search: the best of all "
                "choices are known at the end only. Leave it out.",
                param="best_of",
            )

    @property
    def num_tried(self) -> int:
        """Choices that are made for each prompt, of which the best n are told."""
        asked = self.n if self.best_of is None else self.best_of
        return 1 if asked is None else asked

    @property
    def num_prompts(self) -> int:
        prompt = self.prompt
        return 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)

    @property
    def echo_only(self) -> bool:
        """max_tokens: 0 with echo asks for the prompt's own log-probabilities."""
        return self.max_tokens == 0 and bool(self.echo)

    def sampling(self) -> SamplingParams:
        """Raises InvalidRequestError for a value out of range."""
        values: dict[str, Any] = {"logprobs": self.logprobs, "n": self.num_tried}
        if self.num_tried > (self.n or 1) and self.logprobs is None:
            values["logprobs"] = 0  # to rank by
        if self.echo and self.logprobs is not None:
            values["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        if self.echo_only:
            values["max_tokens"] = 1
        else:
            limit = self.max_tokens
            values["max_tokens"] = DEFAULT_COMPLETION_TOKENS if limit is None else limit
        return self._sampling(**values)


class TokenizeRequest(_ChatPrompt):
    """vLLM's two shapes in one: `prompt`, or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # type: ignore[assignment]
    """Default: true for a prompt, false for messages (the template writes its own)."""
    return_token_strs: bool | None = None


class ApplyTemplateRequest(_ChatPrompt):
    model: str | None = None
    messages: Messages


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: Annotated[list[Int], FIRST_ERROR]


_ROLES: tuple[str, ...] = ("system", "developer", "user", "assistant", "tool")
_REFUSED_PARTS: dict[str, str] = {"audio": "only text goes in and out; leave it out"}


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates take them, content as one string; text parts are joined by
    newlines. The arguments of calls are JSON text; the result of a call has its tool's name.

    Raises UnsupportedParameterError for anything that is not text, InvalidRequestError for the
    rest.
    """
    plain: list[dict[str, Any]] = []
    called: dict[str, str] = {}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        extra = dict(message.model_extra or {})
        for name, remedy in _REFUSED_PARTS.items():
            if extra.pop(name, None):
                raise UnsupportedParameterError(
                    f"{where}.{name} is not supported: {remedy}.", param=f"{where}.{name}"
                )
        message = _without_functions(message, extra, where)
        if message.role not in _ROLES:
            raise InvalidRequestError(
                f"{where}.role must be one of {', '.join(_ROLES)}, got {message.role!r}.",
                param=f"{where}.role",
            )
        if message.role == "assistant" and (thought := extra.pop("reasoning", None)):
            extra.setdefault("reasoning_content", thought)  # the name that templates know
        if message.role == "tool":
            extra |= _result_of(message, called, where)
        if message.tool_calls:
            extra["tool_calls"] = _calls_of(message, called, where)
        plain.append({**extra, "role": message.role, "content": _content(message, where)})
    return plain


def _without_functions(message: ChatMessage, extra: dict[str, Any], where: str) -> ChatMessage:
    """A message of the time before tools, with what it had of functions as calls and results, which
    find each other by the function's name. Takes function_call out of `extra`."""
    call = extra.pop("function_call", None)
    if message.role == "function":
        if not isinstance(name := extra.get("name"), str):
            raise InvalidRequestError(
                f"{where}.name is required; name the function that this is the result of.",
                param=f"{where}.name",
                code="missing_required_parameter",
            )
        return message.model_copy(update={"role": "tool", "tool_call_id": f"call_{name}"})
    if call is None or message.tool_calls:
        return message
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise InvalidRequestError(
            f"{where}.function_call must have a name and arguments.", param=f"{where}.function_call"
        )
    arguments = call.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    function = FunctionCall(name=call["name"], arguments=text)
    made = MessageToolCall(id=f"call_{call['name']}", function=function)
    return message.model_copy(update={"tool_calls": [made]})


def _calls_of(message: ChatMessage, called: dict[str, str], where: str) -> list[dict[str, Any]]:
    if message.role != "assistant":
        raise InvalidRequestError(
            f"{where}.tool_calls is for assistant messages only, not for {message.role!r}.",
            param=f"{where}.tool_calls",
        )
    calls = []
    for call in message.tool_calls or ():
        called[call.id] = call.function.name
        arguments = call.function.arguments
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
        function = {"name": call.function.name, "arguments": text.strip() or "{}"}
        calls.append({"id": call.id, "type": "function", "function": function})
    return calls


def _result_of(message: ChatMessage, called: dict[str, str], where: str) -> dict[str, Any]:
    if not message.tool_call_id:
        raise InvalidRequestError(
            f"{where}.tool_call_id is required; give the id of the call that this is the result "
            "of.",
            param=f"{where}.tool_call_id",
            code="missing_required_parameter",
        )
    fields = {"tool_call_id": message.tool_call_id}
    if name := called.get(message.tool_call_id):
        fields["name"] = name
    return fields


def _content(message: ChatMessage, where: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return ""
        raise InvalidRequestError(
            f"{where}.content is required; give it a string.",
            param=f"{where}.content",
            code="missing_required_parameter",
        )
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise UnsupportedParameterError(
                f'{where}.content[{index}] must be {{"type": "text", "text": "..."}}: this server '
                f"takes only text, got type {str(kind)[:64]!r}.",
                param=f"{where}.content[{index}]",
            )
        if not isinstance(text := part.get(kind), str):
            path = f"{where}.content[{index}].{kind}"
            code = "missing_required_parameter" if text is None else "invalid_type"
            raise InvalidRequestError(f"{path} must be a string.", param=path, code=code)
        texts.append(text)
    return "\n".join(texts)


def _token_biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    for key in biases:
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise UnsupportedParameterError(
                f"logit_bias keys must be token ids, got {key[:32]!r}; get them from /tokenize.",
                param="logit_bias",
            )
    return {int(key): bias for key, bias in biases.items()}


def _renamed(error: InvalidRequestError, theirs: str, ours: str) -> InvalidRequestError:
    """SamplingParams has one field for two of OpenAI's; name the one that was sent."""
    if error.param != theirs:
        return error
    return InvalidRequestError(error.message.replace(theirs, ours, 1), param=ours, code=error.code)
