"""The playground in a real browser, against the real server with the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.e2e.browser import Page, find_browser

if TYPE_CHECKING:
    from tests.e2e.conftest import Server, StartServer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs a browser: apt install chromium"),
]

READY = "document.querySelector('#status').textContent.startsWith('context')"
IDLE = "document.querySelector('#stop').hidden"
LIGHT, DARK = "rgb(246, 248, 249)", "rgb(16, 24, 28)"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    executable = find_browser()
    assert executable is not None
    page = Page(executable, tmp_path / "profile")
    try:
        page.screen(1200, 800)
        yield page
    finally:
        page.close()


@pytest.fixture
def chat(page: Page, server: Server) -> Page:
    page.open(f"{server.url}/")
    page.wait_for(READY)
    return page


def ask(page: Page, prompt: str) -> None:
    page.evaluate("document.querySelector('#prompt').focus()")
    page.type(prompt)
    page.press("Enter", 13, "\r")


def setting(page: Page, selector: str, text: str) -> None:
    page.evaluate(f"document.querySelector({selector!r}).value = {text!r}")


def background(page: Page) -> str:
    color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return color


def test_a_prompt_is_answered_token_by_token(chat: Page, server: Server) -> None:
    assert chat.text("#model option") == server.get("/v1/models").json()["data"][0]["id"]
    setting(chat, "[name=temperature]", "0")
    setting(chat, "[name=max_completion_tokens]", "160")
    setting(chat, "#system", "Be exact.")
    chat.evaluate(
        "window.lengths = new Set(); new MutationObserver(() => lengths.add("
        "document.querySelector('.assistant .text').textContent.length))"
        ".observe(document.querySelector('#log'), {childList: true, subtree: true})"
    )
    prompt = "List three facts about water, then show Python code that prints one of them."
    ask(chat, prompt)
    chat.wait_for("document.querySelector('.assistant .text').textContent.length > 20")
    chat.wait_for("/[1-9]/.test(document.querySelector('#throughput-now').textContent)")
    chat.wait_for(IDLE)
    assert chat.evaluate("lengths.size") > 10, "the text came at once"
    assert json.loads(chat.posts[0]) == {
        "model": "SmolLM2-135M-Instruct",
        "messages": [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": prompt},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_completion_tokens": 160,
    }
    answer = chat.text(".assistant .text")
    assert "water" in answer.lower()
    stats = chat.text(".assistant footer span")
    assert "tokens/s" in stats
    assert chat.evaluate("document.querySelectorAll('.text ol li, .text ul li').length") >= 3
    before = server.wait_idle()["headrace_prompt_tokens_total"]
    ask(chat, "Thanks! Which of them is the most surprising?")
    chat.wait_for("document.querySelectorAll('.assistant footer button').length == 2")
    tokens = server.wait_idle()["headrace_prompt_tokens_total"] - before
    assert tokens > int(stats.split()[0]), "the second prompt lacks the first answer"
    assert chat.problems == []
    assert {url.split("/")[2] for url in chat.requests} == {server.url.split("/")[2]}


def test_picture_under_load(chat: Page, server: Server, request: pytest.FixtureRequest) -> None:
    """Charts move with the requests of others. The README shows the picture."""
    file = request.config.getoption("--screenshot")
    body = {"ignore_eos": True, "prompt": "The river"}
    with ThreadPoolExecutor(5 if file else 3) as pool:
        for number in range(40 if file else 3):
            tokens = 60 + 40 * (number % 7) if file else 300
            pool.submit(server.post, "/v1/completions", {**body, "max_tokens": tokens})
        setting(chat, "[name=temperature]", "0")
        setting(chat, "[name=max_completion_tokens]", "200")
        chat.wait_for("/^[35] [/] 0$/.test(document.querySelector('#queue-now').textContent)")
        chat.wait_for("parseFloat(document.querySelector('#kv-now').textContent) > 0")
        if file:
            chat.evaluate("new Promise(done => setTimeout(done, 18000))")
        ask(chat, "List three facts about water.")
        chat.wait_for(IDLE)
        ask(chat, "Write a Python function that converts Celsius to Kelvin.")
        chat.wait_for(IDLE)
        if file:
            chat.evaluate("document.querySelector('#prompt').blur()")
            Path(file).write_bytes(chat.picture())
    assert chat.evaluate("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('#side'))")
    assert chat.problems == []


def test_stop_copy_and_clear(chat: Page) -> None:
    ask(chat, "Tell a very long story about a river.")
    chat.wait_for("document.querySelector('.assistant .text').textContent.length > 20")
    chat.press("Escape", 27)
    chat.wait_for(IDLE)
    assert "stopped" in chat.text(".assistant footer")
    length = len(chat.text(".assistant .text"))
    chat.evaluate("new Promise(done => setTimeout(done, 500))")
    assert len(chat.text(".assistant .text")) == length
    chat.evaluate(
        "window.copied = new Promise(done => document.addEventListener('copy', () =>"
        " done(getSelection().toString() || document.activeElement.value)));"
        "navigator.clipboard.writeText = () => Promise.reject(new Error('plain HTTP'))"
    )
    chat.click(".assistant footer button")
    assert chat.evaluate("copied") == chat.text(".assistant .text")
    chat.wait_for("document.querySelector('.assistant footer button').textContent === 'Copied'")
    chat.click("#clear")
    assert chat.evaluate("document.querySelectorAll('article').length") == 0
    assert chat.evaluate("document.activeElement.id") == "prompt"
    assert chat.problems == []


def test_errors_are_shown_as_the_server_says_them(chat: Page, server: Server) -> None:
    setting(chat, "[name=temperature]", "-1")
    ask(chat, "Hello")
    chat.wait_for("document.querySelector('.error')")
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": -1}
    said = server.post("/v1/chat/completions", body).json()["error"]
    assert said["message"] in chat.text(".error")
    assert "400" in chat.text(".error small") and "temperature" in chat.text(".error small")
    assert chat.evaluate("document.querySelector('#prompt').value") == "Hello", "to correct it"
    setting(chat, "[name=temperature]", "")
    setting(chat, "#schema", "{")
    chat.press("Enter", 13, "\r")
    chat.wait_for("document.querySelectorAll('.error').length == 2")
    assert "The JSON schema is not JSON" in chat.text(".error")
    assert len(chat.posts) == 1
    setting(chat, "#schema", '{"type": "object"}')
    setting(chat, "[name=max_completion_tokens]", "16")
    chat.press("Enter", 13, "\r")
    chat.wait_for(f"document.querySelectorAll('.user').length == 3 && {IDLE}")
    assert json.loads(chat.posts[1])["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object"}},
    }


def test_what_a_model_writes_is_text(chat: Page) -> None:
    shown = chat.evaluate(
        r"""import("./playground/markdown.js").then(({render}) => {
            const box = document.createElement("div");
            box.append(render("# A <b>b</b>\n<img src=x onerror=alert(1)>\n\n- `x<y` and **z**\n"
              + "- two\n\n3. three\n\n```html\n<script>alert(1)</script>\n\n- no item\n```\nend"));
            return box.innerHTML;
        })"""
    )
    assert shown == (
        "<h3>A &lt;b&gt;b&lt;/b&gt;</h3><p>&lt;img src=x onerror=alert(1)&gt;</p>"
        "<ul><li><code>x&lt;y</code> and <strong>z</strong></li><li>two</li></ul>"
        '<ol start="3"><li>three</li></ol>'
        '<pre tabindex="0"><code>&lt;script&gt;alert(1)&lt;/script&gt;\n\n- no item</code></pre>'
        "<p>end</p>"
    )
    assert chat.problems == []


def test_phone_in_the_dark(chat: Page) -> None:
    assert background(chat) == LIGHT
    chat.screen(390, 700, mobile=True, dark=True)
    assert background(chat) == DARK
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert chat.evaluate(fits) and chat.evaluate("innerWidth") == 390
    picker = "document.querySelector('#model').getBoundingClientRect().width"
    assert chat.evaluate(picker) > 120
    hidden = "getComputedStyle(document.querySelector('#side')).display === 'none'"
    assert chat.evaluate(hidden)
    chat.click("#toggle")
    assert not chat.evaluate(hidden) and chat.evaluate(fits)
    chat.wait_for("document.querySelector('#throughput').width > 300")  # drawn again
    chat.click("#toggle")
    assert chat.evaluate(hidden)
    setting(chat, "[name=max_completion_tokens]", "8")
    chat.click("#prompt")
    chat.type("Say hello.")
    chat.click("#send")
    chat.wait_for("document.querySelector('.assistant footer button')")
    assert chat.evaluate(fits) and chat.problems == []


def test_all_controls_are_named_and_reached_by_keyboard(chat: Page) -> None:
    seen: list[str] = []
    for _ in range(25):
        chat.press("Tab", 9)
        seen.append(chat.evaluate("(e => e.id || e.name || e.tagName)(document.activeElement)"))
    controls = chat.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')]"
        ".filter(e => e.checkVisibility()).map(e => e.id || e.name)"
    )
    assert len(controls) > 10 and set(controls) <= set(seen)
    unnamed = chat.evaluate(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".filter(e => !e.labels.length).map(e => e.id || e.name)"
    )
    assert unnamed == []


def test_a_key_is_asked_for_and_kept(
    page: Page, start_server: StartServer, tiny_model: Path
) -> None:
    server = start_server(tiny_model, "--threads", "1", "--api-key", "secret")
    page.open(f"{server.url}/")
    page.wait_for("document.querySelector('#status').textContent.includes('API key')")
    page.click("#key")
    page.type("secret")
    page.press("Tab", 9)
    page.wait_for(READY)
    page.open(f"{server.url}/?again")
    page.wait_for(READY)
