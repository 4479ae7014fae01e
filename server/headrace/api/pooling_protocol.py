"""The bodies of the endpoints that pool: embeddings, scores, rankings, moderations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

MAX_INPUTS = 2048  # OpenAI's limit on /v1/embeddings

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Input = str | list[str] | list[int] | list[list[int]]


def _check_input(value: Any) -> Any:
    """By hand: a union would answer with an error of each kind, and take seconds."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return value
        if len(value) > MAX_INPUTS:
            raise ValueError(f"must have at most {MAX_INPUTS} items")
        if all(type(item) is str for item in value):
            return value
        if all(type(item) is list and all(type(t) is int for t in item) for item in value):
            return value
    raise ValueError("must be a string, token ids, or a non-empty array of strings or of token ids")


def _check_texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(type(text) is str for text in texts):
        raise ValueError("must be a string or a non-empty array of strings")
    if len(texts) > MAX_INPUTS:
        raise ValueError(f"must have at most {MAX_INPUTS} items")
    return texts


def _check_documents(value: Any) -> Any:
    """Cohere's and Jina's documents are texts, or objects that have one."""
    if isinstance(value, list):
        value = [item.get("text") if isinstance(item, dict) else item for item in value]
        if value and all(type(text) is str for text in value):
            return _check_texts(value)
    raise ValueError("must be a non-empty array of strings, or of objects with a text")


def _check_moderated(value: Any) -> Any:
    """One text, several, or parts of type text, each of which is judged for itself."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if kinds := {str(item.get("type")) for item in value} - {"text"}:
            raise ValueError(f"holds parts of type {min(kinds)[:40]!r}; only text is judged")
        value = [item.get("text") for item in value]
    return _check_texts(value)


Texts = Annotated[list[str], BeforeValidator(_check_texts, json_schema_input_type=str | list[str])]


class PoolingBody(BaseModel):
    """What all of them share. null is the same as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Longer inputs are cut to so many tokens, special ones included; -1: to what the model takes;
    0 or left out: they are refused."""
    truncation_side: Literal["left", "right"] | None = None
    """Where tokens are cut off; right if left out."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower is served first."""
    strict_fields: bool | None = None


class EmbeddingRequest(PoolingBody):
    input: Annotated[Input, PlainValidator(_check_input, json_schema_input_type=Input)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None
    """Only the first values of each vector, made one long: of models that were trained for it."""
    normalize: bool | None = None
    """Whether vectors are made one long; left out: as the model says."""
    add_special_tokens: bool = True


class RerankRequest(PoolingBody):
    query: str
    documents: Annotated[
        list[str],
        BeforeValidator(_check_documents, json_schema_input_type=list[str | dict[str, str]]),
    ]
    top_n: Int | None = None
    """The best ones; 0 or left out: all."""
    return_documents: bool = True
    max_tokens_per_doc: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Longer documents are cut."""


class ScoreRequest(PoolingBody):
    text_1: Annotated[Texts, Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))]
    text_2: Annotated[Texts, Field(validation_alias=AliasChoices("text_2", "documents", "data_2"))]


class ModerationRequest(PoolingBody):
    input: Annotated[
        list[str],
        BeforeValidator(
            _check_moderated, json_schema_input_type=str | list[str] | list[dict[str, Any]]
        ),
    ]
