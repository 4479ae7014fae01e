"""What `headrace deploy` finds wrong, and how it reads a rollout: all but the cluster."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.cli import main
from headrace.deploy import rollout
from headrace.deploy.node_checks import Findings, check_nodes, room_on
from headrace.deploy.rollout import DEFAULT_ADDRESS, DEFAULT_TIMEOUT, progress_of
from headrace.deploy.serve_file import DEPLOYMENT, OURS, Demand, check
from headrace.deploy.switches import SERVING

SHIPPED = Path(__file__).parents[2] / "deploy" / "ray" / "headrace.yaml"


def shipped() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    return content


def demands_of(**deployment: Any) -> list[Demand]:
    content = shipped()
    content["applications"][0]["deployments"] = [{"name": DEPLOYMENT, **deployment}]
    problems, demands = check(content)
    assert not problems
    return demands


def test_the_shipped_file_is_right() -> None:
    (demand,) = demands_of()
    assert (demand.resources, demand.replicas, demand.surge) == ({"CPU": 2}, 1, True)


def set_at(content: Any, path: tuple[str | int, ...], value: Any) -> None:
    for part in path[:-1]:
        content = content[part]
    content[path[-1]] = value


APP = ("applications", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("proxy_locatio",), 1, "proxy_locatio: Ray's Serve schema has no such key; did you mean"),
        (("http_options", "prt"), 1, "http_options.prt: .* did you mean 'port'"),
        ((*APP, "rout_prefix"), "/", r"applications\[0\].rout_prefix: .*'route_prefix'"),
        ((*APP, "args", "modle"), "x", r"applications\[0\].args.modle: .*did you mean 'model'"),
        ((*APP, "args", "options", "thread"), 1, r"args.options.thread: .*did you mean 'threads'"),
        ((*APP, "args"), [], r"applications\[0\].args: "),
        ((*APP, "deployments", 0, "num_replica"), 1, r"deployments\[0\].num_replica: .*replicas'"),
        ((*APP, "deployments", 0, "num_replicas"), "x", r"applications\[0\].deployments\[0\]: "),
        ((*APP, "deployments", 0, "name"), "x", r"deployments\[0\].name: .*'headrace'"),
        (
            (*APP, "deployments", 0, "autoscaling_config"),
            {"min_replica": 1},
            r"autoscaling_config.min_replica: .*did you mean 'min_replicas'",
        ),
        (
            (*APP, "deployments", 0, "ray_actor_options"),
            {"num_cpu": 1},
            r"ray_actor_options.num_cpu: .*did you mean 'num_cpus'",
        ),
        (("applications",), "x", "applications: "),
    ],
)
def test_a_typo_is_told_with_its_place(
    path: tuple[str | int, ...], value: Any, message: str
) -> None:
    content = shipped()
    set_at(content, path, value)
    problems, demands = check(content)
    assert not demands
    assert any(re.search(message, problem) for problem in problems), problems


def test_applications_of_others_are_theirs() -> None:
    content = shipped()
    content["applications"].append(
        {"name": "other", "import_path": "x:y", "route_prefix": "/other", "args": {"any": 1}}
    )
    problems, demands = check(content)
    assert not problems
    assert [demand.application for demand in demands] == ["headrace"]


@pytest.mark.parametrize(
    ("deployment", "resources", "replicas"),
    [
        ({"num_replicas": 3}, {"CPU": 2}, 3),
        ({"num_replicas": "auto"}, {"CPU": 2}, 1),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 4}}, {"CPU": 2}, 0),
        ({"autoscaling_config": {"min_replicas": 1, "initial_replicas": 2}}, {"CPU": 2}, 2),
        ({"ray_actor_options": {"num_gpus": 1}}, {"CPU": 1, "GPU": 1}, 1),
        ({"ray_actor_options": {"num_cpus": 0, "resources": {"x": 2}}}, {"x": 2}, 1),
        (
            {
                "placement_group_bundles": [{"CPU": 2, "GPU": 1}, {"GPU": 1}],
                "placement_group_strategy": "STRICT_PACK",
            },
            {"CPU": 2, "GPU": 2},
            1,
        ),
    ],
)
def test_what_stands_under_deployments_counts(
    deployment: dict[str, Any], resources: dict[str, float], replicas: int
) -> None:
    (demand,) = demands_of(**deployment)
    assert (demand.resources, demand.replicas) == (resources, replicas)


# --- nodes ------------------------------------------------------------------------------------


def node(address: str = "10.0.0.1", cpus: float = 4, **more: Any) -> dict[str, Any]:
    return {
        "address": address,
        "resources": {"CPU": cpus},
        "headrace": "1.2.0",
        "ray": "2.60.0",
        "python": "3.11",
        "variables": {switch.name: switch.value for switch in SERVING},
        "missing_paths": [],
        **more,
    }


def findings(
    *nodes: dict[str, Any], doors: dict[str, str] | None = None, **demand: Any
) -> Findings:
    fields: dict[str, Any] = {
        "where": "applications[0]",
        "application": "chat",
        "resources": {"CPU": 2},
        "replicas": 1,
        "surge": True,
        "says_threads": True,
        "model": "/model",
    }
    report = {"nodes": nodes, "doors": doors or {}}
    return check_nodes(report, [Demand(**{**fields, **demand})], version="1.2.0", ray="2.60.0")


def test_a_cluster_that_fits_is_told_nothing() -> None:
    assert findings(node()) == Findings()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (findings(node(cpus=1), node("b", cpus=1)), "a replica needs 2 CPU, .*has is 1"),
        (findings(node(), resources={"GPU": 2}), "needs 2 GPU, .*has is 0 .every node."),
        (findings(node(), node("b"), replicas=5), "5 replicas are asked for, .*room for 4"),
        (findings(node(), {**node("b"), "error": "No module"}), "Node b cannot run"),
        (findings(node(headrace="1.1.9")), "10.0.0.1 has Headrace 1.1.9, this machine has 1.2.0"),
        (findings(node(ray="2.59.0")), "has Ray 2.59.0, this machine has 2.60.0"),
        (findings(node(), doors={"d": "1.1.0"}), r"A door .d. is Headrace 1\.1\.0"),
        (findings(node(missing_paths=["/model"])), "/model does not exist on any node"),
    ],
)
def test_what_cannot_work_is_an_error(found: Findings, message: str) -> None:
    (error,) = found.errors
    assert re.search(message, error), error


def test_a_door_of_the_same_minor_version_is_fine() -> None:
    assert not findings(node(), doors={"d": "1.2.9"}).errors


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            findings(node(variables={s.name: s.value for s in SERVING if "PROXY" not in s.name})),
            "RAY_SERVE_ENABLE_HA_PROXY is not 1 on 10.0.0.1: Serve's Python proxy takes",
        ),
        (findings(node(cpus=3)), "there is room for 1, not 2.*max_surge_percent: 0"),
        (findings(node(), says_threads=False), "options.threads is not set.*OMP_NUM_THREADS"),
        (findings(node(), node("b", missing_paths=["/model"])), "does not exist on b"),
    ],
)
def test_what_costs_more_than_it_need_is_a_warning(found: Findings, message: str) -> None:
    assert not found.errors
    (warning,) = found.warnings
    assert re.search(message, warning), warning


def test_room_is_by_the_scarcest_resource() -> None:
    assert room_on({"CPU": 16, "GPU": 2}, {"CPU": 3, "GPU": 1}) == 2
    assert room_on({"CPU": 5, "GPU": 8}, {"CPU": 3, "GPU": 1}) == 1
    assert room_on({}, {"CPU": 1}) == 0


# --- the rollout ------------------------------------------------------------------------------


def details(status: str, deployment: str = "HEALTHY", *states: str, why: str = "") -> Any:
    replicas = [{"state": state} for state in states]
    one = {"status": deployment, "message": why, "replicas": replicas}
    return {"status": status, "message": "", "deployments": {"headrace": one}}


def test_progress_counts_replicas_and_ends_when_all_is_well() -> None:
    assert not progress_of("chat", None).done
    starting = progress_of("chat", details("DEPLOYING", "UPDATING", "RUNNING", "STARTING"))
    assert starting.line == "chat: deploying; replicas: 1 running, 1 starting"
    assert not (starting.done or starting.failure)
    assert not progress_of("chat", details("RUNNING", "UPDATING", "RUNNING")).done
    assert progress_of("chat", details("RUNNING", "HEALTHY", "RUNNING")).done


def test_a_failure_is_the_replicas_reason_and_what_still_serves() -> None:
    why = "Error:\nheadrace.errors.CheckpointError: /x.gguf: it is empty.\n\n"
    failed = progress_of("chat", details("DEPLOY_FAILED", "UNHEALTHY", "RUNNING", why=why))
    assert failed.failure == "/x.gguf: it is empty. What served before goes on (1 running)."
    gone = progress_of("chat", details("DEPLOY_FAILED", "DEPLOY_FAILED", why=why))
    assert gone.failure == "/x.gguf: it is empty. Nothing of it serves."


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "POLL_SECONDS", 0.01)


@contextmanager
def dashboard(applications: dict[str, Any], seen: list[Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            seen.append((self.command, self.path, self.rfile.read(length)))
            body = json.dumps({"applications": applications}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = answer

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def deploy(*arguments: str) -> int:
    return main(["deploy", str(SHIPPED), "--no-node-checks", *arguments])


def test_the_file_is_sent_as_it_is_and_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    running = {"headrace": details("RUNNING", "HEALTHY", "RUNNING")}
    with dashboard(running, seen) as url:
        assert deploy("--address", url) == 0
    (sent,) = [body for method, _, body in seen if method == "PUT"]
    assert json.loads(sent) == shipped()
    assert {path for _, path, _ in seen} == {"/api/serve/applications/"}
    assert "headrace: running; replicas: 1 running" in capsys.readouterr().err


def test_a_dry_run_sends_nothing_and_tells_what_would_go(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Any] = []
    with dashboard({"old": details("RUNNING")}, seen) as url:
        assert deploy("--address", url, "--dry-run") == 0
    assert [method for method, _, _ in seen] == ["GET"]
    assert "Application old runs, is not in" in capsys.readouterr().err


def test_a_failed_rollout_exits_with_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"headrace": details("DEPLOY_FAILED", "UNHEALTHY", "RUNNING", why="broken")}
    with dashboard(failed, []) as url:
        assert deploy("--address", url) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "headrace: headrace: broken What served before goes on (1 running)."


def test_a_rollout_that_takes_too_long_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with dashboard({}, []) as url:
        assert deploy("--address", url, "--timeout", "0") == 1
    assert "Not running within the given time: headrace." in capsys.readouterr().err


def test_nothing_is_asked_of_a_cluster_before_the_file_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = copy.deepcopy(shipped())
    content["applications"][0]["args"]["options"]["thread"] = 2
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["deploy", str(file), "--address", "http://127.0.0.1:1"]) == 2
    assert "args.options.thread: Unknown key 'thread'" in capsys.readouterr().err
    assert deploy("--address", "http://127.0.0.1:1") == 1
    assert "No dashboard at http://127.0.0.1:1: " in capsys.readouterr().err
    assert deploy("--address", "127.0.0.1:8265") == 2
    assert main(["deploy", str(tmp_path / "none.yaml")]) == 2
    file.write_text("- 1")
    assert main(["deploy", str(file)]) == 2


def test_the_command_line_has_the_defaults_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["deploy", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default: {DEFAULT_ADDRESS})" in text
    assert f"(default: {DEFAULT_TIMEOUT:.0f})" in text


def test_our_builder_is_where_the_file_says() -> None:
    from headrace.deploy import ray_serve

    assert f"{ray_serve.__name__}:{ray_serve.build_app.__name__}" == OURS
    assert ray_serve.deployment.name == DEPLOYMENT
