"""GET /: a page to talk to the model with, and the few files it is made of.

The files are served as they are; they call nothing but this server, and the policy sent with the
page holds them to that (https://www.w3.org/TR/CSP3/).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request, Response

router = APIRouter()

_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_NAMES = (
    "charts.js",
    "icon.svg",
    "markdown.js",
    "playground.css",
    "playground.js",
    "server.js",
)
# Path -> file, content type.
_FILES = {"/": ("index.html", "text/html")} | {
    f"/playground/{name}": (name, _TYPES[name.rpartition(".")[2]]) for name in _NAMES
}
PATHS = frozenset(_FILES)
"""They hold nothing secret: the page asks for the key that its requests need."""

_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def _file(request: Request) -> Response:
    name, media_type = _FILES[request.scope["route"].path]
    return Response(_content(name), headers=_HEADERS, media_type=media_type)


for _path in _FILES:
    router.add_api_route(_path, _file, methods=["GET"], include_in_schema=False)


@cache
def _content(name: str) -> bytes:
    return (files("headrace.api") / "static" / "playground" / name).read_bytes()
