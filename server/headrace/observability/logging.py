"""How log records look and where they go: one handler on standard error, as text or JSON lines,
with a request id on every record. It must not know what is logged; no caller logs a prompt.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, Literal

from headrace.errors import ConfigError

LogFormat = Literal["text", "json"]

LEVELS = ("debug", "info", "warning", "error")
FORMATS: tuple[LogFormat, ...] = ("text", "json")

request_id_var: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the current task works for; the API sets it, every record carries it. Where no
context flows (the engine process), `extra={"request_id": ...}` says the same."""

_access_logger = logging.getLogger("headrace.access")
_PLAIN_ATTRIBUTES = frozenset(
    (*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message")
)


def configure_logging(level: str, format: LogFormat) -> None:
    """Send all logs of this process to standard error. May be called again to change its mind.

    level: of our own and uvicorn's loggers; other libraries speak from `warning` up, unless it is
    `debug`. Start uvicorn with `log_config=None, access_log=False`: it would undo this.
    Raises ConfigError for an unknown level or format.
    """
    if level.lower() not in LEVELS:
        raise ConfigError(f"log level must be one of {', '.join(LEVELS)}, got {level!r}.")
    if format not in FORMATS:
        raise ConfigError(f"log format must be one of {', '.join(FORMATS)}, got {format!r}.")
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = _Handler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if number <= logging.DEBUG else logging.WARNING)
    logging.getLogger("headrace").setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        theirs = logging.getLogger(name)
        theirs.handlers.clear()
        theirs.propagate = name != "uvicorn.access"  # log_access writes that line, with a duration
        theirs.setLevel(number)
    logging.captureWarnings(True)


def log_access(method: str, path: str, status: int, seconds: float) -> None:
    """The one line per HTTP request. path: without the query string, which may hold anything."""
    _access_logger.info(
        "%s %s %d %.1f ms",
        method,
        path.encode("unicode_escape").decode(),  # a path can hold line breaks and terminal codes
        status,
        seconds * 1000,
        extra={"method": method, "path": path, "status": status, "duration_seconds": seconds},
    )


class _Handler(logging.StreamHandler[Any]):
    """Ours, so that configuring twice replaces it and leaves those of others alone."""


class TextFormatter(logging.Formatter):
    """`12:34:56.789 INFO    engine.scheduler: message [request id]`, local time."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("headrace.")
        head = f"{clock}.{int(record.msecs):03d} {record.levelname:<7} {name}: "
        request_id = _request_id(record)
        tail = f" [{request_id}]" if request_id else ""
        return "\n".join((head + record.getMessage() + tail, *_exception_lines(self, record)))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, process, request_id and
    exception where there are any, and every `extra` field under its own name."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if request_id := _request_id(record):
            fields["request_id"] = request_id
        if lines := _exception_lines(self, record):
            fields["exception"] = "\n".join(lines)
        for name, value in vars(record).items():
            # Ray's record factory, for one, adds private attributes to every record.
            if name not in _PLAIN_ATTRIBUTES and not name.startswith("_"):
                fields.setdefault(name, value)
        return json.dumps(fields, ensure_ascii=False, default=str)


def _request_id(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", "") or request_id_var.get())


def _exception_lines(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    lines = []
    if record.exc_info:
        lines.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        lines.append(formatter.formatStack(record.stack_info))
    return lines
