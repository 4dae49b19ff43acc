"""The console page: `/`, and the scripts and styles it loads from `/console/`.

The files are those of the package's `console/` folder, read once; a path in a URL only ever looks up this closed list.
The page asks the API as every other client does, with the key its user gives it, so its own files need none.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

FOLDER = Path(__file__).with_name("console")
PREFIX = "/console/"
_PAGE = "index.html"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked about each time: an upgraded server must not meet an old script
}


@dataclass(frozen=True, slots=True)
class ConsoleFile:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def load_files(folder: Path = FOLDER) -> dict[str, ConsoleFile]:
    """Path below the folder, with slashes, -> file. Licences and notes stay where they are: no page asks for them."""
    files = {}
    for path in sorted(folder.rglob("*")):
        media_type = _MEDIA_TYPES.get(path.suffix)
        if media_type is not None:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.relative_to(folder).as_posix()] = ConsoleFile(content, media_type, etag)
    return files


def console_routes() -> APIRouter:
    """The page and its files. They are no part of the API, so not in the schema."""
    files = load_files()
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page(request: Request) -> Response:
        return _respond(request, files[_PAGE])

    @router.get(f"{PREFIX}{{name:path}}")
    async def asset(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return _respond(request, files[name])

    return router


def _respond(request: Request, file: ConsoleFile) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
