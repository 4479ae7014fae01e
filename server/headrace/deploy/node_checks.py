"""Whether a cluster's nodes can run what a Serve config asks for. Pure: report in, findings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.deploy.serve_file import Demand
from headrace.deploy.switches import SERVING


@dataclass(slots=True)
class Findings:
    errors: list[str] = field(default_factory=list)
    """Nothing may be deployed."""
    warnings: list[str] = field(default_factory=list)
    """It will run, and cost more than it need."""


def check_nodes(
    report: Mapping[str, Any], demands: Sequence[Demand], *, version: str, ray: str
) -> Findings:
    """`report`: of node_report. `version` and `ray`: of the machine that deploys."""
    findings = Findings()
    nodes = report["nodes"]
    able = [node for node in nodes if "error" not in node]
    for node in nodes:
        if "error" in node:
            findings.errors.append(
                f"Node {node['address']} cannot run Headrace: {node['error']}. Install the same "
                "version on every node."
            )
    _check_versions(able, report["doors"], version, ray, findings)
    _check_switches(able, findings)
    for demand in demands:
        _check_placement(demand, nodes, findings)
        _check_model(demand, able, findings)
    return findings


def _check_versions(
    nodes: Sequence[Mapping[str, Any]],
    doors: Mapping[str, str],
    version: str,
    ray: str,
    findings: Findings,
) -> None:
    for node in nodes:
        for name, there, here in (
            ("Headrace", node["headrace"], version),
            ("Ray", node["ray"], ray),
        ):
            if there != here:
                findings.errors.append(
                    f"Node {node['address']} has {name} {there}, this machine has {here}. Use the "
                    "same on both."
                )
    for door, there in sorted(doors.items()):
        if there.split(".")[:2] != version.split(".")[:2]:
            findings.errors.append(
                f"A door ({door}) is Headrace {there}, replicas would be {version}. Upgrade the "
                "door: both must have the same minor version."
            )


def _check_switches(nodes: Sequence[Mapping[str, Any]], findings: Findings) -> None:
    for switch in SERVING:
        without = [
            node["address"] for node in nodes if node["variables"].get(switch.name) != switch.value
        ]
        if without:
            findings.warnings.append(
                f"{switch.name} is not {switch.value} on {', '.join(without)}: {switch.cost} Set "
                "it there before Ray starts."
            )


def _check_placement(
    demand: Demand, nodes: Sequence[Mapping[str, Any]], findings: Findings
) -> None:
    for name, needed in demand.resources.items():
        largest = max(nodes, key=lambda node: node["resources"].get(name, 0), default=None)
        most = largest["resources"].get(name, 0) if largest else 0
        if needed > most:
            of = f"node {largest['address']}" if largest and most else "every node"
            findings.errors.append(
                f"{demand.where} ({demand.application}): a replica needs {needed:g} {name}, and "
                f"the most that a node has is {most:g} ({of}). Ray would wait without end: lower "
                "options.threads or ray_actor_options, or add such a node."
            )
            return
    room = sum(room_on(node["resources"], demand.resources) for node in nodes)
    if room < demand.replicas:
        findings.errors.append(
            f"{demand.where} ({demand.application}): {demand.replicas} replicas are asked for, and "
            f"the cluster has room for {room}. Lower num_replicas, or what a replica reserves."
        )
    elif demand.surge and room < 2 * demand.replicas:
        findings.warnings.append(
            f"{demand.where} ({demand.application}): a rollout loads new replicas beside the old "
            f"ones, and there is room for {room}, not {2 * demand.replicas}. Where it must not "
            "wait for room, set max_surge_percent: 0: then the old ones stop first."
        )
    if not demand.says_threads and not demand.resources.get("GPU"):
        findings.warnings.append(
            f"{demand.where}.args.options.threads is not set: the engine takes every core it may "
            "use while Ray reserves 1. (OMP_NUM_THREADS, which Ray sets to 1, does not matter.)"
        )


def room_on(node: Mapping[str, float], replica: Mapping[str, float]) -> int:
    """How many replicas fit on an empty node, by what they reserve."""
    fits = [int(node.get(name, 0) // needed) for name, needed in replica.items() if needed]
    return min(fits, default=1_000)


def _check_model(demand: Demand, nodes: Sequence[Mapping[str, Any]], findings: Findings) -> None:
    without = [node["address"] for node in nodes if demand.model in node["missing_paths"]]
    if without and len(without) == len(nodes):
        findings.errors.append(
            f"{demand.where}.args.model: {demand.model} does not exist on any node."
        )
    elif without:
        findings.warnings.append(
            f"{demand.where}.args.model: {demand.model} does not exist on {', '.join(without)}: "
            "replicas that Ray places there fail."
        )
