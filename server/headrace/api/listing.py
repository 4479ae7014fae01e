"""Lists of what is kept, page by page, as OpenAI's: `limit`, `after` and `order` in the query."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
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
    limit, descending, after = _asked(request, default, maximum)
    try:
        return await store.page(kind, limit=limit, after=after, newest_first=descending, tag=tag)
    except KeyError:
        raise _no_such_start(kind, after) from None


def page_of(
    request: Request, items: Sequence[dict[str, Any]], kind: str, *, default: int, maximum: int
) -> dict[str, Any]:
    """The list object with a page of `items`, which are in the order in which they came. Raises
    InvalidRequestError that names the query parameter."""
    limit, descending, after = _asked(request, default, maximum)
    ordered = list(reversed(items)) if descending else list(items)
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise _no_such_start(kind, after)
        ordered = ordered[ids.index(after) + 1 :]
    page = ordered[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": len(ordered) > limit,
    }


def _asked(request: Request, default: int, maximum: int) -> tuple[int, bool, str | None]:
    """How many, whether in descending order, and after which one."""
    query = request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order must be asc or desc, got {order[:32]!r}.", param="order")
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= maximum):
        raise InvalidRequestError(
            f"limit must be a number from 1 to {maximum}, got {text[:32]!r}.", param="limit"
        )
    return int(text), order == "desc", query.get("after")


def _no_such_start(kind: str, after: str | None) -> InvalidRequestError:
    return InvalidRequestError(
        f"after: there is no {kind} {(after or '')[:100]!r}; give the id that a list ended with.",
        param="after",
    )


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
