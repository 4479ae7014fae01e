"""What the dashboard shows: rows of panels, each with its queries. Data only; grafana.py lays it
out.

`$model`, `$application`, `$replica` and `$__rate_interval` are Grafana's variables. A replica is
its `instance`: the address that was scraped.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.monitoring.promql import Selection

VARIABLES = ("model", "application", "replica")
CHOSEN = Selection(
    ('model_name=~"$model"', 'application=~"$application"', 'instance=~"$replica"'),
    "$__rate_interval",
)

NEEDS = {
    "door": "a door (`headrace route`)",
    "gpu": "a GPU that NVML can see (pynvml installed)",
    "trouble": "something that has gone wrong; empty is good",
    "refusals": "a replica that refuses what the door sends; empty is good",
    "ray": "Ray's own metrics in the same Prometheus",
    "versions": "a folder of versions (NAME/1, NAME/2) that is watched",
    "waking": "a door with models that are scaled to zero (`wake`)",
}
"""Why a panel may have no data, by the word that panels use."""


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str
    """A Grafana legend: `{{label}}` is replaced."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of the unit."""
    queries: tuple[Query, ...]
    description: str = ""
    needs: str = ""
    """A key of NEEDS; without it some query of the panel has data on any loaded server."""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def _quantiles(title: str, name: str, description: str = "") -> Panel:
    queries = (
        *(Query(CHOSEN.quantile(q / 100, name), f"p{q}") for q in (50, 90, 99)),
        Query(CHOSEN.mean(name), "mean"),
    )
    return Panel(title, "s", queries, description)


def _panel(
    title: str, unit: str, *queries: tuple[str, str], description: str = "", needs: str = ""
) -> Panel:
    return Panel(title, unit, tuple(Query(*query) for query in queries), description, needs)


_V1 = 'route=~"/v1/.*"'
_FAILED = 'status=~"5.."'
_IDLE = 'mode="idle"'

REQUESTS = Row(
    "Requests",
    (
        _panel(
            *("Requests finished", "reqps"),
            (CHOSEN.rate("requests_finished_total", by="finished_reason"), "{{finished_reason}}"),
        ),
        _panel(
            *("HTTP answers", "reqps"),
            (CHOSEN.rate("http_requests_total", _V1, by="status"), "{{status}}"),
        ),
        _panel(
            *("Share of 5xx", "percentunit"),
            (
                f"({CHOSEN.rate('http_requests_total', _V1, _FAILED)} or vector(0))"
                f" / {CHOSEN.rate('http_requests_total', _V1)}",
                "5xx",
            ),
        ),
        _panel(
            *("Refused before the engine", "reqps"),
            (CHOSEN.rate("requests_rejected_total", by="reason"), "{{reason}}"),
            needs="trouble",
        ),
        _panel(
            *("Tokens", "short"),
            (CHOSEN.rate("generation_tokens_total"), "generated"),
            (CHOSEN.rate("prompt_tokens_total"), "prompt"),
            (CHOSEN.rate("prompt_tokens_cached_total"), "prompt, cached"),
            description="Per second. Prompts count when their request ends.",
        ),
        _panel(
            *("Tokens of a request, mean", "short"),
            (CHOSEN.mean("request_prompt_tokens"), "prompt"),
            (CHOSEN.mean("request_generation_tokens"), "generated"),
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        _quantiles("Time to first token (TTFT)", "time_to_first_token_seconds"),
        _quantiles("Inter-token latency (ITL)", "inter_token_latency_seconds", "Of single tokens."),
        _quantiles(
            "Time per output token (TPOT)",
            "request_time_per_output_token_seconds",
            "Means of requests.",
        ),
        _quantiles("Whole request (e2e)", "e2e_request_latency_seconds"),
        _quantiles("Time in the queue", "request_queue_time_seconds"),
        _quantiles("Prefill", "request_prefill_time_seconds"),
    ),
)

ENGINE = Row(
    "Engine",
    (
        _panel(
            *("Running", "short"),
            (CHOSEN.gauge("requests_running", by="instance"), "{{instance}}"),
        ),
        _panel(
            *("Waiting", "short"),
            (CHOSEN.gauge("requests_waiting", by="instance"), "{{instance}}"),
        ),
        _panel(
            *("Prompt tokens waiting", "short"),
            (CHOSEN.gauge("queued_prompt_tokens", by="instance"), "{{instance}}"),
        ),
        _panel(
            *("Prefill speed", "short"),
            (
                CHOSEN.gauge("prefill_tokens_per_second", by="instance", combine="max"),
                "{{instance}}",
            ),
            description="Prompt tokens per second, measured by the engine.",
        ),
        _panel(
            *("KV cache in use", "percentunit"),
            (CHOSEN.gauge("kv_cache_usage_ratio", by="instance", combine="max"), "{{instance}}"),
        ),
        _panel(
            *("Prefix cache hits", "percentunit"),
            (
                f"{CHOSEN.rate('prefix_cache_hits_total', by='instance')}"
                f" / {CHOSEN.rate('prefix_cache_queries_total', by='instance')}",
                "{{instance}}",
            ),
            description="Share of looked-up prompt tokens.",
        ),
        _panel(
            *("Preemptions and halved steps", "short"),
            (CHOSEN.increase("preemptions_total", by="instance"), "preempted {{instance}}"),
            (CHOSEN.increase("oom_retries_total", by="instance"), "halved {{instance}}"),
        ),
        _panel(
            *("Steps", "short"),
            (CHOSEN.rate("engine_steps_total", by="instance"), "{{instance}}"),
            description="Per second.",
        ),
        _panel(
            *("Length of a decode step", "s"),
            (CHOSEN.gauge("decode_step_seconds", by="instance", combine="max"), "{{instance}}"),
            description="Measured by the engine, over steps that compute no prompt.",
        ),
        _panel(
            *("Tokens of a step, mean", "short"),
            (CHOSEN.mean("iteration_tokens", by="instance"), "{{instance}}"),
        ),
        _panel(
            *("Age of the last step", "s"),
            (CHOSEN.gauge("engine_step_age_seconds", by="instance", combine="max"), "{{instance}}"),
            description="An idle engine says so; a rising line is an engine that is stuck.",
        ),
        _panel(
            *("Restarts", "short"),
            (CHOSEN.increase("engine_restarts_total", by="instance"), "engine {{instance}}"),
            (CHOSEN.increase("api_process_restarts_total", by="instance"), "API {{instance}}"),
        ),
        _panel(
            *("Replicas ready", "short"),
            (CHOSEN.gauge("engine_ready", by="model_name"), "{{model_name}}"),
        ),
        _panel(
            *("What is served", "short"),
            (
                CHOSEN.gauge("model_info", by="model_name, revision, digest, version"),
                "{{model_name}} {{revision}} {{digest}}, Headrace {{version}}",
            ),
            description="Replicas by model, revision and digest.",
        ),
        _panel(
            *("Version of the folder that is served", "short"),
            (CHOSEN.gauge("model_version", by="instance", combine="max"), "{{instance}}"),
            needs="versions",
        ),
        _panel(
            *("Versions loaded", "short"),
            (CHOSEN.increase("model_loads_total", by="model_name, outcome"), "{{outcome}}"),
            needs="versions",
        ),
    ),
)

RESOURCES = Row(
    "Resources",
    (
        _panel(
            *("CPU of processes", "short"),
            (
                CHOSEN.rate("process_cpu_seconds_total", by="instance, process"),
                "{{process}} {{instance}}",
            ),
            description="In cores.",
        ),
        _panel(
            *("Memory of processes", "bytes"),
            (
                CHOSEN.gauge("process_resident_memory_bytes", by="instance, process"),
                "{{process}} {{instance}}",
            ),
        ),
        _panel(
            *("Open files", "short"),
            (
                CHOSEN.gauge("process_open_fds", by="instance, process"),
                "{{process}} {{instance}}",
            ),
        ),
        _panel(
            *("CPU of hosts", "percentunit"),
            (
                f"1 - {CHOSEN.rate('host_cpu_seconds_total', _IDLE, by='instance')}"
                f" / {CHOSEN.rate('host_cpu_seconds_total', by='instance')}",
                "{{instance}}",
            ),
        ),
        _panel(
            *("Memory of hosts, available", "bytes"),
            (
                CHOSEN.gauge("host_memory_bytes", 'state="available"', by="instance"),
                "{{instance}}",
            ),
        ),
        _panel(
            *("GPU utilization", "percentunit"),
            (
                CHOSEN.gauge("gpu_utilization_ratio", by="instance, gpu", combine="max"),
                "{{instance}} GPU {{gpu}}",
            ),
            needs="gpu",
        ),
        _panel(
            *("GPU memory used", "bytes"),
            (
                CHOSEN.gauge("gpu_memory_bytes", 'state="used"', by="instance, gpu", combine="max"),
                "{{instance}} GPU {{gpu}}",
            ),
            needs="gpu",
        ),
        _panel(
            *("GPU power", "watt"),
            (
                CHOSEN.gauge("gpu_power_watts", by="instance, gpu", combine="max"),
                "{{instance}} GPU {{gpu}}",
            ),
            needs="gpu",
        ),
        _panel(
            *("GPU temperature", "celsius"),
            (
                CHOSEN.gauge("gpu_temperature_celsius", by="instance, gpu", combine="max"),
                "{{instance}} GPU {{gpu}}",
            ),
            needs="gpu",
        ),
    ),
)

DOOR = Row(
    "Door",
    (
        _panel(
            *("Answers of the door", "reqps"),
            (
                CHOSEN.rate("door_requests_total", by="model_name, status"),
                "{{model_name}} {{status}}",
            ),
            needs="door",
        ),
        Panel(
            "Time to first byte at the door",
            "s",
            tuple(
                Query(CHOSEN.quantile(q / 100, "door_time_to_first_byte_seconds"), f"p{q}")
                for q in (50, 90, 99)
            ),
            "Of streams and of whole answers.",
            "door",
        ),
        _panel(
            *("Replicas that the door knows", "short"),
            (
                CHOSEN.gauge("door_replicas", by="model_name, state", combine="max"),
                "{{model_name}} {{state}}",
            ),
            needs="door",
        ),
        _panel(
            *("Replicas that died of a request", "short"),
            (CHOSEN.increase("door_replays_total", by="outcome"), "{{outcome}}"),
            description="It was sent again, its stream was resumed, or was lost.",
            needs="door",
        ),
        _panel(
            *("Retries at another replica", "reqps"),
            (CHOSEN.rate("door_retries_total", by="reason"), "{{reason}}"),
            needs="refusals",
        ),
        _panel(
            *("In flight at the door", "short"),
            (CHOSEN.gauge("door_requests_in_flight"), "in flight"),
            (CHOSEN.rate("door_client_aborts_total"), "clients that left, per second"),
            needs="door",
        ),
        _panel(
            *("Waiting for a replica to start", "short"),
            (CHOSEN.gauge("door_queued_requests", by="model_name"), "{{model_name}}"),
            needs="waking",
        ),
        _panel(
            *("What became of those that waited", "short"),
            (
                CHOSEN.increase("door_unqueued_requests_total", by="model_name, outcome"),
                "{{model_name}} {{outcome}}",
            ),
            needs="waking",
        ),
    ),
)

# Ray's own names, as its node agents export them.
RAY = Row(
    "Ray Serve",
    (
        _panel(
            *("Replicas: wanted and healthy", "short"),
            (
                "sum by (application) (ray_serve_autoscaling_target_replicas{application=~"
                '"$application"})',
                "wanted {{application}}",
            ),
            (
                "sum by (application) (ray_serve_deployment_replica_healthy{application=~"
                '"$application"})',
                "healthy {{application}}",
            ),
            needs="ray",
        ),
        _panel(
            *("Replicas that the policy asks for", "short"),
            (
                "max by (application) (ray_serve_autoscaling_desired_replicas{application=~"
                '"$application"})',
                "{{application}}",
            ),
            needs="ray",
        ),
        _panel(
            *("Replica starts", "short"),
            (
                "sum by (application) (increase(ray_serve_deployment_replica_starts_total"
                '{application=~"$application"}[$__rate_interval]))',
                "{{application}}",
            ),
            needs="ray",
        ),
    ),
)

ROWS = (REQUESTS, LATENCY, ENGINE, DOOR, RESOURCES, RAY)
