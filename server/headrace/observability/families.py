"""The one table of metric names: every family the server exposes, with its type, labels, buckets
and the vLLM name that means the same. It holds data only and must not know who observes what.

Names follow the Prometheus conventions (base units in the name, counters end in `_total`);
`promtool check metrics` passes on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "headrace_"

MODEL = ("model_name",)
FINISH_REASONS = ("stop", "length", "abort", "deadline", "error", "refused")

# Upper bounds. Latencies resolve milliseconds, where a fast server lives, and reach to the hour,
# where a batch job does.
_STAGE_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
_TOKEN_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04),
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0),
)
_REQUEST_SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0),
    *(20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3840.0, 7680.0),
)
_REQUEST_TOKENS = tuple(
    float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)
)  # 1 to 500 000
_STEP_TOKENS = (1.0, *(float(2**power) for power in range(3, 15)))
_PREEMPTIONS = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True)
class Family:
    """One metric family.

    `name` lacks the prefix; a counter's ends in `_total`. `vllm` is the name under which vLLM 0.33
    exposes the same quantity, without its `vllm:` prefix, or None where no meaning is equal.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = MODEL
    buckets: tuple[float, ...] = ()
    vllm: str | None = None

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def _counter(
    name: str, text: str, labels: tuple[str, ...] = MODEL, vllm: str | None = None
) -> Family:
    return Family(name, "counter", text, labels, vllm=vllm)


def _gauge(
    name: str, text: str, labels: tuple[str, ...] = MODEL, vllm: str | None = None
) -> Family:
    return Family(name, "gauge", text, labels, vllm=vllm)


def _histogram(
    name: str,
    text: str,
    buckets: tuple[float, ...],
    labels: tuple[str, ...] = MODEL,
    vllm: str | None = None,
) -> Family:
    return Family(name, "histogram", text, labels, buckets, vllm)


_PROCESS = ("process",)
_GPU = ("gpu", "gpu_uuid")

# fmt: off
FAMILIES: tuple[Family, ...] = (
    # Requests. accepted = finished (over all reasons) + in flight, at any moment.
    _counter("requests_accepted_total", "Sequences that the engine accepted."),
    _counter("requests_finished_total", "Accepted sequences that ended, by reason.",
             (*MODEL, "finished_reason"), "request_success_total"),
    _counter("requests_rejected_total", "Requests refused before the engine, by error code.",
             (*MODEL, "reason")),
    _gauge("requests_running", "Requests in the running batch.", vllm="num_requests_running"),
    _gauge("requests_waiting", "Requests waiting to be scheduled.", vllm="num_requests_waiting"),
    _counter("preemptions_total", "Times a running request gave up its blocks.",
             vllm="num_preemptions_total"),
    _counter("oom_retries_total", "Times a step was computed in two for want of GPU memory."),
    # Tokens.
    _counter("prompt_tokens_total", "Prompt tokens of ended requests, aborted ones included.",
             vllm="prompt_tokens_total"),
    _counter("prompt_tokens_cached_total", "Prompt tokens of ended requests whose KV was cached.",
             vllm="prompt_tokens_cached_total"),
    _counter("generation_tokens_total", "Generated tokens, aborted requests included.",
             vllm="generation_tokens_total"),
    _histogram("iteration_tokens", "Tokens computed by one engine step.", _STEP_TOKENS,
               vllm="iteration_tokens_total"),
    _histogram("request_prompt_tokens", "Prompt tokens of one request.", _REQUEST_TOKENS,
               vllm="request_prompt_tokens"),
    _histogram("request_generation_tokens", "Generated tokens of one request.", _REQUEST_TOKENS,
               vllm="request_generation_tokens"),
    _histogram("request_max_tokens", "The max_tokens that a request asked for.", _REQUEST_TOKENS,
               vllm="request_params_max_tokens"),
    _histogram("request_preemptions", "Preemptions of one request.", _PREEMPTIONS,
               vllm="request_num_preemptions"),
    # KV cache.
    _gauge("kv_cache_usage_ratio", "KV blocks in use, as a share of all (0 to 1).",
           vllm="kv_cache_usage_perc"),
    _gauge("kv_cache_blocks", "KV blocks, by state.", (*MODEL, "state")),
    _gauge("kv_cache_config_info", "Always 1; the layout of the KV cache.",
           (*MODEL, "block_size", "num_gpu_blocks"), "cache_config_info"),
    _counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.",
             vllm="prefix_cache_queries_total"),
    _counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.",
             vllm="prefix_cache_hits_total"),
    # Latencies: of each stage that was reached; whole-request ones of stop and length only.
    _histogram("time_to_first_token_seconds", "Arrival to first token.", _STAGE_SECONDS,
               vllm="time_to_first_token_seconds"),
    _histogram("inter_token_latency_seconds", "Gap between tokens, one observation a token.",
               _TOKEN_SECONDS, vllm="inter_token_latency_seconds"),
    _histogram("request_time_per_output_token_seconds",
               "Mean gap between the tokens of one request.", _TOKEN_SECONDS,
               vllm="request_time_per_output_token_seconds"),
    _histogram("request_queue_time_seconds", "Arrival to first scheduling.", _STAGE_SECONDS,
               vllm="request_queue_time_seconds"),
    _histogram("request_prefill_time_seconds", "First scheduling to first token.",
               _STAGE_SECONDS, vllm="request_prefill_time_seconds"),
    _histogram("request_decode_time_seconds", "First token to last.", _REQUEST_SECONDS,
               vllm="request_decode_time_seconds"),
    _histogram("request_inference_time_seconds", "First scheduling to last token.",
               _REQUEST_SECONDS, vllm="request_inference_time_seconds"),
    _histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_SECONDS,
               vllm="e2e_request_latency_seconds"),
    # Engine.
    _gauge("model_info", "Always 1; what is being served.",
           (*MODEL, "version", "digest", "revision", "dtype", "device")),
    _gauge("model_version", "Version of the folder that the model's name stands for; 0: none."),
    _counter("model_loads_total", "Versions that were loaded (ok) or could not be (failed).",
             (*MODEL, "outcome")),
    _gauge("engine_ready", "1 when the engine takes requests."),
    _counter("engine_steps_total", "Steps that the engine has run."),
    _counter("engine_restarts_total", "Times the engine process was started again."),
    _counter("api_process_restarts_total", "Times an API process was started again."),
    _gauge("queued_prompt_tokens", "Prompt tokens of requests that have no first token yet."),
    _gauge("prefill_tokens_per_second", "Speed of steps that compute prompts; 0 until measured."),
    _gauge("decode_step_seconds", "Length of a step that computes no prompt; 0 until measured."),
    _gauge("engine_step_age_seconds", "Since the engine last ended a step or said it was idle."),
    # HTTP.
    _counter("http_requests_total", "HTTP requests.", ("route", "method", "status")),
    _histogram("http_request_duration_seconds", "First byte in to last byte out.",
               _REQUEST_SECONDS, ("route", "method")),
    # Resources, read at each scrape. process: "api" answers HTTP and starts others, "engine" is
    # the engine and what it started.
    _counter("process_cpu_seconds_total", "User and system CPU time.", _PROCESS),
    _gauge("process_resident_memory_bytes", "Resident memory.", _PROCESS),
    _gauge("process_open_fds", "Open file descriptors.", _PROCESS),
    _gauge("host_cpus", "Logical CPUs of the host.", ()),
    _counter("host_cpu_seconds_total", "CPU time of the host, by mode.", ("mode",)),
    _gauge("host_memory_bytes", "Memory of the host, by state.", ("state",)),
    _gauge("gpu_memory_bytes", "GPU memory, by state.", (*_GPU, "state")),
    _gauge("gpu_utilization_ratio", "Share of time in which a kernel ran (0 to 1).", _GPU),
    _gauge("gpu_power_watts", "GPU board power.", _GPU),
    _gauge("gpu_temperature_celsius", "GPU temperature.", _GPU),
)
# fmt: on

BY_NAME = {family.name: family for family in FAMILIES}
