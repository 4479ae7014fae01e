"""`headrace bench serve`: options, one run from start to end, the verdict.

It knows a server by its URL alone and runs against any OpenAI-compatible one.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import uvloop

from headrace.bench.http_client import HttpClient
from headrace.bench.load import Call, Endpoint, Sampling, make_call, run_load, send
from headrace.bench.measure import METRICS, Trace, summarize
from headrace.bench.report import Report
from headrace.bench.server_side import (
    Counters,
    ServerFacts,
    disagreements,
    read_facts,
    settled_counters,
)
from headrace.bench.workload import Prompt, RandomWorkload, arrival_times, read_file
from headrace.errors import ConfigError

DESCRIPTION = """\
Send requests to a server at a given rate and report latencies and throughput.

The load is open-loop: a request is sent when its time has come, whether or not earlier ones were
answered, and its latency counts from that scheduled arrival, so that a server (or this client)
that falls behind cannot hide it. How late requests were sent is reported as send lag; figures
counted from the send, as other tools do, are in the JSON under "from_send". With
--max-concurrency and no --request-rate the loop is closed and an arrival is a place becoming free.

Exits 1 when a request failed, or when the client's account of requests, tokens and first-token
times contradicts the server's own (/metrics, usage); 2 when it could not run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `headrace bench serve`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument_group("server").add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="without /v1 (default: %(default)s)")
    add("--model", help="served name (default: the first of /v1/models)")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--api-key", help="sent as a bearer token")
    add("--header", action="append", default=[], metavar="KEY=VALUE", help="repeatable")

    add = parser.add_argument_group("workload").add_argument
    add("--dataset", choices=("random", "shared-prefix", "file"), default="random")
    add("--dataset-path", type=Path, help="JSONL: prompt or messages, and output_tokens")
    add("--num-prompts", type=int, default=1000, help="(default: %(default)s)")
    add("--input-len", type=int, default=1024, help="tokens (default: %(default)s)")
    add("--output-len", type=int, default=128, help="tokens (default: %(default)s)")
    add("--range-ratio", type=float, default=0.0, help="lengths vary by this share, 0 to 1")
    add("--prefix-len", type=int, help="shared tokens on top (default: 0; shared-prefix: 256)")
    add("--num-prefixes", type=int, default=10, help="of shared-prefix (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--num-warmups", type=int, default=1, help="requests before the clock starts")

    add = parser.add_argument_group("load").add_argument
    add("--request-rate", type=float, default=math.inf, help="per second (default: all at once)")
    add(
        "--burstiness",
        type=float,
        default=1.0,
        help="gamma shape of the gaps: 1 is Poisson, less is burstier, inf is even",
    )
    add("--max-concurrency", type=int, help="requests under way at once")

    add = parser.add_argument_group("sampling").add_argument
    add("--ignore-eos", action="store_true", help="generate exactly --output-len tokens")
    add("--temperature", type=float, help="(default: the server's)")

    add = parser.add_argument_group("report").add_argument
    add("--percentiles", default="99", help="comma-separated (default: %(default)s)")
    add("--percentile-metrics", default="ttft,tpot,itl", help=f"shown: of {','.join(METRICS)}")
    add("--goodput", nargs="+", default=[], metavar="KEY:MS", help="ttft:200 tpot:50 e2el:5000")
    add("--save-result", type=Path, metavar="FILE.json")
    add("--save-detailed", action="store_true", help="each request into --save-result, with text")
    add("--no-server-check", action="store_true", help="/metrics may count other clients, or less")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; the exit code. Results go to standard output, the rest to standard
    error."""
    try:
        options = _check(args)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(_run(args, options))
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    print(report.table())
    if args.save_result:
        content = report.json(detailed=args.save_detailed)
        args.save_result.write_text(json.dumps(content, indent=2) + "\n")
    return _verdict(report, checked=not args.no_server_check)


def _verdict(report: Report, *, checked: bool) -> int:
    if report.summary.failed:
        first = next(trace.error for trace in report.traces if trace.error)
        print(f"error: {report.summary.failed} requests failed; {first}", file=sys.stderr)
    if report.server_ttft_ms is None:
        print("note: /metrics told nothing, so the server's side is unchecked.", file=sys.stderr)
    level = "error" if checked else "note"
    for disagreement in report.disagreements:
        print(f"{level}: client and server disagree: {disagreement}", file=sys.stderr)
    return int(bool(report.summary.failed or (checked and report.disagreements)))


class _Options:
    """The options that need more than argparse to be understood."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.headers = dict(_pair("--header", text, "=") for text in args.header)
        if args.api_key:
            self.headers["Authorization"] = f"Bearer {args.api_key}"
        self.goodput = {
            _choice("--goodput", key, ("ttft", "tpot", "e2el")): _number("--goodput", limit)
            for key, limit in (_pair("--goodput", text, ":") for text in args.goodput)
        }
        self.percentiles = tuple(_number("--percentiles", p) for p in args.percentiles.split(","))
        if any(not 0 <= p <= 100 for p in self.percentiles):
            raise ConfigError(f"--percentiles must lie in 0 to 100, got {args.percentiles}.")
        self.shown_metrics = tuple(
            _choice("--percentile-metrics", name, METRICS)
            for name in args.percentile_metrics.split(",")
        )


def _check(args: argparse.Namespace) -> _Options:
    for name, value, least in (
        ("--num-prompts", args.num_prompts, 1),
        ("--num-warmups", args.num_warmups, 0),
        ("--max-concurrency", args.max_concurrency, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")
    if (args.dataset == "file") != (args.dataset_path is not None):
        raise ConfigError("--dataset file and --dataset-path FILE.jsonl need each other.")
    if args.save_detailed and not args.save_result:
        raise ConfigError("--save-detailed needs --save-result FILE.json.")
    if args.save_result and not args.save_result.absolute().parent.is_dir():
        raise ConfigError(f"--save-result: there is no folder {args.save_result.parent}.")
    return _Options(args)


async def _run(args: argparse.Namespace, options: _Options) -> Report:
    _allow_many_connections()
    client = HttpClient(args.base_url, options.headers)
    facts = await read_facts(client, args.model)
    rng = np.random.default_rng(args.seed)
    prompts = await _suit_endpoint(client, facts, args.endpoint, _prompts(args, facts, rng))
    sampling = Sampling(args.temperature, args.ignore_eos)
    calls = [make_call(prompt, args.endpoint, facts.model, sampling) for prompt in prompts]
    warmups, calls = calls[: args.num_warmups], calls[args.num_warmups :]
    due = arrival_times(len(calls), args.request_rate, args.burstiness, rng).tolist()
    await _warm_up(client, warmups)

    before = await settled_counters(client)
    cpu_before = time.process_time()
    with _progress(len(calls)) as on_done:
        traces, duration = await run_load(
            client,
            calls,
            due,
            max_concurrency=args.max_concurrency,
            keep_text=args.save_detailed,
            on_done=on_done,
        )
    client_cpu = (time.process_time() - cpu_before) / duration
    after = await settled_counters(client)
    server = after.minus(before) if after and before else None
    return _report(args, options, facts, traces, duration, server, client_cpu)


def _report(
    args: argparse.Namespace,
    options: _Options,
    facts: ServerFacts,
    traces: list[Trace],
    duration: float,
    server: Counters | None,
    client_cpu: float,
) -> Report:
    setup: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if args.endpoint == "chat" else "openai",
        "backend": "openai-chat" if args.endpoint == "chat" else "openai",
        "label": None,
        "model_id": facts.model,
        "tokenizer_id": None,
        "num_prompts": len(traces),
        "burstiness": args.burstiness if math.isfinite(args.burstiness) else "inf",
        "seed": args.seed,
        "workload": {
            key: str(value) if isinstance(value, Path) else value
            for key in (
                *("dataset", "dataset_path", "input_len", "output_len", "range_ratio"),
                *("prefix_len", "num_prefixes", "ignore_eos", "temperature", "goodput"),
            )
            if (value := getattr(args, key)) is not None
        },
        "client_cpu_ratio": client_cpu,
    }
    return Report(
        traces=traces,
        summary=summarize(
            traces, duration, percentiles=options.percentiles, goodput=options.goodput
        ),
        percentiles=options.percentiles,
        shown_metrics=options.shown_metrics,
        request_rate=args.request_rate,
        max_concurrency=args.max_concurrency,
        server_ttft_ms=server.mean_ttft_ms if server else None,
        cached_tokens=server.cached_tokens if server else None,
        setup=setup,
        server={
            "base_url": args.base_url,
            "version": facts.version,
            "model": facts.model_card,
            "counters": vars(server) if server else None,
        },
        disagreements=disagreements(traces, server, ignore_eos=args.ignore_eos),
    )


def _prompts(
    args: argparse.Namespace, facts: ServerFacts, rng: np.random.Generator
) -> list[Prompt]:
    """The prompts of the warm-up, then those of the run."""
    if args.dataset == "file":
        count: int = args.num_prompts
        prompts = read_file(args.dataset_path, args.output_len)[:count]
        if len(prompts) < count:
            print(f"note: {args.dataset_path} holds {len(prompts)} prompts.", file=sys.stderr)
        warmups: int = args.num_warmups
        return prompts[-1:] * warmups + prompts
    shared = args.dataset == "shared-prefix"
    workload = RandomWorkload(
        input_len=args.input_len,
        output_len=args.output_len,
        range_ratio=args.range_ratio,
        prefix_len=args.prefix_len if args.prefix_len is not None else 256 * shared,
        num_prefixes=args.num_prefixes if shared else 1,
    )
    return workload.prompts(args.num_warmups + args.num_prompts, rng, facts.vocab_size)


async def _suit_endpoint(
    client: HttpClient, facts: ServerFacts, endpoint: Endpoint, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """Token ids become text for chat, messages are refused for completions."""
    if endpoint == "completions":
        if any(prompt.messages for prompt in prompts):
            raise ConfigError("The file holds messages: add --endpoint chat.")
        return list(prompts)
    suited = []
    for prompt in prompts:
        if prompt.token_ids is not None:
            text = await _detokenize(client, facts.model, prompt.token_ids)
            prompt = Prompt(prompt.output_tokens, text=text)
        suited.append(prompt)
    return suited


async def _detokenize(client: HttpClient, model: str, token_ids: list[int]) -> str:
    answer = await client.post_json("/detokenize", {"model": model, "tokens": token_ids})
    if not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
        raise ConfigError(
            "Random prompts for --endpoint chat are made by the server's /detokenize, which it "
            "does not offer: use --endpoint completions or --dataset file."
        )
    return str(answer["prompt"])


async def _warm_up(client: HttpClient, calls: Sequence[Call]) -> None:
    for call in calls:
        trace = await send(client, call, time.perf_counter(), keep_text=False)
        if not trace.ok:
            raise ConfigError(f"The warm-up request failed: {trace.error}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Trace], None]]:
    """A bar on a terminal, else one line."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        print(f"Sending {total} requests ...", file=sys.stderr, flush=True)
        yield lambda trace: None
        return
    columns = (
        *(rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn()),
        *(rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn()),
    )
    # Four repaints a second: the bar must not delay the requests it reports on.
    with rich.progress.Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda trace: bar.advance(task)


def _allow_many_connections() -> None:
    """Every request is a connection; many systems start a process with room for 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _pair(option: str, text: str, separator: str) -> tuple[str, str]:
    key, found, value = text.partition(separator)
    if not (found and key and value):
        raise ConfigError(f"{option} takes KEY{separator}VALUE, got {text!r}.")
    return key, value


def _choice(option: str, name: str, allowed: Sequence[str]) -> str:
    if name not in allowed:
        raise ConfigError(f"{option} knows {', '.join(allowed)}, got {name!r}.")
    return name


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option} takes numbers, got {text!r}.") from None
