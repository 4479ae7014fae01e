"""The Helm chart through helm itself, and every manifest through Kubernetes' own schemas.

`make test-full` installs both tools; without them these tests are skipped. No cluster is asked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy import manifests
from tests.deploy.manifests import CHART, ROOT, custom_resource_errors, documents, pods

from headrace.cli import _parse
from headrace.config import door_api_key, load_options, ray_auth_token
from headrace.route.asked import OPEN_PATHS
from headrace.route.config import parse_config

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="pip install -c constraints.txt 'headrace[manifests]'"
)
needs_helm = pytest.mark.skipif(manifests.helm() is None, reason="no helm: make test-full gets it")
pytestmark = pytest.mark.slow

KUBERNETES = "1.37.0"
CLUSTER = CHART / "ci" / "cluster-values.yaml"
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "cluster": ("--values", str(CLUSTER)),
    "without": ("--set", "networkPolicy.enabled=false,modelDefaults.spread=false"),
    "ray": ("--values", str(CHART / "ci" / "ray-door-values.yaml")),
    "small door": ("--set", "door.enabled=true,door.replicas=1,podMonitor.enabled=true"),
}


def errors_of(document: dict[str, Any]) -> list[str]:
    """What Kubernetes or the owner of a custom resource would refuse."""
    errors = custom_resource_errors(document)
    if errors is None:
        return kubernetes_errors(document)
    for pod in pods(document):
        wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        errors += kubernetes_errors(wrapped)
    return errors


def kubernetes_errors(document: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{document['kind']}: {error.message}"]
    return []


def cluster() -> list[dict[str, Any]]:
    return documents(manifests.rendered(*VARIANTS["cluster"]))


def one(of: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (d for d in of if d["kind"] == kind and d["metadata"]["name"] == name)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")), ids=str)
def test_plain_manifests_are_valid(path: Path) -> None:
    for document in documents(path.read_text()):
        assert errors_of(document) == []


@needs_helm
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chart_is_valid(variant: str) -> None:
    lint = manifests.run_helm("lint", "--strict", str(CHART), *VARIANTS[variant])
    assert lint.returncode == 0, lint.stdout + lint.stderr
    found = documents(manifests.rendered(*VARIANTS[variant]))
    assert {document["kind"] for document in found} >= {"Deployment", "Service", "ConfigMap"}
    for document in found:
        assert errors_of(document) == []


@needs_helm
def test_wrong_manifests_are_noticed() -> None:
    deployment = one(cluster(), "Deployment", "headrace-qwen")
    deployment["spec"]["template"]["spec"]["containers"][0]["reedinessProbe"] = {}
    assert "reedinessProbe" in errors_of(deployment)[0]
    scaled = one(cluster(), "ScaledObject", "headrace-qwen")
    scaled["spec"]["maxReplicas"] = 3
    assert "maxReplicas" in errors_of(scaled)[0]


@needs_helm
def test_the_plain_manifest_is_the_chart_with_its_defaults() -> None:
    assert manifests.PLAIN.read_text() == manifests.plain(manifests.rendered()), "make manifests"


@needs_helm
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("modle=x", "modle"),
        ("modelDefaults.options.shutdown_timout=3", "shutdown_timout"),
        ("models[0].name=a,models[0].replicsa=2", "replicsa"),
        ("models[0].name=a,models[1].name=a", "two called a"),
        (
            "modelDefaults.autoscaling.minReplicas=0,modelDefaults.autoscaling.kind=keda",
            "must wait",
        ),
        ("door.enabled=true,door.models.nobody.aliases[0]=x", "door.models.nobody: no such model"),
    ],
)
def test_a_typo_ends_the_installation(setting: str, said: str) -> None:
    done = manifests.run_helm("template", "x", str(CHART), "--set", setting)
    assert done.returncode != 0 and said in done.stderr


@needs_helm
def test_names_that_would_be_cut_are_refused() -> None:
    done = manifests.run_helm("template", "x" * 45, str(CHART))
    assert done.returncode != 0 and "longer than 52 characters" in done.stderr


@needs_helm
def test_nothing_to_serve_is_refused() -> None:
    done = manifests.run_helm("template", "x", str(CHART), "--set-json", "models=[]")
    assert done.returncode != 0 and "models: name at least one" in done.stderr


@needs_helm
def test_options_reach_the_server_as_they_were_written() -> None:
    """Helm reads every number as a float."""
    text = one(cluster(), "ConfigMap", "headrace-qwen")["data"]["serve.yaml"]
    engine, server, _ = load_options("", {}, yaml.safe_load(text), {})
    assert engine.model == "/models/Qwen2.5-7B-Instruct"
    assert engine.device.device == "cuda" and engine.device.threads is None
    assert engine.model_options.max_model_len == 32768
    assert server.max_queued_tokens == 4_000_000 and server.shutdown_timeout == 120
    assert server.served_model_name == ("Qwen/Qwen2.5-7B-Instruct", "qwen")
    assert (server.host, server.port, server.log_format) == ("0.0.0.0", 8000, "json")
    text = one(cluster(), "ConfigMap", "headrace-smollm2")["data"]["serve.yaml"]
    engine, _, _ = load_options("", {}, yaml.safe_load(text), {})
    assert engine.device.device == "auto" and engine.device.threads == 2


@needs_helm
def test_a_model_gets_its_gpu_its_time_and_its_secrets() -> None:
    spec = one(cluster(), "Deployment", "headrace-qwen")["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "48Gi", "nvidia.com/gpu": 1}
    assert pod["terminationGracePeriodSeconds"] == 5 + 120 + 15
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert "replicas" not in spec, "the autoscaler's"
    environment = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"]}
    assert environment == {
        "HEADRACE_API_KEY": {"name": "headrace-keys", "key": "api-key"},
        "HEADRACE_PREFIX_CACHE_KEY": {"name": "headrace-keys", "key": "prefix-cache-key"},
        "HF_TOKEN": {"name": "hub", "key": "token"},
    }
    load_options("", {}, {}, {name: "x" for name in environment})


@needs_helm
def test_only_the_door_reaches_the_replicas_behind_it() -> None:
    policy = one(cluster(), "NetworkPolicy", "headrace-model")["spec"]
    peers = policy["ingress"][0]["from"]
    assert peers[0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "door"
    assert {"podSelector": {}} not in peers
    egress = {port["port"] for rule in policy["egress"] for port in rule.get("ports", [])}
    assert egress == {53}, "no hub"


@needs_helm
def test_selectors_find_the_pods_they_mean() -> None:
    found = cluster()
    labels = {
        d["metadata"]["name"]: d["spec"]["template"]["metadata"]["labels"]
        for d in found
        if d["kind"] == "Deployment"
    }
    for document in found:
        spec = document.get("spec", {})
        selector = spec.get("selector", {})
        selector = selector.get("matchLabels", selector)
        if not selector or document["kind"] == "PodMonitor":
            continue
        meant = [name for name, own in labels.items() if selector.items() <= own.items()]
        assert meant == [document["metadata"]["name"].removesuffix("-replicas")]
    monitor = one(found, "PodMonitor", "headrace")["spec"]
    assert all(monitor["selector"]["matchLabels"].items() <= own.items() for own in labels.values())
    scalers = [d for d in found if d["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert len(scalers) == 3
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == scaler["metadata"]["name"]
        assert scaler["metadata"]["name"] in labels


@needs_helm
def test_the_door_s_configuration_names_the_services_of_the_models() -> None:
    found = cluster()
    text = one(found, "ConfigMap", "headrace-door")["data"]["door.yaml"]
    config = parse_config(yaml.safe_load(text), origin="door.yaml")
    assert (config.host, config.port, config.log_format) == ("0.0.0.0", 8000, "json")
    models = {name: (it.service, it.aliases) for name, it in config.models.items()}
    assert models == {
        "Qwen/Qwen2.5-7B-Instruct": ("http://headrace-qwen-replicas:8000", ("qwen",)),
        "smollm2": ("http://headrace-smollm2-replicas:8000", ("default",)),
        "seldom": ("http://headrace-seldom-replicas:8000", ()),
    }
    for name in ("headrace-qwen-replicas", "headrace-smollm2-replicas"):
        service = one(found, "Service", name)["spec"]
        assert service["clusterIP"] == "None" and service["ports"][0]["port"] == 8000


@needs_helm
def test_the_door_is_started_and_asked_as_it_can_be() -> None:
    found = cluster()
    pod = one(found, "Deployment", "headrace-door")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = _parse(container["args"])
    assert args.config == "/etc/headrace/door.yaml"
    (key,) = container["env"]  # a command line is for everybody to read
    assert args.api_key is None and door_api_key({key["name"]: "k"}) == "k"
    text = one(found, "ConfigMap", "headrace-door")["data"]["door.yaml"]
    drain = parse_config(yaml.safe_load(text), origin="door.yaml").shutdown_timeout
    assert pod["terminationGracePeriodSeconds"] >= drain + 10
    assert "startupProbe" not in container, "it would end a door that waits for models"
    for name in ("livenessProbe", "readinessProbe"):
        assert container[name]["httpGet"]["path"] in OPEN_PATHS


@needs_helm
def test_a_model_that_sleeps_is_woken_by_what_waits_at_the_door() -> None:
    found = cluster()
    text = one(found, "ConfigMap", "headrace-door")["data"]["door.yaml"]
    models = parse_config(yaml.safe_load(text), origin="door.yaml").models
    assert [name for name, it in models.items() if it.wake is not None] == ["seldom"]
    wake = models["seldom"].wake
    assert wake is not None and wake.deadline_s == 900, "what loading may take"
    scaled = one(found, "ScaledObject", "headrace-seldom")["spec"]
    assert scaled["minReplicaCount"] == 0
    page = (ROOT / "docs" / "autoscaling.md").read_text()
    (example,) = re.findall(r"```yaml\n(apiVersion: keda.*?)```", page, re.S)
    shown = yaml.safe_load(example)["spec"]["triggers"]
    assert [questions(trigger) for trigger in scaled["triggers"]] == [questions(t) for t in shown]
    fast = one(found, "ScaledObject", "headrace-qwen")["spec"]["triggers"]
    thresholds = {trigger["name"]: float(trigger["metadata"]["threshold"]) for trigger in fast}
    assert thresholds == {
        "prefill": 0.7,
        "wait": 0.5,
        "tpot": pytest.approx(0.04),
        "kv-cache": 0.8,
    }


def questions(trigger: dict[str, Any]) -> tuple[str, str, float]:
    """Name, query without the names in it, and threshold of a trigger."""
    query = re.sub(r'(namespace|model_name)="[^"]*",?', "", trigger["metadata"]["query"])
    return trigger["name"], re.sub(r"\s", "", query), float(trigger["metadata"]["threshold"])


@needs_helm
def test_the_alerts_know_the_scraped_job() -> None:
    monitor = one(cluster(), "PodMonitor", "headrace")["spec"]
    (label,) = (monitor["jobLabel"],)
    jobs = {
        d["spec"]["template"]["metadata"]["labels"][label]
        for d in cluster()
        if d["kind"] == "Deployment"
    }
    alerts = (ROOT / "deploy" / "prometheus" / "headrace-alerts.yaml").read_text()
    (pattern,) = set(re.findall(r'job=~"([^"]+)"', alerts))
    assert jobs and all(re.fullmatch(pattern, job) for job in jobs)


@needs_helm
def test_a_door_may_stand_before_ray_alone() -> None:
    found = documents(manifests.rendered(*VARIANTS["ray"]))
    assert [d["metadata"]["name"] for d in found if d["kind"] == "Deployment"] == ["headrace-door"]
    text = one(found, "ConfigMap", "headrace-door")["data"]["door.yaml"]
    config = parse_config(yaml.safe_load(text), origin="door.yaml")
    (application,) = (it.application for it in config.models.values())
    assert (
        application == yaml.safe_load(manifests.SERVE_CONFIG.read_text())["applications"][0]["name"]
    )
    assert config.ray is not None and config.ray.address == "ray://headrace-head-svc:10001"
    (pod,) = pods(found)
    environment = {e["name"]: e["valueFrom"] for e in pod["containers"][0]["env"]}
    assert environment == {
        "RAY_AUTH_TOKEN": {"secretKeyRef": {"name": "ray-token", "key": "auth_token"}}
    }
    assert ray_auth_token({"RAY_AUTH_TOKEN": "x"}) == "x"
    egress = one(found, "NetworkPolicy", "headrace-door")["spec"]["egress"]
    assert any("ray.io/cluster" in str(rule) for rule in egress)
