"""`headrace chat` against a scripted server: what it sends, what it shows, what it survives."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from headrace.chat import AnswerError, Server, Terminal, run
from headrace.cli import main
from headrace.config import openai_api_key
from headrace.errors import ConfigError, EngineError

USAGE = {"choices": [], "usage": {"completion_tokens": 7}}


class Handler(BaseHTTPRequestHandler):
    """Answers as `server.script` says: (status, body) or a list of events."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), None))  # type: ignore[attr-defined]
        self._answer(200, json.dumps(self.server.listing).encode())  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        script = self.server.script  # type: ignore[attr-defined]
        if isinstance(script, tuple):
            self._answer(*script)
            return
        events = [data if isinstance(data, bytes) else json.dumps(data).encode() for data in script]
        self._answer(200, b"".join(b"data: %s\n\n" % event for event in events))

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def scripted() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.script = [], text_events("Hello")
    server.listing = {"object": "list", "data": [{"id": "first"}, {"id": "second"}]}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def text_events(*pieces: str) -> list[Any]:
    deltas = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    return [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, *deltas, end, b"[DONE]"]


def talk(scripted: Any, *lines: str | type[BaseException], api_key: str | None = None) -> str:
    """What the terminal shows when these lines are typed; an exception is raised in their place."""
    typed = iter(lines)

    def read_line(prompt: str) -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    console = Console(file=io.StringIO(), width=200)
    server = Server(scripted.url, api_key)
    try:
        Terminal(server, "first", console, read_line).run()
    finally:
        server.close()
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def bodies(scripted: Any) -> list[dict[str, Any]]:
    return [body for _, _, body in scripted.seen if body is not None]


def test_an_answer_and_the_history(scripted: Any) -> None:
    scripted.script = [*text_events("Hel", "lo ", "there")[:-1], USAGE, b"[DONE]"]
    shown = talk(scripted, "Hi", "/system Be brief.", "Again \\", "please", api_key="secret")
    assert shown.startswith("Hello there\n7 tokens")
    assert "first after 0." in shown
    first, second = bodies(scripted)
    assert first == {
        "model": "first",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert second["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "Again \nplease"},
    ]
    path, headers, _ = scripted.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"


def test_set_and_clear(scripted: Any) -> None:
    shown = talk(
        scripted,
        "/set temperature 0.5",
        "/set stop END",
        '/set logit_bias {"5": 1}',
        "/set stop",
        "/set stream false",
        "Hi",
        "/clear",
        "/set",
        "Ho",
        "/exit",
        "never read",
    )
    assert 'temperature = 0.5\nlogit_bias = {"5": 1}\n' in shown
    assert "stream is not to be set here" in shown
    first, second = bodies(scripted)
    assert first["temperature"] == 0.5 and first["logit_bias"] == {"5": 1}
    assert first["stream"] is True and "stop" not in first
    assert [message["content"] for message in second["messages"]] == ["Ho"]


def test_commands_that_are_none(scripted: Any) -> None:
    shown = talk(scripted, "/sytem x", "/help", "", "//etc is a folder")
    assert "did you mean 'system'?" in shown
    assert "/set NAME VALUE" in shown
    assert [body["messages"][0]["content"] for body in bodies(scripted)] == ["/etc is a folder"]


def test_a_refusal_is_shown_and_forgotten(scripted: Any) -> None:
    error = {"message": "No such thing.", "code": "bad", "param": "top_k", "type": "x"}
    scripted.script = (400, json.dumps({"error": error}).encode())
    shown = talk(scripted, "Hi", "Ho")
    assert shown.count("No such thing. (400, bad, field top_k)\n") == 2
    assert [message["content"] for message in bodies(scripted)[1]["messages"]] == ["Ho"]


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ((502, b"<html>Bad gateway"), "<html>Bad gateway (502)"),
        ((200, b'{"choices": []}'), "sent no stream"),
        ([b"not json"], "not one of chat completions"),
        ([b'"text"'], "not one of chat completions"),
        ([b'{"choices": [7]}'], "not one of chat completions"),
        ([{"error": {"message": "Engine lost.", "code": "internal"}}], "Engine lost. (internal)"),
    ],
)
def test_what_a_server_may_send_instead(scripted: Any, script: Any, shown: str) -> None:
    scripted.script = script
    assert shown in talk(scripted, "Hi")


def test_an_error_after_text_keeps_the_text(scripted: Any) -> None:
    scripted.script = [*text_events("Half")[:2], {"error": {"message": "Lost."}}]
    shown = talk(scripted, "Hi", "Ho")
    assert "Half\n" in shown and "Lost." in shown
    assert bodies(scripted)[1]["messages"][1] == {"role": "assistant", "content": "Half"}


def test_reasoning_is_shown_but_no_part_of_the_history(scripted: Any) -> None:
    scripted.script = [
        {"choices": [{"delta": {"reasoning_content": "Hmm. "}}]},
        *text_events("Yes"),
    ]
    assert "Hmm. Yes\n2 tokens" in talk(scripted, "Hi", "Ho")
    assert bodies(scripted)[1]["messages"][1]["content"] == "Yes"


def test_no_text_controls_the_terminal(scripted: Any) -> None:
    scripted.script = text_events("a\x1b]0;title\x07b\x9bc", "[bold]d[/bold]\te\n")
    assert talk(scripted, "Hi").startswith("a]0;titlebc[bold]d[/bold]\te\n")


def test_ctrl_c_at_the_prompt_goes_on(scripted: Any) -> None:
    shown = talk(scripted, KeyboardInterrupt, "Hi")
    assert "Ctrl-D or /exit leaves" in shown and "Hello" in shown


@pytest.mark.parametrize(
    ("given", "asked"), [("", "/v1/models"), ("/", "/v1/models"), ("/v1/", "/v1/models")]
)
def test_urls_as_openai_clients_take_them(scripted: Any, given: str, asked: str) -> None:
    server = Server(scripted.url + given)
    assert server.models() == ["first", "second"]
    server.close()
    assert scripted.seen[0][0] == asked


def test_a_prefix_is_kept(scripted: Any) -> None:
    server = Server(scripted.url + "/app/v1")
    server.models()
    server.close()
    assert scripted.seen[0][0] == "/app/v1/models"


def test_start_errors(scripted: Any) -> None:
    with pytest.raises(ConfigError, match="must look like"):
        run("127.0.0.1:8000")
    scripted.listing = {"data": []}
    with pytest.raises(EngineError, match="serves no model yet"):
        run(scripted.url)
    scripted.listing = {"models": []}
    with pytest.raises(EngineError, match="lists no models"):
        run(scripted.url)
    server = Server("http://127.0.0.1:9")
    with pytest.raises(AnswerError, match="no server answers"):
        server.models()
    server.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:9", "--max-model-len", "9"], "--max-model-len is for a model"),
        (["--api-key", "secret"], "--api-key is for --url"),
    ],
)
def test_options_that_would_do_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_key_of_openai_clients() -> None:
    assert openai_api_key({"OPENAI_API_KEY": "k"}) == "k"
    assert openai_api_key({"OPENAI_API_KEY": ""}) is None
    assert openai_api_key({}) is None
