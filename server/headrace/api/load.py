"""GET /load: what this replica has to do and how fast it is, for who spreads requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from headrace.api.error_response import json_response
from headrace.api.model_table import ServedModel
from headrace.api.services import services_of
from headrace.errors import InvalidRequestError

router = APIRouter()

LOAD_VERSION = 1
"""Rises when a member changes its meaning; new members do not raise it."""


@router.get("/load")
async def load(request: Request) -> Response:
    """What the engine of `model` (default: the first one) has to do, and how fast it is.

    With `since` also the prefixes that doors sent to this process after that number.
    """
    services = services_of(request)
    model = services.models.find(request.query_params.get("model"))
    answer = load_of(model, draining=services.draining)
    if (since := request.query_params.get("since")) is not None:
        if not (since.isascii() and since.isdigit()):
            raise InvalidRequestError(
                f"since must be a number that GET /load gave, got {since[:40]!r}.", param="since"
            )
        answer["since"], answer["prefixes"] = services.prefix_news.since(int(since))
    return json_response(answer)


def load_of(model: ServedModel, *, draining: bool) -> dict[str, Any]:
    """The engine's load over all API processes: only what is known here, nothing is asked.

    `running` and `queued` together are all requests there. `queued_tokens` are the prompt tokens
    of those without a first token. The two speeds are 0.0 until they have been measured.
    """
    client = model.client
    stats, info, work = client.stats, client.info, client.workload
    return {
        "version": LOAD_VERSION,
        "model": model.name,
        "revision": model.revision,
        "digest": model.digest,
        "ready": model.ready and not draining,
        "draining": draining,
        "running": stats.running,
        # A request that has just arrived is in no step's statistics yet.
        "queued": max(stats.waiting, work.live - stats.running, 0),
        "queued_tokens": work.queued_tokens,
        "kv_used_blocks": stats.kv_blocks_used,
        "kv_total_blocks": info.num_blocks if info else 0,
        "block_size": info.block_size if info else 0,
        "step_age_s": round(client.last_seen_age, 3),
        "prefill_tokens_per_s": round(work.prefill_tokens_per_s, 1),
        "decode_step_s": round(work.decode_step_s, 6),
        "prefix_query_tokens": stats.prefix_query_tokens,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
        "max_num_seqs": info.max_num_seqs if info else 0,
    }
