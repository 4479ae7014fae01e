"""Probes, models, metrics, keys, headers, and the tokenizer's routes."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from typing import Any

import httpx
import pytest

from headrace.engine.client import EngineState

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


async def statuses(http: httpx.AsyncClient) -> dict[str, int]:
    paths = ("/livez", "/readyz", "/health")
    return {path: (await http.get(path)).status_code for path in paths}


async def test_ready(http: httpx.AsyncClient) -> None:
    assert await statuses(http) == {"/livez": 200, "/readyz": 200, "/health": 200}
    assert (await http.get("/readyz")).json() == {"status": "ready"}
    live = (await http.get("/livez")).json()
    assert live["engines"]["org/tiny"] == {
        "state": "ready",
        "step_age_seconds": 0.0,
        "restarts": 0,
    }


async def test_loading_is_alive_but_not_ready(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.state, site.engine.loaded, site.model.text = EngineState.LOADING, False, None
    assert await statuses(http) == {"/livez": 200, "/readyz": 503, "/health": 503}
    response = await http.post(CHAT, json={"messages": MESSAGES})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert "still loading" in response.json()["error"]["message"]
    assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_an_engine_without_its_text_is_not_ready(http: httpx.AsyncClient, site: Any) -> None:
    site.model.text = None
    assert (await http.get("/readyz")).json() == {"status": "loading"}


async def test_restarting_is_alive_but_not_ready(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.state = EngineState.RESTARTING
    assert await statuses(http) == {"/livez": 200, "/readyz": 503, "/health": 503}


async def test_dead_or_stuck_is_not_alive(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.last_seen_age = 61.0
    response = await http.get("/livez")
    assert response.status_code == 503
    assert response.json()["engines"]["org/tiny"]["state"] == "stuck"
    site.engine.last_seen_age, site.engine.state = 0.0, EngineState.DEAD
    assert await statuses(http) == {"/livez": 503, "/readyz": 503, "/health": 503}


async def test_draining_is_alive_but_not_ready(http: httpx.AsyncClient, site: Any) -> None:
    site.services.draining = True
    assert await statuses(http) == {"/livez": 200, "/readyz": 503, "/health": 503}
    response = await http.post(CHAT, json={"messages": MESSAGES})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1


async def test_version(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": "1.2.3"}


async def test_models(http: httpx.AsyncClient) -> None:
    listing = (await http.get("/v1/models")).json()
    assert listing["object"] == "list"
    assert [card["id"] for card in listing["data"]] == ["org/tiny", "tiny"]
    card = (await http.get("/v1/models/org/tiny")).json()
    engine = card.pop("engine")
    assert card == listing["data"][0]
    assert (engine["device"], engine["block_size"]) == ("cpu", 16)
    assert card["object"] == "model"
    assert card["max_model_len"] == 512
    assert card["digest"] == "sha256:0123456789abcdef0123456789abcdef"
    assert (await http.get("/v1/models/tiny")).json()["root"] == "org/tiny"


async def test_metrics(http: httpx.AsyncClient, site: Any) -> None:
    await http.post(CHAT, json={"messages": MESSAGES})
    response = await http.get("/metrics")
    assert response.headers["content-type"] == site.metrics.content_type
    assert "headrace_time_to_first_token_seconds_count" in response.text
    await http.get("/v1/models/org/tiny")
    await http.get("/nope")
    counted = {"method": "GET", "model_name": "org/tiny"}
    for route, status in (("/v1/models/{model_id:path}", "200"), ("unmatched", "404")):
        labels = {"method": "GET", "route": route, "status": status}
        values = [
            sample.value
            for family in site.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "headrace_http_requests_total"
            and labels.items() <= sample.labels.items()
        ]
        assert values == [1.0], (route, counted)


async def test_the_account_of_a_request(http: httpx.AsyncClient, site: Any) -> None:
    await http.post(CHAT, json={"messages": MESSAGES})
    await site.settle()
    labels = {"model_name": "org/tiny"}
    assert site.metric("requests_accepted_total", **labels) == 1
    assert site.finished("stop") == 1
    assert site.metric("generation_tokens_total", **labels) == 14
    assert site.metric("inter_token_latency_seconds_count", **labels) == 13
    assert site.metric("time_to_first_token_seconds_count", **labels) == 1


KEYED = [
    ("GET", "/v1/models"),
    ("POST", CHAT),
    ("POST", "/tokenize"),
    ("POST", "/apply-template"),
    ("POST", "/reset_prefix_cache"),
    ("GET", "/server_info"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
]


@pytest.mark.parametrize(("method", "path"), KEYED)
async def test_a_key_is_needed(site_with: Any, http_to: Any, method: str, path: str) -> None:
    async with http_to(site_with(api_keys=("sesame", "second"))) as http:
        for header in (
            None,
            "Bearer wrong",
            "sesame",
            "Basic sesame",
            "Bearer ",
            "Bearer s\xe9same",
        ):
            headers = {} if header is None else {"authorization": header.encode("latin-1")}
            response = await http.request(method, path, headers=headers)
            assert response.status_code == 401, header
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("sesame", "second"):
            response = await http.request(method, path, headers={"authorization": f"Bearer {key}"})
            assert response.status_code != 401


async def test_probes_need_no_key(site_with: Any, http_to: Any) -> None:
    async with http_to(site_with(api_keys=("sesame",))) as http:
        for path in ("/livez", "/readyz", "/health", "/version", "/metrics"):
            assert (await http.get(path)).status_code == 200


async def test_request_ids_are_echoed_or_made(http: httpx.AsyncClient) -> None:
    given = await http.get("/version", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = {(await http.get("/version")).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    for bad in ("a b", "x" * 129, "a;b"):
        answer = await http.get("/version", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"] != bad
    assert int(given.headers["openai-processing-ms"]) >= 0


async def test_the_same_request_id_may_come_twice(http: httpx.AsyncClient, site: Any) -> None:
    for _ in range(2):
        response = await http.post(
            CHAT, json={"messages": MESSAGES}, headers={"x-request-id": "same"}
        )
        assert response.status_code == 200
    assert len({request.request_id for request in site.engine.requests}) == 2


async def test_other_origins_are_refused_unless_allowed(
    http: httpx.AsyncClient, site_with: Any, http_to: Any
) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed = await http.options(CHAT, headers=headers)
    assert "access-control-allow-origin" not in closed.headers
    site = site_with(cors_origins=("https://a.example",), api_keys=("sesame",))
    async with http_to(site) as allowed:
        response = await allowed.options(CHAT, headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        # A page may read what it was refused for, and the headers that tell of a request.
        refused = await allowed.get("/v1/models", headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        exposed = refused.headers["access-control-expose-headers"]
        assert {"x-request-id", "headrace-sampling"} <= set(exposed.split(", "))
        stranger = await allowed.get("/livez", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in stranger.headers


async def test_tokenize_and_back(http: httpx.AsyncClient, site: Any) -> None:
    answer = (await http.post("/tokenize", json={"prompt": "bcd", "model": "tiny"})).json()
    assert answer == {"count": 3, "max_model_len": 512, "tokens": [65, 66, 67], "token_strs": None}
    back = await http.post("/detokenize", json={"tokens": [65, 66, 67]})
    assert back.json() == {"prompt": "bcd"}
    body = {"messages": MESSAGES, "return_token_strs": True}
    chat = (await http.post("/tokenize", json=body)).json()
    assert chat["token_strs"][0] == "<|im_start|>"
    await http.post(CHAT, json={"messages": MESSAGES})
    assert chat["tokens"] == site.engine.requests[0].prompt_token_ids


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
    ],
)
async def test_bad_tokenizer_requests(
    http: httpx.AsyncClient, path: str, body: Any, param: str
) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_tokenize_takes_an_empty_prompt(http: httpx.AsyncClient) -> None:
    assert (await http.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []


async def test_tokenizer_info(http: httpx.AsyncClient) -> None:
    info = (await http.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert info["vocab_size"] == 259
    assert info["chat_template"].startswith("{% for message")


async def test_messages_as_the_template_writes_them(http: httpx.AsyncClient, site: Any) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "model": "tiny"}
    opened = (await http.post("/apply-template", json=body)).json()
    assert opened == {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}
    closed = await http.post("/apply-template", json={**body, "add_generation_prompt": False})
    assert closed.json() == {"prompt": "<|im_start|>user\nHi<|im_end|>\n"}
    continued = await http.post("/apply-template", json={**body, "continue_final_message": True})
    assert continued.json() == {"prompt": "<|im_start|>user\nHi"}
    assert site.engine.requests == []
    for wrong, param in (({}, "messages"), ({**body, "model": "nope"}, "model")):
        response = await http.post("/apply-template", json=wrong)
        assert response.status_code in (400, 404)
        assert response.json()["error"]["param"] == param


async def test_server_info(site_with: Any, http_to: Any) -> None:
    site = site_with(api_keys=("sesame",), max_body_bytes=1000)
    async with http_to(site) as http:
        response = await http.get("/server_info", headers={"authorization": "Bearer sesame"})
    assert "sesame" not in response.text
    info = response.json()
    assert (info["version"], info["draining"]) == ("1.2.3", False)
    assert (info["api"]["api_key_required"], info["api"]["max_body_bytes"]) == (True, 1000)
    [model] = info["models"]
    assert (model["name"], model["aliases"], model["state"]) == ("org/tiny", ["tiny"], "ready")
    assert model["engine"]["max_model_len"] == 512
    assert model["stats"]["running"] == 0


async def test_server_info_while_loading(http: httpx.AsyncClient, site: Any) -> None:
    site.engine.state, site.engine.loaded = EngineState.LOADING, False
    [model] = (await http.get("/server_info")).json()["models"]
    assert (model["state"], model["engine"]) == ("loading", None)


async def test_the_prefix_cache_is_reset_when_idle(http: httpx.AsyncClient, site: Any) -> None:
    assert (await http.post("/reset_prefix_cache")).json() == {"reset": True}
    site.engine.hold = True
    running = asyncio.create_task(http.post(CHAT, json={"messages": MESSAGES}))
    while not site.engine.requests:
        await asyncio.sleep(0.005)
    response = await http.post("/reset_prefix_cache")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "requests are running" in response.json()["error"]["message"]
    site.engine.hold = False
    await running
    assert (await http.get("/reset_prefix_cache")).status_code == 405


async def test_the_docs_load_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    page = (await http.get("/docs")).text
    assert "://" not in page.replace(f"{http.base_url}", "")
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(links) == 3
    for link in links:
        asset = await http.get(link)
        assert asset.status_code == 200 and len(asset.content) > 1000, link
    assert "/openapi.json" in page
    for name in ("nope.js", "..%2f__init__.py", "redoc.standalone.js"):
        assert (await http.get(f"/docs/assets/{name}")).status_code == 404
    assert (await http.get("/redoc")).status_code == 404


def test_importing_the_app_loads_nothing_heavy() -> None:
    code = (
        "import sys, headrace.api.app\n"
        "heavy = {'torch', 'triton', 'ray', 'transformers', 'pydantic.v1'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    path = ":".join(path for path in sys.path if path.endswith(("server", "kernels")))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
