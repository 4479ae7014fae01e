"""The files of deploy/ say what the code does: options, paths, switches, metric names, times.

Kubernetes' own schemas and helm are in test_chart.py.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml
from tests.deploy import manifests
from tests.deploy.manifests import ROOT, custom_resource_errors, documents, pods

from headrace import __version__
from headrace.api.health import router
from headrace.api.middleware import OPEN_PATHS
from headrace.cli import _options, _parse
from headrace.config import ServerOptions, load_options
from headrace.deploy.ray_serve import ENGINE_CLOSE_SECONDS
from headrace.deploy.switches import SERVING
from headrace.observability.families import FAMILIES
from headrace.route import waking

FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
USER = 10001
"""Whom the Containerfile makes."""

CHART_VALUES = [manifests.CHART / "values.yaml", *manifests.CHART.glob("ci/*.yaml")]


@cache
def every_document() -> list[dict[str, Any]]:
    """Of deploy/kubernetes. Nobody changes them."""
    return [document for name in FILES for document in documents((FOLDER / name).read_text())]


def every_pod() -> list[dict[str, Any]]:
    return list(pods(every_document()))


def server_pods() -> list[dict[str, Any]]:
    """Those that run `headrace serve`."""
    return [pod for pod in every_pod() if "serve" in pod["containers"][0].get("args", [])]


def predictor() -> dict[str, Any]:
    """What the InferenceService adds to the pod of the ServingRuntime."""
    (found,) = (d for d in every_document() if d["kind"] == "InferenceService")
    spec: dict[str, Any] = found["spec"]["predictor"]
    return spec


def options_of(pod: dict[str, Any]) -> ServerOptions:
    """What the container's arguments mean, a configuration file from its ConfigMap included."""
    arguments = pod["containers"][0]["args"]
    if "--config" in arguments:
        (text,) = (
            document["data"]["serve.yaml"]
            for document in every_document()
            if document["kind"] == "ConfigMap"
        )
        return load_options("", {}, yaml.safe_load(text), {})[1]
    return _options(_parse(arguments))[1]


# --- what is written from code ----------------------------------------------------------------


def test_the_options_in_the_chart_s_schema_are_those_of_headrace_serve() -> None:
    text = manifests.VALUES_SCHEMA.read_text()
    assert text == manifests.values_schema(text), "make manifests"


def test_the_ray_service_serves_what_deploy_ray_ships() -> None:
    text = manifests.RAY_SERVICE.read_text()
    assert text == manifests.ray_service(text), "make manifests"
    (document,) = documents(text)
    shipped = yaml.safe_load(manifests.SERVE_CONFIG.read_text())
    assert yaml.safe_load(document["spec"]["serveConfigV2"]) == shipped


def test_stale_files_are_noticed() -> None:
    schema = manifests.VALUES_SCHEMA.read_text()
    assert manifests.values_schema(schema.replace('"threads"', '"threats"')) == schema
    service = manifests.RAY_SERVICE.read_text()
    assert manifests.ray_service(service.replace("num_replicas: 1", "num_replicas: 7")) == service


# --- values of the chart ----------------------------------------------------------------------


def values_errors(values: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft7Validator(json.loads(manifests.VALUES_SCHEMA.read_text()))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(values)]


@pytest.mark.parametrize("path", CHART_VALUES, ids=lambda path: path.name)
def test_shipped_values_fit_the_schema(path: Any) -> None:
    assert values_errors(yaml.safe_load(path.read_text())) == []


def test_values_and_schema_have_the_same_keys() -> None:
    """A key that is in one of them only is either unchecked or unknown to readers."""
    schema = json.loads(manifests.VALUES_SCHEMA.read_text())
    values = yaml.safe_load((manifests.CHART / "values.yaml").read_text())
    assert schema["properties"].keys() - {"global"} == values.keys()
    model = schema["definitions"]["model"]["properties"].keys()
    assert model - {"name"} == values["modelDefaults"].keys()
    for part in ("image", "door", "service", "networkPolicy", "podMonitor"):
        assert schema["properties"][part]["properties"].keys() == values[part].keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modle": []}, "'modle' was unexpected"),
        ({"models": [{"name": "a", "replicsa": 2}]}, "'replicsa' was unexpected"),
        (
            {"models": [{"name": "a", "options": {"max_num_seq": 8}}]},
            "'max_num_seq' was unexpected",
        ),
        ({"models": [{"name": "a", "options": {"api_key": "k"}}]}, "'api_key' was unexpected"),
        ({"models": [{"name": "a", "options": {"port": 80}}]}, "'port' was unexpected"),
        ({"models": [{"name": "a", "options": {"threads": "2"}}]}, "not of type 'integer'"),
        ({"models": [{"name": "a", "options": {"dtype": "fp7"}}]}, "is not one of"),
        ({"models": [{"name": "Upper"}]}, "does not match"),
        ({"models": [{"name": "door"}]}, "should not be valid"),
        ({"models": [{"replicas": 1}]}, "'name' is a required property"),
        ({"modelDefaults": {"memory": "4gigs"}}, "does not match"),
        ({"door": {"enabled": "yes"}}, "not of type 'boolean'"),
    ],
)
def test_a_typo_in_values_is_refused(change: dict[str, Any], said: str) -> None:
    values = yaml.safe_load((manifests.CHART / "values.yaml").read_text())
    errors = values_errors({**values, **change})
    assert len(errors) >= 1 and said in errors[0]


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((manifests.CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__
    images = [container["image"] for pod in every_pod() for container in pod["containers"]]
    assert images and all(
        re.fullmatch(rf"headrace:{re.escape(__version__)}(-ray)?", image) for image in images
    )


# --- custom resources -------------------------------------------------------------------------


def test_custom_resources_fit_their_schemas() -> None:
    checked = {}
    for document in every_document():
        errors = custom_resource_errors(document)
        if errors is not None:
            checked[document["kind"]] = errors
    kinds = {"RayService", "ServingRuntime", "InferenceService", "LLMInferenceService"}
    assert checked == dict.fromkeys(kinds, [])


@pytest.mark.parametrize("kind", ["RayService", "ServingRuntime", "InferenceService"])
def test_a_typo_in_a_custom_resource_is_noticed(kind: str) -> None:
    document = next(document for document in every_document() if document["kind"] == kind)
    document = copy.deepcopy(document)
    name = next(iter(document["spec"]))
    document["spec"][name + "s"] = document["spec"].pop(name)
    assert custom_resource_errors(document)


# --- the Ray service --------------------------------------------------------------------------


def ray_service() -> dict[str, Any]:
    (document,) = documents(manifests.RAY_SERVICE.read_text())
    spec: dict[str, Any] = document["spec"]
    return spec


def test_every_ray_node_has_the_switches() -> None:
    cluster = ray_service()["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        for switch in SERVING:
            assert environment[switch.name] == switch.value


def test_the_ray_service_asks_for_the_ray_that_is_tested() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert ray_service()["rayClusterConfig"]["rayVersion"] == pins["ray"]


def test_ray_nodes_have_room_and_time_for_their_replicas() -> None:
    spec = ray_service()
    application = yaml.safe_load(spec["serveConfigV2"])["applications"][0]
    options = application["args"]["options"]
    drain = options["shutdown_timeout"] + ENGINE_CLOSE_SECONDS
    assert spec["rayClusterDeletionDelaySeconds"] > drain
    cluster = spec["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > drain
        assert int(pod["containers"][0]["resources"]["requests"]["cpu"]) >= options["threads"]


# --- pods -------------------------------------------------------------------------------------


def test_containers_may_do_nothing_that_serving_does_not_need() -> None:
    everyone = every_pod()
    assert len(everyone) == 5
    for pod in everyone:
        context = pod.get("securityContext", {})
        for container in pod["containers"]:
            own = container["securityContext"]
            both = {**context, **own}
            assert both["runAsNonRoot"] and both["runAsUser"] == USER
            assert both["seccompProfile"] == {"type": "RuntimeDefault"}
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert {"/tmp", "/var/lib/headrace"} <= writable
            names = {mount["name"] for mount in container["volumeMounts"]}
            assert names == {volume["name"] for volume in pod["volumes"]}
            resources = container["resources"]
            assert resources["requests"].keys() >= {"cpu", "memory"}
            assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_probes_ask_paths_that_answer_without_a_key_on_the_port_of_the_server() -> None:
    paths = {route.path for route in router.routes} & OPEN_PATHS
    everyone = server_pods()
    assert len(everyone) == 3
    for pod in everyone:
        (container,) = pod["containers"]
        ports = {port.get("name"): port["containerPort"] for port in container["ports"]}
        assert set(ports.values()) == {options_of(pod).port}
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[name]["httpGet"]
            assert asked["path"] in paths
            assert ports.get(asked["port"], asked["port"]) in ports.values()
        # /health and /readyz answer 503 while the model loads: no reason to start again.
        assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        startup = container["startupProbe"]
        assert startup["httpGet"]["path"] == "/readyz"
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 900


def test_servers_listen_beyond_their_pod_and_say_so_in_json() -> None:
    for pod in server_pods():
        options = options_of(pod)
        assert options.host == "0.0.0.0" and options.log_format == "json"


def test_streams_may_finish_before_a_pod_is_killed() -> None:
    for pod in server_pods():
        grace = {**predictor(), **pod}["terminationGracePeriodSeconds"]
        sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert grace >= sleep + options_of(pod).shutdown_timeout + 15


def test_services_do_not_become_options() -> None:
    """Kubernetes tells pods of a Service NAME as NAME_PORT, and HEADRACE_PORT is an option."""
    for pod in every_pod():
        assert {**predictor(), **pod}["enableServiceLinks"] is False


def test_names_that_kserve_looks_for() -> None:
    names = {
        document["kind"]: next(pods(document))["containers"][0]["name"]
        for document in every_document()
        if document["kind"] in ("ServingRuntime", "LLMInferenceService")
    }
    assert names == {"ServingRuntime": "kserve-container", "LLMInferenceService": "main"}
    (runtime,) = (d for d in every_document() if d["kind"] == "ServingRuntime")
    (isvc,) = (d for d in every_document() if d["kind"] == "InferenceService")
    model = isvc["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    formats = [entry["name"] for entry in runtime["spec"]["supportedModelFormats"]]
    assert model["modelFormat"]["name"] in formats
    annotations = runtime["spec"]["annotations"]
    (pod,) = pods(runtime)
    assert annotations["prometheus.kserve.io/port"] == str(options_of(pod).port)
    assert annotations["prometheus.kserve.io/path"] in OPEN_PATHS


# --- metrics ----------------------------------------------------------------------------------


def test_metric_names_exist() -> None:
    # The queries of the templates have %s for their labels; test_chart.py looks at them rendered.
    texts = [path.read_text() for path in (manifests.CHART / "templates").glob("*.yaml")]
    texts += [(FOLDER / name).read_text() for name in FILES]
    known = {family.full_name: set(family.labels) for family in (*FAMILIES, *waking.FAMILIES)}
    used = [
        found
        for text in texts
        for found in re.findall(r"\b(headrace_[a-z_]+)(?:\{([^}]*)\})?", text)
    ]
    assert len(used) >= 6
    for name, labels in used:
        assert name in known
        # The namespace is the scraper's label.
        assert set(re.findall(r"(\w+)=", labels)) <= known[name] | {"namespace"}


# --- the page ---------------------------------------------------------------------------------


def test_what_the_page_shows_works() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    assert values_errors(yaml.safe_load(example)) == []
    links = re.findall(r"\]\(([^)#]+)\)", page)
    named = re.findall(r"(?:install headrace|kubectl apply -f) (deploy/\S+)", page)
    assert len(links) > 8 and len(named) >= 4
    for path in (*links, *(f"../{name}" for name in named)):
        assert (ROOT / "docs" / path).exists(), path
    arguments = set(re.findall(r"^ARG (\w+)", (ROOT / "Containerfile").read_text(), re.M))
    assert set(re.findall(r"--build-arg (\w+)=", page)) <= arguments
