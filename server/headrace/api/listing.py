"""Lists of what is kept, page by page, as OpenAI's: `limit`, `after` and `order` in the query."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request

from headrace.api.store import Page, Record, Store
from headrace.errors import InvalidRequestError


async def read_page(
    request: Request,
    store: Store,
    kind: str,
    *,
    default: int,
    maximum: int,
    tag: str | None = None,
) -> Page:
    """Raises InvalidRequestError that names the query parameter."""
    query = request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order must be asc or desc, got {order[:32]!r}.", param="order")
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= maximum):
        raise InvalidRequestError(
            f"limit must be a number from 1 to {maximum}, got {text[:32]!r}.", param="limit"
        )
    after = query.get("after")
    try:
        return await store.page(
            kind, limit=int(text), after=after, newest_first=order == "desc", tag=tag
        )
    except KeyError:
        raise InvalidRequestError(
            f"after: there is no {kind} {(after or '')[:100]!r}; give the id that a list ended "
            "with.",
            param="after",
        ) from None


async def list_answer(
    page: Page, shape: Callable[[Record], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    data = [await shape(record) for record in page.records]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": page.has_more,
    }
