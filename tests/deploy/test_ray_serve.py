"""What the builder makes of its arguments, and the Serve config that ships. No cluster."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest
import yaml
from ray.serve import Application, Deployment
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from headrace.deploy.build_args import BuildArgs, problems_in
from headrace.deploy.ray_serve import ENGINE_CLOSE_SECONDS, build_app, listen_in
from headrace.errors import ConfigError

CONFIG_FILE = Path(__file__).parents[2] / "deploy" / "ray" / "headrace.yaml"


def deployment_of(application: Application) -> Deployment:
    return application._bound_deployment


def build(**options: Any) -> Deployment:
    return deployment_of(build_app(BuildArgs(options=options)))


def test_unknown_arguments_are_refused_by_name() -> None:
    with pytest.raises(pydantic.ValidationError, match=r"(?s)modle.*Extra inputs"):
        BuildArgs.model_validate({"modle": "x"})


def test_several_api_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"options\.api_processes.*replicas"):
        build(api_processes=2)


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'max_num_seq'.*did you mean 'max_num_seqs'"):
        build(max_num_seq=8)


@pytest.mark.parametrize("name", ["host", "port"])
def test_the_address_is_the_proxies_business(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"options\.{name}.*http_options\.{name}"):
        build(**{name: 8000})


def test_a_gpu_by_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cuda:1.*say cuda"):
        build(device="cuda:1")


@pytest.mark.parametrize(
    ("options", "resources"),
    [
        ({}, {"num_cpus": 1}),
        ({"threads": 6}, {"num_cpus": 6}),
        ({"device": "cuda"}, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_a_replica_reserves_what_its_engine_uses(
    options: dict[str, Any], resources: dict[str, float]
) -> None:
    assert build(**options).ray_actor_options == resources


def test_ray_lets_streams_finish_for_as_long_as_the_server_would() -> None:
    deployment = build(shutdown_timeout=77)
    grace = deployment._deployment_config.graceful_shutdown_timeout_s  # has no public name
    assert grace == 77 + ENGINE_CLOSE_SECONDS


def test_overload_is_answered_by_our_queue_not_by_serve() -> None:
    deployment = build(max_queued_requests=5000)
    assert deployment.max_ongoing_requests > 100_000
    assert deployment.max_queued_requests == -1


def shipped_application() -> ServeApplicationSchema:
    content = yaml.safe_load(CONFIG_FILE.read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    return application


def test_the_shipped_config_builds_the_application_that_it_configures() -> None:
    application = shipped_application()
    module, _, name = application.import_path.partition(":")
    builder = getattr(importlib.import_module(module), name)
    assert builder is build_app
    # Serve validates only against a class: a string (postponed annotation) would skip it.
    assert builder.__annotations__["args"] is BuildArgs
    built = deployment_of(builder(BuildArgs.model_validate(application.args)))
    assert [configured.name for configured in application.deployments] == [built.name]


def test_a_typo_in_the_shipped_config_would_be_found() -> None:
    args = shipped_application().args
    args["options"]["shutdown_timout"] = 3
    with pytest.raises(ConfigError, match="did you mean 'shutdown_timeout'"):
        build_app(BuildArgs.model_validate(args))


def test_all_that_is_wrong_is_told_at_once_each_with_its_place() -> None:
    problems = problems_in(
        {
            "modle": "x",
            "options": {"thread": 2, "device": "gpu", "kv_cache_memory_bytes": "1 parsec"},
            "replica_ports": [0, 31000],
        }
    )
    starts = [problem.partition(":")[0] for problem in problems]
    assert starts == ["modle", "replica_ports.0"]
    problems = problems_in({"modle": "x", "options": {"thread": 2, "max_num_seqs": "x", "port": 1}})
    assert [problem.partition(":")[0] for problem in problems] == [
        "modle",
        "options.thread",
        "options.max_num_seqs",
        "options.port",
    ]
    assert "did you mean 'model'" in problems[0]
    assert "did you mean 'threads'" in problems[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"options": {"api_processes": 2}}, "options.api_processes"),
        ({"options": {"device": "cuda:1"}}, "say cuda"),
        ({"options": {"model": "x"}}, "options.model: give it as args.model"),
        ({"replica_ports": [31001, 31000]}, "replica_ports: the first port is above"),
        ({"options": 3}, "options: Input should be a valid dictionary."),
    ],
)
def test_what_a_replica_cannot_be_is_a_problem(args: dict[str, Any], message: str) -> None:
    (problem,) = problems_in(args)
    assert message in problem


def test_the_schema_of_the_arguments_has_every_option_and_no_other() -> None:
    options = BuildArgs.model_json_schema()["properties"]["options"]
    jsonschema.validate({"threads": 2, "kv_cache_memory_bytes": "1GiB"}, options)
    for wrong in ({"thread": 2}, {"threads": "two"}, {"device": 5}, {"port": 80}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, options)


def test_a_replica_takes_a_port_of_its_range_or_says_that_there_is_none() -> None:
    with listen_in("127.0.0.1", None) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"replica_ports: {port} to {port} are all taken"):
            listen_in("127.0.0.1", (port, port))
        if port < 65535:
            with listen_in("127.0.0.1", (port, 65535)) as other:
                assert other.getsockname()[1] > port
