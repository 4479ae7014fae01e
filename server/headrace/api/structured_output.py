"""What an output must look like: response_format and its relatives, as one grammar for the engine.

OpenAI's response_format; structured_outputs and guided_* as in vLLM; json_schema, regex and ebnf as
in SGLang; grammar as in llama.cpp. Grammars are llguidance's: its docs/syntax.md.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter

from headrace.api.bounds import FIRST_ERROR
from headrace.api.one_of import without_one_of
from headrace.errors import InvalidRequestError, UnsupportedParameterError
from headrace.sampling_params import SamplingParams

MAX_CHARACTERS = 2**18
"""Of a schema, a pattern, a grammar, or all choices: a compiler's work grows with it."""
MAX_CHOICES = 4096
ANY_OBJECT = {"type": "object"}
_ANY_JSON = TypeAdapter[Any](Any)

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Choices = Annotated[list[str], FIRST_ERROR, Field(min_length=1, max_length=MAX_CHOICES)]


def _check_schema(value: Any) -> Any:
    if isinstance(value, str | bool | dict):
        return value
    raise ValueError("must be a JSON schema: an object, true or false, or the text of one")


SchemaOrText = Annotated[
    dict[str, Any] | bool | str,
    PlainValidator(_check_schema, json_schema_input_type=dict[str, Any] | bool | str),
]


class OutputGrammar(NamedTuple):
    text: str
    """As GenerateRequest.grammar."""
    param: str
    """The field that asked for it."""


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str | None = None
    schema_: Annotated[SchemaOrText | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """Of json_object, as in llama.cpp."""


class StructuredOutputs(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class StructuredFields(BaseModel):
    """The fields of a request body that ask for structured output. At most one may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    json_schema: SchemaOrText | None = None
    regex: Text | None = None
    ebnf: Text | None = None
    grammar: Text | None = None


def output_grammar(body: StructuredFields, sampling: SamplingParams) -> OutputGrammar | None:
    """The grammar that a body asks for; None: none.

    Raises InvalidRequestError for two of them, or for what cannot be one or go with one,
    UnsupportedParameterError for a kind that is not known. Whether the grammar itself is good is
    the engine's to say.
    """
    found = list(_asked_for(body))
    if not found:
        return None
    if len(found) > 1:
        raise InvalidRequestError(
            f"{found[0].param} and {found[1].param} both say what the output must look like; "
            "send one of them.",
            param=found[1].param,
        )
    check_sampling(sampling, found[0].param)
    return found[0]


async def make_output_grammar(
    body: StructuredFields, sampling: SamplingParams
) -> OutputGrammar | None:
    """As output_grammar, off the event loop: a long grammar takes up to a second."""
    if all(getattr(body, name) is None for name in StructuredFields.model_fields):
        return None
    return await asyncio.to_thread(output_grammar, body, sampling)


def check_sampling(sampling: SamplingParams, param: str) -> None:
    """Raises InvalidRequestError for what cannot go with a grammar, which `param` asked for."""
    for name, value in (
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("bad_words", sampling.bad_words),
    ):
        if value:
            raise InvalidRequestError(
                f"{name} and {param} cannot be combined: together they may leave no "
                "token. Leave one of them out.",
                param=name,
            )


def _asked_for(body: StructuredFields) -> Iterator[OutputGrammar]:
    if body.response_format is not None:
        yield from _of_response_format(body.response_format)
    if (wanted := body.structured_outputs) is not None:
        yield from _of_structured_outputs(wanted)
    for name in ("guided_json", "json_schema"):
        if (schema := getattr(body, name)) is not None:
            yield json_grammar(schema, name)
    for name in ("guided_regex", "regex"):
        if (pattern := getattr(body, name)) is not None:
            yield regex_grammar(pattern, name)
    if body.guided_choice is not None:
        yield choice_grammar(body.guided_choice, "guided_choice")
    for name in ("guided_grammar", "ebnf", "grammar"):
        if (text := getattr(body, name)) is not None:
            yield lark_grammar(text, name)


def _of_response_format(wanted: ResponseFormat) -> Iterator[OutputGrammar]:
    match wanted.type:
        case "text":
            return
        case "json_object":
            yield json_grammar(wanted.schema_ or ANY_OBJECT, "response_format")
        case "json_schema":
            form = wanted.json_schema
            if form is None or form.schema_ is None:
                raise InvalidRequestError(
                    "response_format of type json_schema needs json_schema.schema.",
                    param="response_format.json_schema",
                    code="missing_required_parameter",
                )
            yield json_grammar(form.schema_, "response_format.json_schema.schema")
        case other:
            raise UnsupportedParameterError(
                f"response_format.type {other[:64]!r} is not supported; use text, json_object "
                "or json_schema, or structured_outputs for a regex, choice or grammar.",
                param="response_format.type",
            )


def _of_structured_outputs(wanted: StructuredOutputs) -> Iterator[OutputGrammar]:
    if wanted.structural_tag is not None:
        raise UnsupportedParameterError(
            "structured_outputs.structural_tag is not supported; write it as a grammar.",
            param="structured_outputs.structural_tag",
        )
    if wanted.json_ is not None:
        yield json_grammar(wanted.json_, "structured_outputs.json")
    if wanted.json_object:
        yield json_grammar(ANY_OBJECT, "structured_outputs.json_object")
    if wanted.regex is not None:
        yield regex_grammar(wanted.regex, "structured_outputs.regex")
    if wanted.choice is not None:
        yield choice_grammar(wanted.choice, "structured_outputs.choice")
    if wanted.grammar is not None:
        yield lark_grammar(wanted.grammar, "structured_outputs.grammar")


def json_grammar(schema: dict[str, Any] | bool | str, param: str) -> OutputGrammar:
    """JSON that a schema, an object or its text, describes. Raises InvalidRequestError."""
    if isinstance(schema, str):
        try:
            schema = _ANY_JSON.validate_json(schema)  # with the limits of bodies
        except ValueError:
            raise InvalidRequestError(
                f"{param} is not the text of a JSON schema.", param=param
            ) from None
    if not isinstance(schema, dict | bool):
        raise InvalidRequestError(f"{param} must be a JSON schema: an object.", param=param)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    whole = {**without_one_of(schema), "x-guidance": ON_ONE_LINE}
    try:
        text = json.dumps(whole, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InvalidRequestError(
            f"{param} holds a number that is not finite; leave it out.", param=param
        ) from None
    return OutputGrammar(f"start: %json {_short(text, param)}", param)


ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""llguidance's options: JSON is written as json.dumps writes it. Small models that may put white
space anywhere go on with it for ever, and what may not vary need not be sampled."""


def regex_grammar(pattern: str, param: str) -> OutputGrammar:
    """Text that the whole of a regular expression (Rust's syntax) matches; \\d is ASCII's."""
    from llguidance import regex_to_lark

    return OutputGrammar(f"start: /{regex_to_lark(_short(pattern, param), use_ascii='d')}/", param)


def choice_grammar(choices: list[str], param: str) -> OutputGrammar:
    """One of these texts."""
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return OutputGrammar(f"start: {_short(texts, param)}", param)


def lark_grammar(text: str, param: str) -> OutputGrammar:
    """Of llguidance's Lark, or GBNF (EBNF with ::=, and a rule called root).

    Raises InvalidRequestError for GBNF that is none.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return OutputGrammar(any_to_lark(_short(text, param)), param)
    except (Exception, RecursionError) as error:  # it raises many kinds
        raise InvalidRequestError(
            f"{param} is no grammar in GBNF: {str(error)[:500]}", param=param
        ) from None


def _short(text: str, param: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequestError(
            f"{param} is longer than {MAX_CHARACTERS} characters; simplify it.", param=param
        )
    return text
