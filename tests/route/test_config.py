"""The door's configuration: what is taken, and how what is wrong is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.errors import ConfigError
from headrace.route.config import parse_config, targets

REPLICAS = {"replicas": ["http://10.0.0.1:8000"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no models"),
        ({"modles": {}}, "unknown key 'modles'; did you mean 'models'?"),
        ({"models": {"a": {"replica": []}}}, "did you mean 'replicas'?"),
        ({"models": {"a": {**REPLICAS, "canary": [{"wieght": 1}]}}}, "did you mean 'weight'?"),
        ({"models": {"a": {**REPLICAS, "wake": {"que": 1}}}}, "did you mean 'queue'?"),
        ({"models": {"a": {}}}, "'a' needs one of"),
        ({"models": {"a": {**REPLICAS, "application": "b"}}}, "'b' needs one of"),
        ({"models": {"a": {"replicas": ["https://x"]}}}, "must be http://HOST:PORT"),
        ({"models": {"a": {"replicas": ["http://x:port"]}}}, "must be http://HOST:PORT"),
        ({"models": {"a": REPLICAS}, "port": "http"}, "port: expected `int`, got `str`"),
        ({"models": {"a": REPLICAS}, "default": "b"}, "no model 'b'"),
        ({"models": {"a": {**REPLICAS, "aliases": ["a"]}}}, "'a' is taken"),
        ({"models": {"a": REPLICAS}, "processes": 0}, "processes must be"),
        ({"models": {"a": REPLICAS}, "max_body_bytes": "many"}, "max_body_bytes"),
        (
            {"models": {"a": {**REPLICAS, "canary": [{"application": "b", "weight": 2}]}}},
            "canary weights of 'a'",
        ),
        (
            {"models": {"a": {**REPLICAS, "shadow": {"application": "b", "share": 2}}}},
            "models.a.shadow.share",
        ),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(content, origin="route.yaml")
    assert message in raised.value.message and raised.value.message.startswith("route.yaml: ")


def test_the_example_of_the_page_is_taken() -> None:
    page = (Path(__file__).parents[2] / "docs" / "route.md").read_text()
    block = page.partition("```yaml\n")[2].partition("```")[0]
    config = parse_config(yaml.safe_load(block), origin="docs/route.md")
    assert [target.name for target in targets(config)] == [
        *("llama", "llama-next", "llama-int8", "qwen"),
    ]
    assert config.models["llama"].canary[0].weight == 0.05
    wake = config.models["qwen"].wake
    assert wake is not None and wake.queue == 100
    assert config.ray is not None and config.default_model == "llama"
