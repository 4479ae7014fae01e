"""GET /docs: Swagger UI over /openapi.json, with scripts and styles that come from this server.

The files are those of the package fastapi-offline; nothing is fetched from elsewhere.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}


@router.get("/docs")
async def docs(request: Request) -> Response:
    # Loaded when it is asked for: few servers are.
    from fastapi.openapi.docs import get_swagger_ui_html

    root = request.scope.get("root_path", "").rstrip("/")
    assets = f"{root}/docs/assets"
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=f"{request.app.title} API",
        swagger_js_url=f"{assets}/swagger-ui-bundle.js",
        swagger_css_url=f"{assets}/swagger-ui.css",
        swagger_favicon_url=f"{assets}/favicon.png",
    )


@router.get("/docs/assets/{name}")
async def asset(request: Request) -> Response:
    name: str = request.path_params["name"]
    if name not in _ASSETS:
        raise HTTPException(404)
    content = files("fastapi_offline").joinpath("static", name).read_bytes()
    headers = {"cache-control": "max-age=86400"}
    return Response(content, media_type=_ASSETS[name], headers=headers)
