"""The two log formats, the request id, uvicorn's loggers and the access line."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator

import pytest

from headrace.errors import ConfigError
from headrace.observability.logging import configure_logging, log_access, request_id_var

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    """Configures logging onto a buffer; puts every logger back afterwards."""
    names = ("", "headrace", "uvicorn", "uvicorn.error", "uvicorn.access")
    loggers = [logging.getLogger(name) for name in names]
    before = [(list(log.handlers), log.level, log.propagate) for log in loggers]

    def run(level: str = "info", format: str = "text") -> io.StringIO:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        configure_logging(level, format)  # type: ignore[arg-type]
        return stream

    yield run
    logging.captureWarnings(False)
    for log, (handlers, level, propagate) in zip(loggers, before, strict=True):
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


def test_text_has_time_level_short_name_and_request_id(configure: Configure) -> None:
    stream = configure()
    token = request_id_var.set("req-1")
    logging.getLogger("headrace.engine.scheduler").warning("blocks: %d", 7)
    request_id_var.reset(token)
    line = r"\d\d:\d\d:\d\d\.\d{3} WARNING engine\.scheduler: blocks: 7 \[req-1\]\n"
    assert re.fullmatch(line, stream.getvalue())


def test_json_lines_carry_extras_exception_and_request_id(configure: Configure) -> None:
    stream = configure(format="json")
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        logging.getLogger("headrace.api").exception("no\nluck", extra={"request_id": "r2", "n": 3})
    logging.getLogger("headrace.api").info("next")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "no\nluck"
    assert (first["level"], first["logger"]) == ("error", "headrace.api")
    assert (first["request_id"], first["n"]) == ("r2", 3)
    assert first["exception"].endswith("ValueError: broken\nin two")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert set(second) == {"time", "level", "logger", "message", "process"}


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_level_applies_to_ours_and_uvicorn_others_start_at_warning(
    configure: Configure, level: str
) -> None:
    stream = configure(level)
    number = getattr(logging, level.upper())
    for name in ("headrace.x", "uvicorn.error", "some.library"):
        for severity in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(severity, "s%d", severity)
    for name, threshold in (
        ("x", number),
        ("uvicorn.error", number),
        ("some.library", number if level == "debug" else logging.WARNING),
    ):
        seen = [int(s) for s in re.findall(rf" {re.escape(name)}: s(\d+)", stream.getvalue())]
        assert seen == [s for s in (10, 20, 30, 40) if s >= threshold]


def test_uvicorns_own_access_line_is_replaced(configure: Configure) -> None:
    stream = configure()
    logging.getLogger("uvicorn.access").info("theirs")
    log_access("POST", "/v1/x\nINFO forged", 200, 0.0125)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(r"access: POST /v1/x\nINFO forged 200 12.5 ms")


def test_access_fields_are_data_in_json(configure: Configure) -> None:
    stream = configure(format="json")
    log_access("GET", "/health", 503, 0.25)
    fields = json.loads(stream.getvalue())
    assert (fields["method"], fields["path"]) == ("GET", "/health")
    assert (fields["status"], fields["duration_seconds"]) == (503, 0.25)


def test_configuring_again_replaces_the_handler(configure: Configure) -> None:
    configure()
    stream = configure(format="json")
    logging.getLogger("headrace").info("once")
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("level", "format", "message"),
    [
        ("loud", "text", "log level must be one of debug, info, warning, error, got 'loud'."),
        ("info", "xml", "log format must be one of text, json, got 'xml'."),
    ],
)
def test_unknown_values_are_named(
    configure: Configure, level: str, format: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        configure(level, format)
    assert error.value.message == message
