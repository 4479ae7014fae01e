"""What happens to request fields that the protocol models do not hold: one table, as data.

A field here is harmless (its value changes no output), or refused unless its value is neutral. One
that is neither here nor in a model is unknown: named in the response, refused when strict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.errors import InvalidRequestError, UnsupportedParameterError


@dataclass(frozen=True)
class Refused:
    """`neutral`: the values that ask for nothing. `remedy`: what the user should do instead."""

    remedy: str
    neutral: tuple[Any, ...] = ()


MAX_NAMED, MAX_NAME = 32, 64

HARMLESS = frozenset(
    {
        "metadata",
        "user",
        "safety_identifier",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "session_id",
    }
)

_OMIT = "Leave it out."
_TOOLS = "Use tools and tool_choice."
_STRUCTURED = "Structured output is not supported yet; ask for the format in a message."
_TEXT_ONLY = "Only text goes in and out; leave it out."

REFUSED: dict[str, Refused] = {
    # OpenAI
    "audio": Refused(_TEXT_ONLY),
    "best_of": Refused("Ask for n choices and rank them.", (1,)),
    "function_call": Refused(_TOOLS, ("none", "auto")),
    "functions": Refused(_TOOLS, ([],)),
    "modalities": Refused(_TEXT_ONLY, (["text"],)),
    "moderation": Refused(_OMIT),
    "reasoning_effort": Refused("If the chat template knows it, set it in chat_template_kwargs."),
    "response_format": Refused(_STRUCTURED, ({"type": "text"},)),
    "service_tier": Refused('There is one tier: "auto" or "default".', ("auto", "default")),
    "store": Refused("Nothing is stored; leave it out or set it to false.", (False,)),
    "suffix": Refused("Insertion is not supported; put everything into the prompt.", ("",)),
    "verbosity": Refused("Ask for a length in a message, or set max_tokens.", ("medium",)),
    "web_search_options": Refused("There is no web search; leave it out."),
    # Extensions of other servers whose silent loss would change the output
    "allowed_token_ids": Refused("Use logit_bias."),
    "bad_words": Refused("Use logit_bias.", ([],)),
    "chat_template": Refused("Start the server with another template."),
    "documents": Refused("Put the documents into a message.", ([],)),
    "early_stopping": Refused("Beam search is not supported; leave it out.", (False,)),
    "ebnf": Refused(_STRUCTURED),
    "grammar": Refused(_STRUCTURED),
    "guided_choice": Refused(_STRUCTURED),
    "guided_grammar": Refused(_STRUCTURED),
    "guided_json": Refused(_STRUCTURED),
    "guided_regex": Refused(_STRUCTURED),
    "json_schema": Refused(_STRUCTURED),
    "kv_transfer_params": Refused(_OMIT),
    "length_penalty": Refused("Beam search is not supported; leave it out.", (1.0,)),
    "logits_processors": Refused("Use logit_bias and the penalties.", ([],)),
    "max_new_tokens": Refused("Call it max_tokens."),
    "media_io_kwargs": Refused(_TEXT_ONLY, ({},)),
    "min_new_tokens": Refused("Call it min_tokens."),
    "mm_processor_kwargs": Refused(_TEXT_ONLY, ({},)),
    "prompt_embeds": Refused("Send the prompt as text or token ids."),
    "regex": Refused(_STRUCTURED),
    "repeat_penalty": Refused("Call it repetition_penalty.", (1.0,)),
    "repetition_detection": Refused(_OMIT),
    "return_tokens_as_token_ids": Refused("Use return_token_ids.", (False,)),
    "spaces_between_special_tokens": Refused("Leave it out or set it to true.", (True,)),
    "stop_regex": Refused("Use stop."),
    "stream_interval": Refused("One event is sent per token; leave it out.", (1,)),
    "structured_outputs": Refused(_STRUCTURED),
    "thinking_token_budget": Refused("Use max_tokens."),
    "truncate_prompt_tokens": Refused("Send a prompt that fits the context.", (0,)),
    "truncation_side": Refused("Send a prompt that fits the context."),
    "typical_p": Refused("Use top_p or min_p.", (1.0,)),
    "use_beam_search": Refused("Use n with a temperature above 0.", (False,)),
}


def check_extra_fields(
    extra: Mapping[str, Any] | None, *, strict: bool, known: Iterable[str]
) -> list[str]:
    """Judge the fields that no model holds; returns the names of the unknown ones.

    At most MAX_NAMED of them, cut to MAX_NAME characters: clients see them again.
    Raises UnsupportedParameterError for a field that would have changed the output, and, when
    `strict`, InvalidRequestError for an unknown one. null asks for nothing, in any field.
    """
    unknown: list[str] = []
    for name, value in (extra or {}).items():
        if value is None or name in HARMLESS:
            continue
        policy = REFUSED.get(name)
        if policy is None:
            unknown.append(name[:MAX_NAME])
        elif not any(type(value) is type(no) and value == no for no in policy.neutral):
            raise UnsupportedParameterError(
                f"{name} is not supported with this value. {policy.remedy}", param=name
            )
    if unknown and strict:
        raise InvalidRequestError(
            f"Unknown field {unknown[0]!r}. Correct its name or leave it out; known are: "
            f"{', '.join(sorted(known))}.",
            param=unknown[0],
            code="unknown_parameter",
        )
    return unknown[:MAX_NAMED]
