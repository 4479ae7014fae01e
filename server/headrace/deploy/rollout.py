"""`headrace deploy`: check a Serve config file and the cluster, send it, wait until it serves.

Everything goes through the cluster's dashboard, the address that `serve deploy` takes: Serve's REST
and, to ask the nodes, a job. Nothing is sent before every check has passed.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace import __version__
from headrace.config import ray_auth_token
from headrace.deploy import node_report, serve_file
from headrace.deploy.local_cluster import root_cause
from headrace.deploy.node_checks import check_nodes
from headrace.deploy.serve_file import Demand
from headrace.deploy.switches import SERVING
from headrace.errors import ConfigError, EngineError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_TIMEOUT = 900.0
"""Seconds for a rollout; loading weights takes most of them."""
JOB_TIMEOUT = 120.0
AGENT_TIMEOUT = 90.0
POLL_SECONDS = 0.5

Tell = Callable[[str], None]


def run(
    path: str,
    address: str,
    *,
    dry_run: bool = False,
    ask_nodes: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
    tell: Tell = lambda line: None,
) -> None:
    """Returns when every application of the file runs; `tell` gets lines for people meanwhile.

    dry_run: check only. ask_nodes: False skips what only the nodes can answer. Raises ConfigError,
    with nothing sent, for what is wrong with the file or does not fit the cluster; EngineError for
    a cluster that does not answer and for an application that does not come to run.
    """
    file = serve_file.read(path)
    cluster = Dashboard(address)
    before = cluster.applications()
    if ask_nodes:
        tell("Asking the nodes for their versions, switches and room")
        _check_cluster(cluster, file.demands, tell)
    names = [application.get("name", "default") for application in file.content["applications"]]
    for name in sorted(before.keys() - set(names)):
        tell(f"Application {name} runs, is not in {path}, and will be removed")
    if dry_run:
        tell("Nothing is wrong; nothing was sent")
        return
    cluster.deploy(file.content)
    _await_running(cluster, names, time.monotonic() + timeout, tell)


class Dashboard:
    """Serve's REST and the jobs of a cluster. Methods raise EngineError if it does not answer."""

    def __init__(self, address: str) -> None:
        """Raises ConfigError for what is not the URL of a dashboard."""
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address {address}: must be the URL of the cluster's dashboard, such as "
                f"{DEFAULT_ADDRESS}."
            )
        self.address = address.rstrip("/")

    def applications(self) -> dict[str, Any]:
        """What runs, by name, as Serve's REST describes it."""
        found: dict[str, Any] = json.loads(self._call("GET")).get("applications", {})
        return found

    def deploy(self, content: Mapping[str, Any]) -> None:
        """Raises ConfigError for what Serve refuses."""
        self._call("PUT", json.dumps(content).encode())

    def _call(self, method: str, body: bytes | None = None) -> bytes:
        headers = {"content-type": "application/json"}
        if token := ray_auth_token():
            headers["authorization"] = f"Bearer {token}"
        request = urllib.request.Request(
            f"{self.address}/api/serve/applications/", body, headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace").strip()
            if error.code == 400:
                raise ConfigError(f"Serve refuses the file: {root_cause(text)}") from None
            raise EngineError(f"{self.address} answers {error.code}: {text[-300:]}") from None
        except OSError as error:
            raise EngineError(
                f"No dashboard at {self.address}: {getattr(error, 'reason', error)}. Give the URL "
                "of the cluster's as --address; Ray must have been started with it."
            ) from None

    def ask_nodes(self, paths: Sequence[str]) -> dict[str, Any]:
        """What node_report says."""
        import shlex

        from ray.job_submission import JobStatus, JobSubmissionClient

        asked = json.dumps({"variables": [s.name for s in SERVING], "paths": list(paths)})
        command = f"python -m {node_report.__name__} {shlex.quote(asked)}"
        try:
            client = JobSubmissionClient(self.address)
            job = _submit(client, command)
            deadline = time.monotonic() + JOB_TIMEOUT
            while not (status := client.get_job_status(job)).is_terminal():
                if time.monotonic() > deadline:
                    client.stop_job(job)
                    raise EngineError(f"The nodes do not answer within {JOB_TIMEOUT:.0f} s.")
                time.sleep(POLL_SECONDS)
            log = client.get_job_logs(job)
        except (RuntimeError, ConnectionError) as error:
            raise EngineError(
                f"The cluster takes no job that asks its nodes: {error}. --no-node-checks goes on "
                "without their answers."
            ) from None
        answers = [line for line in log.splitlines() if line.startswith(node_report.MARK)]
        if status is not JobStatus.SUCCEEDED or not answers:
            raise ConfigError(
                f"The head node cannot run Headrace: {root_cause(log or 'no output')} Install "
                f"headrace {__version__} on every node."
            )
        found: dict[str, Any] = json.loads(answers[-1].removeprefix(node_report.MARK))
        return found


def _submit(client: Any, command: str) -> str:
    """The job's id. A cluster that has just begun has nobody yet who takes jobs."""
    deadline = time.monotonic() + AGENT_TIMEOUT
    while True:
        try:
            return str(client.submit_job(entrypoint=command))
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _check_cluster(cluster: Dashboard, demands: Sequence[Demand], tell: Tell) -> None:
    import ray

    paths = {demand.model for demand in demands if demand.model.startswith("/")}
    report = cluster.ask_nodes(sorted(paths))
    findings = check_nodes(report, demands, version=__version__, ray=ray.__version__)
    for warning in findings.warnings:
        tell(f"Warning: {warning}")
    if findings.errors:
        raise ConfigError("\n".join(findings.errors))


# --- waiting ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """Of one application."""

    done: bool
    failure: str
    """Why it will not come to run; empty while it may."""
    line: str


def progress_of(name: str, details: Mapping[str, Any] | None) -> Progress:
    """`details`: Serve's ApplicationDetails as JSON, None before there are any."""
    if details is None:
        return Progress(False, "", f"{name}: not there yet")
    counts: dict[str, int] = {}
    deployments = details["deployments"].values()
    for deployment in deployments:
        for replica in deployment["replicas"]:
            counts[replica["state"]] = counts.get(replica["state"], 0) + 1
    replicas = ", ".join(f"{count} {state.lower()}" for state, count in sorted(counts.items()))
    line = f"{name}: {details['status'].lower()}; replicas: {replicas or 'none'}"
    failure = ""
    if details["status"] in ("DEPLOY_FAILED", "UNHEALTHY", "NOT_STARTED"):
        messages = [d["message"] for d in deployments if d["status"] in FAILED] or [""]
        failure = root_cause("\n".join(messages) or details["message"] or details["status"])
        if running := counts.get("RUNNING"):
            failure += f" What served before goes on ({running} running)."
        else:
            failure += " Nothing of it serves."
    healthy = all(deployment["status"] == "HEALTHY" for deployment in deployments)
    return Progress(details["status"] == "RUNNING" and healthy, failure, line)


FAILED = ("UNHEALTHY", "DEPLOY_FAILED")


def _await_running(cluster: Dashboard, names: Sequence[str], deadline: float, tell: Tell) -> None:
    told: dict[str, str] = {}
    calm = 0
    while calm < 2:  # one look may come before Serve has begun
        time.sleep(POLL_SECONDS)
        applications = cluster.applications()
        found = {name: progress_of(name, applications.get(name)) for name in names}
        for name, progress in found.items():
            if told.get(name) != progress.line:
                told[name] = progress.line
                tell(progress.line)
        failures = [f"{name}: {p.failure}" for name, p in found.items() if p.failure]
        if failures:
            raise EngineError("\n".join(failures))
        calm = calm + 1 if all(progress.done for progress in found.values()) else 0
        if time.monotonic() > deadline:
            waiting = ", ".join(name for name, progress in found.items() if not progress.done)
            raise EngineError(
                f"Not running within the given time: {waiting}. Ray goes on trying; see "
                f"{cluster.address}, or give a longer --timeout."
            )
