"""What the server says of itself and of the run: version, model, counters of /metrics. And whether
that agrees with what the client saw, without which neither can be believed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from headrace.bench.http_client import HttpClient
from headrace.bench.measure import Trace
from headrace.errors import ConfigError

_TTFT_TOLERANCE = 0.005
"""Seconds by which the server's mean TTFT may exceed the client's: the clocks are two, and the
server may count from a request's first byte, the client from its last."""

_FINISHED = re.compile(
    r'^(?:headrace_requests_finished|vllm:request_success)_total\{.*finished_reason="(\w+)".*\}'
)


@dataclass(frozen=True)
class ServerFacts:
    model: str
    version: Any
    """The answer of /version, or None."""
    model_card: dict[str, Any]
    """The answer of /v1/models/{id}, else the model's entry in /v1/models."""
    vocab_size: int | None


@dataclass(frozen=True)
class Counters:
    """A server's own account, from its start (or, after `minus`, of a run)."""

    finished: float
    """Requests that ended with stop or length."""
    prompt_tokens: float
    generation_tokens: float
    cached_tokens: float
    """Prompt tokens that the prefix cache already held."""
    ttft_count: float
    ttft_sum: float

    def minus(self, earlier: Counters) -> Counters:
        return Counters(
            *(a - b for a, b in zip(vars(self).values(), vars(earlier).values(), strict=True))
        )

    @property
    def mean_ttft_ms(self) -> float | None:
        return self.ttft_sum / self.ttft_count * 1000 if self.ttft_count else None


async def read_facts(client: HttpClient, model: str | None) -> ServerFacts:
    """Ask the server what it is. model None: the first that it serves.

    Raises ConfigError when it cannot be reached or serves no such model.
    """
    try:
        listing = await client.get_json("/v1/models")
    except OSError as error:
        raise ConfigError(
            f"No server answers at {client.base_url} ({error}). "
            "Start one with `headrace serve`, or name another with --base-url."
        ) from error
    if not isinstance(listing, dict) or not isinstance(listing.get("data"), list):
        raise ConfigError(
            f"{client.base_url}/v1/models does not list models: is this an OpenAI-compatible "
            "server, does --base-url end before /v1, and does it need --api-key?"
        )
    cards = {card["id"]: card for card in listing["data"]}
    if model is None and not cards:
        raise ConfigError(f"{client.base_url} serves no model yet; wait until it is ready.")
    model = model or next(iter(cards))
    if model not in cards:
        raise ConfigError(f"--model {model!r} is not served; there is {', '.join(cards)}.")
    card = await client.get_json(f"/v1/models/{quote(model)}") or cards[model]
    tokenizer = await client.get_json("/tokenizer_info") or {}
    sizes = (tokenizer.get("vocab_size"), card.get("vocab_size"))
    return ServerFacts(
        model=model,
        version=await client.get_json("/version"),
        model_card=card,
        vocab_size=next((size for size in sizes if isinstance(size, int)), None),
    )


async def read_counters(client: HttpClient) -> Counters | None:
    """The counters of now, under our names or vLLM's; None where /metrics has neither."""
    response = await client.get("/metrics")
    return (
        parse_counters(response.body.decode(errors="replace")) if response.status == 200 else None
    )


def parse_counters(exposition: str) -> Counters | None:
    """Counters from Prometheus' text format, summed over labels."""
    sums: dict[str, float] = {}
    finished = 0.0
    for line in exposition.splitlines():
        name, _, value = line.rpartition(" ")
        if not line.startswith(("headrace_", "vllm:")):
            continue
        if (match := _FINISHED.match(name)) and match[1] in ("stop", "length"):
            sums[name] = float(value)
        family = name.partition("{")[0]
        sums[family] = sums.get(family, 0.0) + float(value)
    for prefix, finished_family in (
        ("headrace_", "headrace_requests_finished_total"),
        ("vllm:", "vllm:request_success_total"),
    ):
        if finished_family not in sums:
            continue
        finished = sum(v for k, v in sums.items() if k.startswith(finished_family + "{"))
        return Counters(
            finished=finished,
            prompt_tokens=sums.get(f"{prefix}prompt_tokens_total", 0.0),
            generation_tokens=sums.get(f"{prefix}generation_tokens_total", 0.0),
            cached_tokens=sums.get(f"{prefix}prefix_cache_hits_total", 0.0),
            ttft_count=sums.get(f"{prefix}time_to_first_token_seconds_count", 0.0),
            ttft_sum=sums.get(f"{prefix}time_to_first_token_seconds_sum", 0.0),
        )
    return None


async def settled_counters(client: HttpClient) -> Counters | None:
    """The counters once they no longer move: a server may count a request just after its last
    byte."""
    counters = await read_counters(client)
    for _ in range(20):
        await asyncio.sleep(0.1)
        before, counters = counters, await read_counters(client)
        if counters == before:
            break
    return counters


def disagreements(
    traces: Sequence[Trace], server: Counters | None, *, ignore_eos: bool
) -> list[str]:
    """Every way in which the client's account contradicts the server's; empty when none does.

    server: the difference of its counters over the run; None checks the client's side only.
    """
    good = [trace for trace in traces if trace.ok]
    found = _usage_disagreements(good, ignore_eos)
    if server is None:
        return found
    expected: Mapping[str, tuple[float, float]] = {
        "finished requests": (len(good), server.finished),
        "first tokens": (sum(trace.output_len > 0 for trace in good), server.ttft_count),
        "prompt tokens": (sum(trace.input_len for trace in good), server.prompt_tokens),
        "generated tokens": (sum(trace.output_len for trace in good), server.generation_tokens),
    }
    for what, (ours, theirs) in expected.items():
        # Failed requests leave traces on the server that the client cannot know: then only a
        # server that counted less than the client saw is wrong.
        if theirs < ours or (theirs > ours and len(good) == len(traces)):
            found.append(f"{what}: the client saw {ours:.0f}, the server counted {theirs:.0f}")
    if good and server.ttft_count:
        ours = sum(trace.ttft("sent") for trace in good) / len(good)
        theirs = server.ttft_sum / server.ttft_count
        if theirs > ours + _TTFT_TOLERANCE:
            found.append(
                f"mean TTFT: {ours * 1000:.2f} ms at the client, but {theirs * 1000:.2f} ms inside "
                "the server: its first event came before its first token"
            )
    return found


def _usage_disagreements(good: Sequence[Trace], ignore_eos: bool) -> list[str]:
    counts = {
        "more events with text than completion_tokens": sum(
            t.text_chunks > t.completion_tokens for t in good if t.completion_tokens is not None
        ),
        "more tokens than max_tokens": sum(t.output_len > t.requested_tokens for t in good),
        "another prompt_tokens than were sent": sum(
            t.prompt_tokens != t.prompt_len
            for t in good
            if t.prompt_len is not None and t.prompt_tokens is not None
        ),
        "fewer tokens than asked for, in spite of ignore_eos": (
            sum(t.output_len < t.requested_tokens for t in good) if ignore_eos else 0
        ),
    }
    return [f"{what}: {count} requests" for what, count in counts.items() if count]
