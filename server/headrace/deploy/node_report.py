"""What each node of a cluster is, told by the node itself: run as a Ray job.

    python -m headrace.deploy.node_report '{"variables": [...], "paths": [...]}'

The line of JSON after MARK is the answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "headrace-nodes "


def describe(variables: Sequence[str], paths: Sequence[str]) -> dict[str, Any]:
    """This node, as a replica would find it: runs as a task on each."""
    import ray

    from headrace import __version__

    return {
        "headrace": __version__,
        "ray": ray.__version__,
        "python": ".".join(str(part) for part in sys.version_info[:2]),
        "variables": {name: os.environ.get(name) for name in variables},
        "missing_paths": [path for path in paths if not Path(path).exists()],
    }


def report(variables: Sequence[str], paths: Sequence[str]) -> dict[str, Any]:
    """`nodes`: each with what `describe` says or, where it could not, `error`; and `doors`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(describe)
    nodes: list[dict[str, Any]] = []
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    answers: list[Any] = [
        task.options(
            num_cpus=0,
            max_retries=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(variables, paths)
        for node in alive
    ]
    for node, answer in zip(alive, answers, strict=True):
        about = {"address": node["NodeManagerAddress"], "resources": node["Resources"]}
        try:
            nodes.append({**about, **ray.get(answer, timeout=60)})
        except Exception as error:  # a node that cannot say is part of the answer
            nodes.append({**about, "error": (str(error).strip().splitlines() or ["?"])[-1]})
    return {"nodes": nodes, "doors": _doors()}


def _doors() -> Mapping[str, str]:
    import ray

    from headrace.deploy.registry import NAME, NAMESPACE

    try:
        registry: Any = ray.get_actor(NAME, namespace=NAMESPACE)
        doors: dict[str, str] = ray.get(registry.doors.remote(), timeout=10)
    except (ValueError, ray.exceptions.RayError):  # no registry: no door has asked it
        return {}
    return doors


def main() -> None:
    import ray

    asked = json.loads(sys.argv[1])
    ray.init(log_to_driver=False)
    print(MARK + json.dumps(report(asked["variables"], asked["paths"])), flush=True)


if __name__ == "__main__":
    main()
