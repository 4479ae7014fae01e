"""The tables of docs/api.md are what the code says; `make api-docs` has this file write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic.types.beta.message_create_params
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from headrace.api import messages_protocol
from headrace.api.api_config import ApiConfig
from headrace.api.app import create_app
from headrace.api.field_policy import HARMLESS, HONOURED, REFUSED, Refused
from headrace.api.model_table import ModelTable
from headrace.api.protocol import ChatCompletionRequest, CompletionRequest
from headrace.api.responses_protocol import (
    RESPONSES_HONOURED,
    ResponsesRequest,
    extensions,
    harmless,
    refused,
)
from headrace.observability.metrics import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
KINDS: tuple[Any, ...] = (ChatCompletionRequest, CompletionRequest)
OPENAI: tuple[set[str], ...] = tuple(
    set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    for params in (chat_create_params, completion_create_params)
)
RESPONSES_FIELDS = sorted(
    set(response_create_params.ResponseCreateParamsBase.__annotations__)
    | {"stream", "strict_fields"}
)


def tables() -> dict[str, str]:
    """Name of a mark in the page -> the table that belongs there."""
    theirs = set().union(*OPENAI)
    others = {*HONOURED, *HARMLESS, *REFUSED} - theirs
    return {
        "routes": table(("route", "what"), routes()),
        "openai": table(("field", "chat", "completions", "what"), fields(theirs, OPENAI)),
        "extensions": table(
            ("field", "chat", "completions", "what"), fields(others, (others, others))
        ),
        "responses": table(("field", "responses", "what"), responses_fields()),
        "responses-extensions": ", ".join(f"`{name}`" for name in sorted(extensions())) + ".",
        "messages": table(("field", "", "what"), messages_fields()),
    }


def routes() -> Iterator[tuple[str, ...]]:
    app = create_app(ModelTable(), ApiConfig(), Metrics("any"))
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), f"{path}: its function has no docstring"
            sentence = re.split(r"(?<=\.)\s", operation["description"])[0]
            yield f"`{method.upper()} {path.replace(':path', '')}`", " ".join(sentence.split())


def fields(names: set[str], of_endpoint: tuple[set[str], ...]) -> Iterator[tuple[str, ...]]:
    for name in sorted(names, key=lambda name: (name not in HONOURED, name not in HARMLESS, name)):
        marks = [
            mark(name, kind) if name in known else "-"
            for kind, known in zip(KINDS, of_endpoint, strict=True)
        ]
        yield (f"`{name}`", *marks, " ".join(notes(name, marks)))


def responses_fields() -> Iterator[tuple[str, ...]]:
    policies = refused()
    for name in RESPONSES_FIELDS:
        if name in ResponsesRequest.model_fields:
            yield f"`{name}`", "honoured", RESPONSES_HONOURED[name]
    for name in RESPONSES_FIELDS:
        if name in harmless():
            yield f"`{name}`", "accepted", harmless()[name]
    for name in RESPONSES_FIELDS:
        if name in policies:
            yield f"`{name}`", "refused", " ".join(policy_notes(policies[name]))


def messages_fields() -> Iterator[tuple[str, ...]]:
    for name, note in sorted(messages_protocol.HONOURED.items()):
        yield f"`{name}`", "honoured", note
    for name, note in sorted(messages_protocol.HARMLESS.items()):
        yield f"`{name}`", "accepted", note
    inside = {f"tools[].{n}": policy for n, policy in messages_protocol.REFUSED_IN_TOOLS.items()}
    for name, policy in sorted((messages_protocol.REFUSED | inside).items()):
        yield f"`{name}`", "refused", " ".join(policy_notes(policy))


def mark(name: str, kind: Any) -> str:
    if name in kind.model_fields:
        return "honoured"
    if name in HARMLESS:
        return "accepted"
    return "refused" if name in REFUSED else "unknown"


def notes(name: str, marks: list[str]) -> Iterator[str]:
    if "honoured" in marks:
        yield HONOURED[name]
    if "accepted" in marks:
        yield HARMLESS[name]
    if "refused" in marks:
        endpoint = "Chat: " if marks[0] == "refused" else "Completions: "
        where = endpoint if "honoured" in marks else ""
        remedy, *passing = policy_notes(REFUSED[name])
        yield where + remedy
        yield from passing


def policy_notes(policy: Refused) -> Iterator[str]:
    yield policy.remedy
    if policy.neutral:
        passing = ", ".join(f"`{json.dumps(value)}`" for value in policy.neutral)
        yield f"Passes: {passing}."


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in cells)


def written(page: str) -> str:
    """The page with its tables as they should be."""
    for name, content in tables().items():
        pattern = rf"(<!-- {name}: .*? -->\n).*?(?=<!-- end -->)"
        page, count = re.subn(
            pattern, lambda found, new=content: f"{found[1]}{new}\n", page, flags=re.DOTALL
        )
        assert count == 1, f"docs/api.md has no place for {name}"
    return page


def test_the_page_is_what_the_code_says() -> None:
    page = PAGE.read_text()
    assert page == written(page), "run `make api-docs`"


@pytest.mark.parametrize("index", [0, 1])
def test_no_field_of_openai_s_is_unknown(index: int) -> None:
    marks = {name: mark(name, KINDS[index]) for name in OPENAI[index]}
    assert "unknown" not in marks.values(), marks
    assert {"honoured", "accepted"} <= set(marks.values())


def test_every_field_of_responses_is_in_the_table() -> None:
    rows = [row[0].strip("`") for row in responses_fields()]
    assert sorted(rows) == RESPONSES_FIELDS
    assert RESPONSES_HONOURED.keys() == ResponsesRequest.model_fields.keys() <= set(rows)


@pytest.mark.parametrize(
    "params",
    [
        anthropic.types.message_create_params.MessageCreateParamsBase,
        anthropic.types.beta.message_create_params.MessageCreateParamsBase,
        anthropic.types.MessageCountTokensParams,
    ],
)
def test_no_field_of_anthropic_s_is_unknown(params: Any) -> None:
    tables = (messages_protocol.HONOURED, messages_protocol.HARMLESS, messages_protocol.REFUSED)
    known = [name for names in tables for name in names]
    assert len(known) == len(set(known))
    headers = {"betas"}
    assert set(params.__annotations__) - headers <= set(known)
    assert (
        messages_protocol.HONOURED.keys() == messages_protocol.MessagesRequest.model_fields.keys()
    )


def test_a_stale_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HARMLESS, "user", "Another reason.")
    page = PAGE.read_text()
    assert page != written(page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
