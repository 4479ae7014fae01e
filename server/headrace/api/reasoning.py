"""How much a model shall think: the fields of a chat that say so, and what they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from headrace.errors import UnsupportedParameterError
from headrace.sampling_params import ThinkingBudget
from headrace.text.processor import TextProcessor
from headrace.text.reasoning import ReasoningFormat
from headrace.text.tokenizer import Tokenizer

_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that is false where a model shall not think."""


class ReasoningFields(BaseModel):
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    thinking_token_budget: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """As in vLLM. -1: no limit."""
    include_reasoning: bool | None = None


def template_kwargs(
    kwargs: Mapping[str, Any] | None, effort: str | None, text: TextProcessor
) -> dict[str, Any]:
    """`kwargs`, variables for the chat template, and those that ask for `effort`, which come after.

    Raises UnsupportedParameterError where the template has none of them.
    """
    known = text.chat_template.variables if text.chat_template else frozenset()
    asking: dict[str, Any] = {}
    if effort is not None:
        asking = {name: effort != "none" for name in _SWITCHES if name in known}
        if "reasoning_effort" in known:
            asking["reasoning_effort"] = effort
        elif effort != "none" or (not asking and text.reasoning is not None):
            only = 'It can only be "none".' if asking else "Leave it out."
            raise UnsupportedParameterError(
                f"reasoning_effort {effort!r} is not supported: this model's chat template knows "
                f"no efforts. {only}",
                param="reasoning_effort",
            )
    return {**asking, **(kwargs or {})}


def thinking_budget(
    max_tokens: int | None, form: ReasoningFormat | None, tokenizer: Tokenizer, *, begun: bool
) -> ThinkingBudget | None:
    """`form`: None where the model does not think. `begun`: the prompt has the opening marker.

    Raises UnsupportedParameterError where the engine cannot see thinking begin or end: both
    markers must be tokens, which they are in all vocabularies made for thinking.
    """
    if max_tokens is None or max_tokens == -1:
        return None
    if form is None:
        raise UnsupportedParameterError(
            "thinking_token_budget is not supported: this model is not known to think (see "
            "--reasoning-parser). Leave it out.",
            param="thinking_token_budget",
        )
    ids = [tokenizer.encode(marker, add_special_tokens=False) for marker in form.markers]
    needed = ids[1:] if begun else ids
    if any(len(spelled) != 1 for spelled in needed):
        raise UnsupportedParameterError(
            f"thinking_token_budget is not supported: {form.close} is not a token of this model. "
            "Use max_tokens.",
            param="thinking_token_budget",
        )
    return ThinkingBudget(max_tokens, None if begun else ids[0][0], ids[1][0])
