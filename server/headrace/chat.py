"""`headrace chat`: a conversation in the terminal, with any server that speaks OpenAI's API.

Asks over HTTP like every other client and knows nothing of how its server came to be.
https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
from rich.console import Console

from headrace.bench.http_client import HttpClient, Response
from headrace.config import nearest_hint
from headrace.errors import EngineError

HELP = """\
/system TEXT     what the model is told before the conversation; without TEXT: nothing
/set NAME VALUE  a field of each request, such as temperature 0.7; without VALUE: unset
/set             the fields that are set
/clear           forget the conversation; system prompt and fields stay
/help            this
/exit            leave, as does Ctrl-D
A line that ends in \\ goes on in the next one; // begins a message with a slash.
Ctrl-C stops the answer."""
COMMANDS = ("system", "set", "clear", "help", "exit")
OWN_FIELDS = ("messages", "stream", "stream_options")

# A model's text, or a server's, may not move the cursor, ring, or retitle the window.
_CONTROLS = dict.fromkeys({*range(0x20), 0x7F, *range(0x80, 0xA0)} - {ord("\n"), ord("\t")})


class AnswerError(Exception):
    """Why there is no answer, or only a part of one, as the server says it."""


@dataclass
class Answer:
    """One answer as it arrives: the events of a streamed chat completion, folded."""

    on_text: Callable[[str, bool], None]
    """(a piece of text; whether it is reasoning, which is not part of the answer)"""
    began: float = field(default_factory=time.perf_counter)
    text: str = ""
    first: float = 0.0
    last: float = 0.0
    events: int = 0
    usage: dict[str, Any] | None = None
    failure: str = ""
    finish_reason: str = ""

    def take(self, arrived: float, data: bytes) -> None:
        """One server-sent event. Never raises: whoever reads the connection calls it."""
        if data == b"[DONE]":
            return
        try:
            chunk = msgspec.json.decode(data)
            if "error" in chunk:
                self.failure = error_text(data)
                return
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk.get("choices", ())[:1]:
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                self._take_delta(arrived, choice.get("delta") or {})
        except (msgspec.DecodeError, AttributeError, TypeError) as error:
            self.failure = f"The server's stream is not one of chat completions: {error}."

    def _take_delta(self, arrived: float, delta: dict[str, Any]) -> None:
        text = delta.get("content") or ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if not text and not reasoning:
            return
        self.events += 1
        self.first = self.first or arrived
        self.last = arrived
        self.text += text
        if reasoning:
            self.on_text(reasoning, True)
        if text:
            self.on_text(text, False)

    @property
    def summary(self) -> str:
        """Tokens, their rate without the wait for the first, and that wait."""
        tokens = (self.usage or {}).get("completion_tokens") or self.events
        parts = [f"{tokens} token{'s' * (tokens != 1)}"]
        if tokens > 1 and self.last > self.first:
            parts.append(f"{(tokens - 1) / (self.last - self.first):.1f} tokens/s")
        if self.first:
            parts.append(f"first after {self.first - self.began:.2f} s")
        if self.finish_reason == "length":
            parts.append("cut at the token limit")
        return ", ".join(parts)


class Server:
    """The two questions a chat asks. `url`: as OpenAI's clients take it; one without a path gets
    their /v1. Raises ConfigError for what is no URL."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        url = url.rstrip("/")
        if "://" in url and not urlsplit(url).path:
            url += "/v1"
        self._client = HttpClient(url, headers)
        self._runner = asyncio.Runner()

    @property
    def url(self) -> str:
        return self._client.base_url

    def models(self) -> list[str]:
        """What is served. Raises AnswerError."""
        try:
            response = self._runner.run(self._client.get("/models"))
            if response.status != 200:
                raise AnswerError(_refusal(response))
            return [str(card["id"]) for card in msgspec.json.decode(response.body)["data"]]
        except OSError as error:
            raise AnswerError(f"no server answers ({error})") from error
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise AnswerError("the answer to /models lists no models") from error

    def answer(self, body: dict[str, Any], answer: Answer) -> None:
        """Fill `answer` as it comes. Raises AnswerError, and KeyboardInterrupt on Ctrl-C, which
        closes the connection, so that the server stops as well."""
        request = self._client.post("/chat/completions", msgspec.json.encode(body), answer.take)
        try:
            response = self._runner.run(request)
        except OSError as error:
            raise AnswerError(f"The connection failed: {error}.") from error
        if response.status != 200:
            raise AnswerError(_refusal(response))
        if not answer.failure and not answer.events and not answer.finish_reason:
            answer.failure = "The server sent no stream of events."
        if answer.failure:
            raise AnswerError(answer.failure)

    def close(self) -> None:
        self._runner.close()


def error_text(body: bytes, status: int | None = None) -> str:
    """What an error body says, with status, code and field."""
    try:
        error = msgspec.json.decode(body)["error"]
        message, code, param = error["message"], error.get("code"), error.get("param")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        message, code, param = body.decode(errors="replace")[:500] or "no reason given", None, None
    named = [str(part) for part in (status, code, param and f"field {param}") if part]
    return f"{message} ({', '.join(named)})" if named else str(message)


def _refusal(response: Response) -> str:
    return error_text(response.body, response.status)


class Terminal:
    """The conversation and its commands. `read_line` raises EOFError at the end of the input."""

    def __init__(
        self, server: Server, model: str, console: Console, read_line: Callable[[str], str]
    ) -> None:
        self.messages: list[dict[str, str]] = []
        self.system = ""
        self.fields: dict[str, Any] = {}
        self._server = server
        self._model = model
        self._console = console
        self._read_line = read_line

    def run(self) -> None:
        """Until /exit or the end of the input."""
        while True:
            try:
                line = self._read()
                if line.startswith("/") and not line.startswith("//"):
                    if not self._command(line):
                        return
                elif line:
                    self._ask(line.removeprefix("/") if line.startswith("//") else line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("\nCtrl-D or /exit leaves.")

    def _read(self) -> str:
        line = self._read_line("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._read_line(". ")
        return line.strip()

    # --- asking ---------------------------------------------------------------------------------

    def _body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self._model,
            **self.fields,
            "messages": system + self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        answer = Answer(self._print)
        problem = ""
        try:
            self._server.answer(self._body(), answer)
        except AnswerError as error:
            problem = str(error)
        except KeyboardInterrupt:
            answer.finish_reason = "stopped"
        finally:  # before anything else can be interrupted
            if answer.text:
                self.messages.append({"role": "assistant", "content": answer.text})
            else:
                self.messages.pop()  # the next question must not follow upon one without an answer
        if answer.events:
            self._console.out()
            stopped = ", stopped" if answer.finish_reason == "stopped" else ""
            self._say(answer.summary + stopped)
        elif answer.finish_reason == "stopped":
            self._say("\nStopped before the first token.")
        if problem:
            self._say(problem, "red")

    def _print(self, text: str, is_reasoning: bool) -> None:
        if is_reasoning:
            self._console.out(_printable(text), end="", style="dim italic", highlight=False)
        else:  # as it is: the console would expand tabs
            self._console.file.write(_printable(text))
            self._console.file.flush()

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.out(_printable(text), style=style, highlight=False)

    # --- commands -------------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        """False: leave."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        match name:
            case "exit":
                return False
            case "help":
                self._say(HELP)
            case "clear":
                self.messages.clear()
                self._say("The conversation is forgotten.")
            case "system":
                self.system = rest
                self._say("The system prompt is set." if rest else "There is no system prompt.")
            case "set":
                self._set(rest)
            case _:
                self._say(f"There is no /{name}{nearest_hint(name, COMMANDS)} /help lists all.")
        return True

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if name in OWN_FIELDS:
            self._say(f"{name} is not to be set here: the chat fills it in.", "red")
            return
        if name and text.strip():
            try:
                self.fields[name] = json.loads(text)
            except ValueError:
                self.fields[name] = text.strip()
        elif name:
            self.fields.pop(name, None)
        shown = (f"{key} = {json.dumps(value)}" for key, value in self.fields.items())
        self._say("\n".join(shown) or "No field is set: the server's defaults hold.")


def _printable(text: str) -> str:
    return text.translate(_CONTROLS)


def run(url: str, model: str = "", api_key: str | None = None) -> None:
    """Talk to the server at `url` until the user leaves. model "": the first that it lists.

    Raises ConfigError for what is no URL, EngineError when the server does not say what it serves.
    """
    console = Console(highlight=False)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # line editing and history for input()

    server = Server(url, api_key)
    try:
        if not model:
            try:
                model = next(iter(server.models()), "")
            except AnswerError as error:
                raise EngineError(f"{server.url}: {_printable(str(error))}") from error
            if not model:
                raise EngineError(f"{server.url} serves no model yet; wait until it is ready.")
        if interactive:
            console.out(_printable(f"{model} at {server.url}; /help lists commands."), style="dim")
        read = input if interactive else lambda prompt: input()
        Terminal(server, model, console, read).run()
    finally:
        server.close()
