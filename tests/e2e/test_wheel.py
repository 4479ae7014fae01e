"""The wheel holds exactly our two packages and serves from outside the checkout."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# It compiles the native kernels, which takes a minute of two cores that nobody else uses.
pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
START_SECONDS = 120


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build output lands in the checkout."""
    sources = tmp_path_factory.mktemp("sources")
    for folder in ("server", "kernels", "csrc"):
        leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, sources / folder, ignore=leave)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(sources)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = (sources / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; of this one it sees the libraries, but neither the
    editable install (its .pth file is not read there) nor the checkout."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*install, "--quiet", "--no-index", str(wheel)], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def test_wheel_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    version = wheel.name.split("-")[1]
    assert tops == {"headrace", "headrace_kernels", f"headrace-{version}.dist-info"}
    expected = {
        str(path.relative_to(root))
        for root in (ROOT / "server", ROOT / "kernels")
        for path in root.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed" or path.parent.parent.name == "static"
    }
    assert expected <= set(names), f"missing: {sorted(expected - set(names))}"


def test_wheel_fits_every_python_we_support(wheel: Path) -> None:
    has_native = any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    _, _, python, abi, platform = wheel.stem.split("-")
    if has_native:
        assert (python, abi) == ("cp311", "abi3")
    elif not any((ROOT / "csrc").rglob("*.cpp")):
        assert (python, abi, platform) == ("py3", "none", "any")


@pytest.fixture
def server(installed: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """(process, base URL, log) of `headrace serve` with the default model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    command = [str(installed / "bin" / "headrace"), "serve", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
    try:
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        process.kill()
        process.wait()


def test_installed_wheel_serves_and_stops(
    server: tuple[subprocess.Popen[bytes], str, Path], installed: Path
) -> None:
    process, url, log = server
    _wait_until_ready(process, url, log)

    body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    body["model"] = json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=60))
    assert "Paris" in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 4

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=40) == 0, log.read_text()


def test_installed_modules_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    program = "import headrace, headrace_kernels as k; print(headrace.__file__); print(k.__file__)"
    python = installed / "bin" / "python"
    result = subprocess.run(
        [str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    for path in result.stdout.split():
        assert Path(path).is_relative_to(installed)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if urllib.request.urlopen(f"{url}/readyz", timeout=5).status == 200:
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"not ready after {START_SECONDS} s:\n{log.read_text()}")
