"""What a request gives to the chat template, or instead of it: documents, variables, a template."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, Field

from headrace.api.bounds import FIRST_ERROR
from headrace.errors import CheckpointError, InvalidRequestError, UnsupportedParameterError
from headrace.text.chat_template import ChatTemplate
from headrace.text.processor import TextProcessor

MAX_CHARACTERS = 2**17
MAX_DOCUMENTS = 2**12


class TemplateFields(BaseModel):
    documents: (
        Annotated[list[dict[str, Any]], FIRST_ERROR, Field(max_length=MAX_DOCUMENTS)] | None
    ) = None
    """What the answer is to be found in, in the shape that the template knows."""
    chat_template: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


async def text_for(body: TemplateFields, text: TextProcessor, *, trusted: bool) -> TextProcessor:
    """The model's text side, with the request's own template if it has one and is `trusted` to.

    Raises UnsupportedParameterError or InvalidRequestError for a template, or for documents, that
    cannot be used.
    """
    if body.chat_template is not None:
        if not trusted:
            raise UnsupportedParameterError(
                "chat_template is not taken here: start the server with "
                "--trust-request-chat-template, or with another template.",
                param="chat_template",
            )
        specials = tuple(sorted(text.tokenizer.special_tokens.items()))
        text = text.with_template(await asyncio.to_thread(_compiled, body.chat_template, specials))
    known = text.chat_template.variables if text.chat_template else frozenset[str]()
    if body.documents and "documents" not in known:
        raise UnsupportedParameterError(
            "documents is not supported: this model's chat template does not know them. Put them "
            "into a message.",
            param="documents",
        )
    return text


def with_documents(body: TemplateFields, kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The variables for the template."""
    documents = {"documents": body.documents} if body.documents else {}
    return {**documents, **(kwargs or {})}


@lru_cache(maxsize=32)
def _compiled(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    try:
        return ChatTemplate(source, special_tokens=dict(special_tokens))
    except CheckpointError as error:
        reason = error.message.partition(": ")[2]
    except (SyntaxError, ValueError, MemoryError) as error:  # of the Python that it becomes
        reason = str(error)
    raise InvalidRequestError(
        f"chat_template does not compile: {reason[:500]}.", param="chat_template"
    )
