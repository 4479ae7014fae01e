"""Text to token ids and back over HTTP, at the paths and in the shapes of vLLM, which load tools
and evaluation harnesses use."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from headrace.api.body import receive
from headrace.api.error_response import json_response
from headrace.api.prompts import encode_chat, encode_prompt
from headrace.api.protocol import (
    ApplyTemplateRequest,
    DetokenizeRequest,
    TokenizeRequest,
    plain_messages,
)
from headrace.api.services import services_of
from headrace.api.template_fields import text_for, with_documents
from headrace.api.tools import template_tools
from headrace.errors import InvalidRequestError

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """A prompt, or messages, as token ids."""
    body, _ = await receive(request, TokenizeRequest)
    services = services_of(request)
    text, info = services.models.find(body.model).loaded()
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Give either prompt or messages.", param="prompt")
    if body.messages is not None:
        text = await text_for(body, text, trusted=services.config.trust_request_chat_template)
        tokens = await encode_chat(
            text,
            plain_messages(body.messages),
            info,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=bool(body.add_special_tokens),
            tools=template_tools(body.tools),
            kwargs=with_documents(body, body.chat_template_kwargs),
            off_loop=body.chat_template is not None,
        )
    else:
        add_special = True if body.add_special_tokens is None else body.add_special_tokens
        [tokens] = await encode_prompt(
            text, body.prompt or "", info, add_special_tokens=add_special
        )
    strings = [text.tokenizer.token_piece(token) for token in tokens]
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": info.max_model_len,
            "tokens": tokens,
            "token_strs": strings if body.return_token_strs else None,
        }
    )


@router.post("/apply-template")
async def apply_template(request: Request) -> Response:
    """The prompt that messages become, as llama.cpp's server has it: nothing is computed."""
    body, _ = await receive(request, ApplyTemplateRequest)
    services = services_of(request)
    text, _ = services.models.find(body.model).loaded()
    text = await text_for(body, text, trusted=services.config.trust_request_chat_template)
    generates = body.add_generation_prompt
    if generates is None:
        generates = not body.continue_final_message
    prompt = await asyncio.to_thread(
        text.render_chat,
        plain_messages(body.messages),
        add_generation_prompt=generates,
        continue_final_message=body.continue_final_message,
        tools=template_tools(body.tools),
        kwargs=with_documents(body, body.chat_template_kwargs),
    )
    return json_response({"prompt": prompt})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """Token ids as text, special tokens included."""
    body, _ = await receive(request, DetokenizeRequest)
    text, info = services_of(request).models.find(body.model).loaded()
    for index, token in enumerate(body.tokens):
        if not 0 <= token < info.vocab_size:
            raise InvalidRequestError(
                f"tokens[{index}] must be in 0 to {info.vocab_size - 1}, got {token}.",
                param=f"tokens[{index}]",
            )
    prompt = text.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return json_response({"prompt": prompt})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's configuration with its special tokens and chat template."""
    text, info = services_of(request).models.find(None).loaded()
    return json_response(
        {
            "bos_token": None,
            "eos_token": None,
            **text.tokenizer.config,
            **text.tokenizer.special_tokens,
            "vocab_size": text.tokenizer.vocab_size,
            "model_max_length": info.max_model_len,
            "chat_template": text.chat_template.source if text.chat_template else None,
        }
    )
