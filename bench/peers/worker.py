"""The child's side of a Worker: questions on standard input, answers on standard output, as JSON,
one a line. Standard library only: it runs in the environments of other engines too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

PR_SET_PDEATHSIG = 1


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> Any:
    return json.loads(line)


def serve(load: Callable[[], tuple[Mapping[str, Any], Callable[[Any], Mapping[str, Any]]]]) -> None:
    """Load, say hello, and answer until standard input ends.

    load: returns the greeting and the function that answers a question. A question that raises is
    answered with {"error": ...}; so is a load that does, and the process ends.
    """
    with contextlib.suppress(OSError, AttributeError):  # Linux: a stopped child sees no end of file
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    try:
        greeting, answer = load()
    except Exception as error:
        answers.write(encode({"error": _describe(error)}))
        sys.exit(1)
    answers.write(encode(greeting))
    for line in sys.stdin.buffer:
        try:
            reply = answer(decode(line))
        except Exception as error:
            reply = {"error": _describe(error)}
        answers.write(encode(reply))


def _describe(error: Exception) -> str:
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"
