"""Any JSON whatever is either understood or refused by a RequestError: nothing else escapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.api.body import parse_body
from headrace.api.field_policy import REFUSED
from headrace.api.protocol import ChatCompletionRequest, CompletionRequest, plain_messages
from headrace.errors import RequestError, error_body
from headrace.sampling_params import SamplingParams

SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.integers(-3, 130)
    | st.floats()
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | VALUES, "content": VALUES},
    optional={"tool_calls": VALUES, "name": VALUES},
)


def bodies(kind: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from([*kind.model_fields, *REFUSED, "unknown"])
    required = {"messages": VALUES | st.lists(MESSAGE, min_size=1, max_size=3), "prompt": VALUES}
    fixed = {name: value for name, value in required.items() if name in kind.model_fields}
    return st.builds(
        lambda given, more: {**more, **given},
        st.fixed_dictionaries(fixed),
        st.dictionaries(names, VALUES, max_size=4),
    )


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_any_body(kind: type[Any], data: st.DataObject) -> None:
    raw = json.dumps(data.draw(bodies(kind))).encode()
    try:
        body, _ = parse_body(kind, raw, strict_fields=False)
        body.check_combinations()
        if kind is ChatCompletionRequest:
            plain_messages(body.messages)
        assert isinstance(body.sampling(), SamplingParams)
    except RequestError as error:
        answer = error_body(error)["error"]
        assert answer["message"] and len(answer["message"]) < 1000
        assert answer["param"] is None or len(answer["param"]) <= 200


@given(raw=st.binary(max_size=40))
@settings(deadline=None)
def test_any_bytes(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_body(ChatCompletionRequest, raw, strict_fields=False)
