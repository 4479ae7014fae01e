"""What happens to request fields: one table, as data.

A field of the protocol models is honoured. Any other one is harmless (its value changes no output),
or refused unless its value is neutral, or unknown: named in the response, refused when strict.
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

# Accepted: the value changes no output. Why it does not.
HARMLESS: dict[str, str] = {
    "metadata": "A note for stored completions; nothing is stored.",
    "user": "Who asks; the API key decides what is allowed.",
    "safety_identifier": "Who asks; nothing is reported.",
    "prediction": "A hint for speed; the output is the same without.",
    "prompt_cache_key": "A hint for routing; prefixes are cached without. cache_salt keeps apart.",
    "prompt_cache_options": "Prefixes are always cached.",
    "prompt_cache_retention": "A cached prefix stays until its memory is needed.",
    "request_id": "Name a request by the header x-request-id.",
    "session_id": "A hint for routing.",
    "spaces_between_special_tokens": "No space is ever put between special tokens.",
}

_OMIT = "Leave it out."
_TEXT_ONLY = "Only text goes in and out; leave it out."

REFUSED: dict[str, Refused] = {
    # OpenAI
    "audio": Refused(_TEXT_ONLY),
    "best_of": Refused("/v1/completions has it.", (1,)),
    "modalities": Refused(_TEXT_ONLY, (["text"],)),
    "moderation": Refused(_OMIT),
    "reasoning_effort": Refused("Put it into the prompt, which is taken as it is."),
    "service_tier": Refused('There is one tier: "auto" or "default".', ("auto", "default")),
    "store": Refused("Nothing is stored; leave it out or set it to false.", (False,)),
    "suffix": Refused("Insertion is not supported; put everything into the prompt.", ("",)),
    "verbosity": Refused("Ask for a length in a message, or set max_tokens.", ("medium",)),
    "web_search_options": Refused("There is no web search; leave it out."),
    # Extensions of other servers whose silent loss would change the output
    "chat_template": Refused("The prompt is taken as it is; leave it out."),
    "documents": Refused("Put them into the prompt.", ([],)),
    "ec_transfer_params": Refused(_OMIT),
    "headrace_resume": Refused("A door sends it, with the header headrace-journal; leave it out."),
    "kv_transfer_params": Refused(_OMIT),
    "logprob_token_ids": Refused("Use top_logprobs, or logprobs of /v1/completions.", ([],)),
    "logits_processors": Refused("Use logit_bias and the penalties.", ([],)),
    "max_new_tokens": Refused("Call it max_tokens."),
    "media_io_kwargs": Refused(_TEXT_ONLY, ({},)),
    "min_new_tokens": Refused("Call it min_tokens."),
    "mm_processor_kwargs": Refused(_TEXT_ONLY, ({},)),
    "prompt_embeds": Refused("Send the prompt as text or token ids."),
    "repeat_penalty": Refused("Call it repetition_penalty.", (1.0,)),
    "repetition_detection": Refused(_OMIT),
    "stop_regex": Refused("Use stop."),
    "stream_interval": Refused("One event is sent per token; leave it out.", (1,)),
    "thinking_token_budget": Refused("Only chat tells thinking apart; use max_tokens."),
    "typical_p": Refused("Use top_p or min_p.", (1.0,)),
    "vllm_xargs": Refused(_OMIT, ({},)),
}


# The fields of the models: what they do. For /openapi.json and docs/api.md.
HONOURED: dict[str, str] = {
    # OpenAI
    "model": "A served name or alias; left out: the default model.",
    "messages": "Text, tool calls and results; content is a string or an array of text parts.",
    "prompt": "A string, token ids, or an array of strings or of token ids.",
    "stream": "Server-sent events, one for each token.",
    "stream_options": "include_usage, and continuous_usage_stats: usage in every event.",
    "n": "1 to 128 choices; all choices of a request are at most 256.",
    "seed": "Repeats the output exactly; choice i takes seed + i. Left out: drawn, and told.",
    "max_tokens": "Chat: as many as fit if left out; completions: 16, and 0 with echo.",
    "max_completion_tokens": "As max_tokens, and before it.",
    "stop": "At most 64 strings of at most 1024 characters.",
    "temperature": "0 (greedy) to 100.",
    "top_p": "Above 0, to 1.",
    "presence_penalty": "-2 to 2; counts output tokens.",
    "frequency_penalty": "-2 to 2; counts output tokens.",
    "logit_bias": "Token id to -100..100; at most 4096.",
    "logprobs": "Chat: true or false; completions: 0 to 20. Of the model's own distribution.",
    "top_logprobs": "0 to 20; needs logprobs.",
    "echo": "The prompt comes first, with logprobs theirs, too. Chat: a last message of the "
    "assistant's comes first.",
    "best_of": "So many choices are made, and the n of highest log-probability told; no stream.",
    "tools": "Functions, at most 512. Calls of strict ones always match their parameters.",
    "tool_choice": "none, auto, required, a named function or allowed_tools; forced calls match.",
    "parallel_tool_calls": "false: one call at most.",
    "functions": "As tools, one call at most; the answer has function_call. Use tools.",
    "function_call": "none, auto or a named function, as tool_choice. Use tools.",
    "reasoning_effort": "Where the chat template knows efforts; none where it knows a switch.",
    "response_format": "text, json_object or json_schema; strict or not, the output always fits.",
    # Extensions
    "structured_outputs": "One of json, regex, choice, grammar, json_object.",
    "guided_json": "A JSON schema, as an object or as text.",
    "guided_regex": "A regular expression that the whole output matches.",
    "guided_choice": "The texts that the output may be; at most 4096.",
    "guided_grammar": "A grammar in llguidance's Lark, or in GBNF.",
    "json_schema": "As guided_json.",
    "regex": "As guided_regex.",
    "ebnf": "As guided_grammar.",
    "grammar": "As guided_grammar.",
    "top_k": "0 or -1: no limit.",
    "min_p": "0 to 1: least probability, as a part of the likeliest token's.",
    "repetition_penalty": "Above 0, to 100; counts prompt and output tokens.",
    "min_tokens": "Nothing ends the output before.",
    "ignore_eos": "The model's own end tokens do not end the output.",
    "stop_token_ids": "At most 1024.",
    "bad_words": "Strings that are not generated in their usual tokens; at most 1024.",
    "allowed_token_ids": "The only tokens that are sampled; name an end token for a regular end.",
    "include_stop_str_in_output": "The stop string or stop token stays in the text.",
    "skip_special_tokens": "false: special tokens are part of the text.",
    "prompt_logprobs": "0 to 20, for each prompt token; in a stream with a choice's first event.",
    "truncate_prompt_tokens": "Keeps so many tokens; -1: as many as fit beside the output.",
    "truncation_side": "Where tokens are cut off: left (so if left out) or right.",
    "priority": "Lower is served first.",
    "cache_salt": "Prefixes are shared only with requests of the same salt.",
    "use_beam_search": "The n best sequences of a beam search of width n; no stream.",
    "length_penalty": "Beam search: divides by length to its power; -16 to 16.",
    "early_stopping": 'Beam search: true: n sequences are enough. "never": none better can come.',
    "return_token_ids": "token_ids with each choice, and prompt_token_ids.",
    "return_tokens_as_token_ids": "Log-probabilities name tokens as token_id:N.",
    "strict_fields": "true: unknown fields are refused.",
    "add_special_tokens": "Tokenizing adds special tokens. Chat: false, the template writes them.",
    "add_generation_prompt": "The template opens the answer.",
    "continue_final_message": "The answer goes on where the last message ends.",
    "chat_template": "Instead of the model's own, with --trust-request-chat-template.",
    "documents": "For a chat template that knows them; at most 4096.",
    "chat_template_kwargs": "Further variables for the chat template, such as enable_thinking.",
    "thinking_token_budget": "Its end is forced after so many tokens of thinking; -1: no limit.",
    "include_reasoning": "false: what the model thinks is dropped.",
}


def check_extra_fields(
    extra: Mapping[str, Any] | None,
    *,
    strict: bool,
    known: Iterable[str],
    harmless: Mapping[str, str] = HARMLESS,
    refused: Mapping[str, Refused] = REFUSED,
) -> list[str]:
    """Judge the fields that no model holds; returns the names of the unknown ones.

    At most MAX_NAMED of them, cut to MAX_NAME characters: clients see them again.
    Raises UnsupportedParameterError for a field that would have changed the output, and, when
    `strict`, InvalidRequestError for an unknown one. null asks for nothing, in any field.
    """
    unknown: list[str] = []
    for name, value in (extra or {}).items():
        if value is None or name in harmless:
            continue
        policy = refused.get(name)
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
