"""The page at /: what it is made of is there, open, and talks to nobody else."""

from __future__ import annotations

import re
from typing import Any

import httpx

from headrace.api import playground

REFERENCES = re.compile(
    r"""(?:\b(?:src|href)=|\bfrom\s+|\bimport\(|\burl\(|\bfetch\(|\bask\()["']([^"']+)"""
)


async def test_the_page_and_its_files(http: httpx.AsyncClient) -> None:
    types = {"html", "css", "javascript", "svg+xml"}
    for path in playground.PATHS:
        response = await http.get(path)
        assert response.status_code == 200, path
        assert response.headers["content-type"].split(";")[0].partition("/")[2] in types
        assert response.headers["x-content-type-options"] == "nosniff"
    assert "<title>Headrace playground</title>" in (await http.get("/")).text


async def test_the_policy_allows_only_this_server(http: httpx.AsyncClient) -> None:
    policy = (await http.get("/")).headers["content-security-policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives.pop("default-src") == "'none'"
    assert set(directives.values()) == {"'self'", "'none'"}
    assert directives["connect-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"


async def test_every_reference_leads_to_this_server(http: httpx.AsyncClient, site: Any) -> None:
    """A page behind a prefix works too: references are relative."""
    found = set()
    for path in playground.PATHS:
        for reference in REFERENCES.findall((await http.get(path)).text):
            assert not reference.startswith("/") and ":" not in reference, (path, reference)
            # Modules are resolved against their own file, all else against the page.
            target = str(httpx.URL(path if reference.startswith(".") else "/").join(reference))
            found.add(target)
            if target != "/v1/chat/completions":
                assert (await http.get(target)).status_code == 200, (path, reference)
    assert playground.PATHS - {"/"} <= found
    assert {"/v1/models", "/v1/chat/completions", "/metrics"} <= found


async def test_the_page_needs_no_key_but_its_requests_do(site_with: Any, http_to: Any) -> None:
    async with http_to(site_with(api_keys=("secret",))) as http:
        for path in playground.PATHS:
            assert (await http.get(path)).status_code == 200
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/playground/")).status_code == 401


async def test_nothing_but_its_files_is_served(http: httpx.AsyncClient) -> None:
    for path in ("/playground/", "/playground/index.html", "/playground/../playground.py"):
        assert (await http.get(path)).status_code == 404
    assert (await http.post("/")).status_code == 405


def test_no_script_makes_html_of_text() -> None:
    """What a model writes becomes text nodes: no script has a way to parse HTML."""
    scripts = [name for name, _ in playground._FILES.values() if name.endswith(".js")]
    for name in scripts:
        code = playground._content(name).decode()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", code)


async def test_metrics_that_the_charts_read_exist(http: httpx.AsyncClient) -> None:
    names = re.findall(r"\bof\(\"(\w+)\"\)", playground._content("charts.js").decode())
    exposition = (await http.get("/metrics")).text
    assert len(names) == 4
    for name in names:
        assert f"\nheadrace_{name}{{" in exposition
