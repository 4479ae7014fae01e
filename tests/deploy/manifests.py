"""The deployment files of deploy/ as data, for the tests that read them; what is written from code.

`python tests/deploy/manifests.py` (`make manifests`) writes it: the options in the chart's schema,
the Serve config in the RayService and, where helm is found, the chart as plain YAML.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from headrace.config import OptionSpec, option_specs, parse_size

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "headrace"
VALUES_SCHEMA = CHART / "values.schema.json"
PLAIN = ROOT / "deploy" / "kubernetes" / "headrace.yaml"
RAY_SERVICE = ROOT / "deploy" / "kubernetes" / "rayservice.yaml"
SERVE_CONFIG = ROOT / "deploy" / "ray" / "headrace.yaml"
CRD_SCHEMAS = Path(__file__).parent / "crd_schemas.yaml"

SET_BY_THE_CHART = {"host", "port", "served_model_name"}
"""Besides secrets, which belong in Secrets."""

_HEADER = """\
# One model as plain Kubernetes objects, for those without Helm. `make manifests` writes it from
# deploy/helm/headrace with its default values: change those. See docs/kubernetes.md.
"""
_HELMS_OWN = re.compile(
    r"^ *(helm\.sh/chart: .*|app\.kubernetes\.io/managed-by: .*|# Source: .*)\n", re.M
)


def helm() -> str | None:
    """The path of helm: of the environment that `make test-full` sets up, or the user's."""
    return shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Offline. The caller looks at the status."""
    found = helm()
    assert found is not None
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=False)


def rendered(*arguments: str) -> str:
    """The chart with these arguments of `helm template`. AssertionError says what is wrong."""
    done = run_helm("template", "headrace", str(CHART), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """The specification of every pod somewhere in `node`."""
    if isinstance(node, Mapping):
        if isinstance(node.get("containers"), list):
            if "supportedModelFormats" in node:  # a ServingRuntime: a pod's fields among others
                node = {key: node[key] for key in ("containers", "volumes")}
            yield dict(node)
            return
        node = list(node.values())
    if isinstance(node, Sequence) and not isinstance(node, str):
        for item in node:
            yield from pods(item)


def custom_resource_errors(document: Mapping[str, Any]) -> list[str] | None:
    """What is wrong with a custom resource; None for what Kubernetes itself defines."""
    schema = _crd_schemas().get(f"{document['apiVersion']}/{document['kind']}")
    if schema is None:
        return None
    validator = jsonschema.Draft7Validator(_closed(schema))
    return [f"{e.json_path}: {e.message}" for e in validator.iter_errors(document["spec"])]


@cache
def _crd_schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = yaml.safe_load(CRD_SCHEMAS.read_text())
    return schemas


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with unknown fields refused wherever it knows some."""
    if "properties" in schema:
        properties = {name: _closed(inner) for name, inner in schema["properties"].items()}
        schema = {"additionalProperties": False, **schema, "properties": properties}
    if "items" in schema:
        schema = {**schema, "items": _closed(schema["items"])}
    return schema


# --- what is written --------------------------------------------------------------------------


def schema_of_option(spec: OptionSpec) -> dict[str, Any]:
    if spec.is_flag:
        return {"type": "boolean"}
    if spec.choices:
        return {"enum": list(spec.choices)}
    if spec.is_list:
        return {"type": "array", "items": {"type": "string"}}
    if spec.parse is parse_size:
        return {"type": ["integer", "string"]}
    return {"type": {int: "integer", float: "number", str: "string"}[spec.parse]}  # type: ignore[index]


def values_schema(text: str) -> str:
    """`text` with the options that `headrace serve` has."""
    schema = json.loads(text)
    options = {
        spec.name: schema_of_option(spec)
        for spec in option_specs()
        if not spec.secret and spec.name not in SET_BY_THE_CHART
    }
    written = ",\n".join(
        f'        "{name}": {json.dumps(options[name])}' for name in sorted(options)
    )
    head, _, _ = text.partition('\n    "options": {')
    assert schema["definitions"].keys() >= {"options"} and head != text
    return (
        head + '\n    "options": {\n      "type": "object",\n      "additionalProperties": false,\n'
        '      "properties": {\n' + written + "\n      }\n    }\n  }\n}\n"
    )


def ray_service(text: str) -> str:
    """`text` with the Serve config that deploy/ray ships."""
    config = "".join(
        f"    {line}\n" if line else "\n" for line in SERVE_CONFIG.read_text().splitlines()
    )
    head, mark, rest = text.partition("  serveConfigV2: |\n")
    end = re.search(r"^ {0,2}\S", rest, re.M)
    assert mark and end
    return head + mark + config + rest[end.start() :]


def plain(template: str) -> str:
    """What `helm template` prints, without what is Helm's own."""
    return _HEADER + re.sub(
        r"^  namespace: default\n", "", _HELMS_OWN.sub("", template), flags=re.M
    )


def write() -> None:
    VALUES_SCHEMA.write_text(values_schema(VALUES_SCHEMA.read_text()))
    RAY_SERVICE.write_text(ray_service(RAY_SERVICE.read_text()))
    if helm():
        PLAIN.write_text(plain(rendered()))
    else:
        print(f"no helm: {PLAIN.relative_to(ROOT)} stays as it is", file=sys.stderr)


if __name__ == "__main__":
    write()
