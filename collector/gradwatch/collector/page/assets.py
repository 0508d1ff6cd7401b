"""Hands out the page's files: read once, with an ETag, under a policy that lets nothing else in."""

from __future__ import annotations

import hashlib
import importlib.resources
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Header, HTTPException, Response

# All scripts and styles are files of ours: no job's name can become one.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INDEX = "index.html"


class _File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def router() -> APIRouter:
    """`/` and `/assets/…`."""
    files = _read()
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def get_page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        return _answer(files[_INDEX], if_none_match)

    @routes.get("/assets/{name}")
    async def get_asset(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r}")
        return _answer(files[name], if_none_match)

    return routes


def _answer(file: _File, if_none_match: str | None) -> Response:
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # Another version of the collector has other files under the same names.
        "Cache-Control": "no-cache",
        "ETag": file.etag,
    }
    if if_none_match == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _read() -> dict[str, _File]:
    folder = importlib.resources.files("gradwatch.collector.page") / "static"
    files = {}
    for entry in folder.iterdir():
        media_type = _TYPES.get("." + entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[entry.name] = _File(content, media_type, etag)
    return files
