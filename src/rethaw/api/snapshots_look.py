"""Routes that look into snapshots: files, differences, verification, and a shell over a WebSocket.

`api.programs` says what travels on a shell's connection.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response, WebSocket
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from rethaw.api import models, programs
from rethaw.api.errors import Ascii, answer
from rethaw.api.rooms import Rooms
from rethaw.control.compare import compare_logs
from rethaw.model.errors import AmbiguousId, InvalidInput, NotFound, Unavailable
from rethaw.model.looking import IDLE_MAX_S, FileChange, FileEntry, Looking, Shell, ShellRequest, Verified
from rethaw.model.types import SnapshotInfo

_BYTES = {"Cache-Control": "no-store"}


class LogSide(BaseModel):
    """What one side's log has after the common point, up to its snapshot."""

    session: str
    line: int
    after: int
    upto: int
    events: dict[str, int]  # type -> how many
    model_calls: int
    input_tokens: int
    output_tokens: int


class Difference(BaseModel):
    """From snapshot `before` to `after`. `common`: {session, line, seq} that both come from, None when there is none
    known. `log`: what only one side has, by side; of two on one line only `after` has anything."""

    before: SnapshotInfo
    after: SnapshotInfo
    files: list[FileChange]
    common: dict[str, Any] | None
    log: dict[str, LogSide]


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1", responses=models.ERRORS, tags=["snapshots"])

    @api.get("/snapshots/{snapshot}/files", response_model=None)
    async def files(request: Request, snapshot: str, deep: bool = False) -> Response:
        """What is at ?path=: the file itself, or what is in the directory (`deep`: below it as well). JSON has no
        bytes, so undecodable ones of a name are in `path_hex` as well."""
        path = _path(request)
        found = await _looking(rooms).files(await find(rooms, snapshot), path, deep=deep)
        return Ascii({"files": [_file(entry) for entry in found]})

    @api.get("/snapshots/{snapshot}/content", response_class=Response)
    async def content(request: Request, snapshot: str) -> Response:
        """The bytes of the regular file at ?path=."""
        path = _path(request)
        source = await _looking(rooms).content(await find(rooms, snapshot), path)
        return StreamingResponse(source, media_type="application/octet-stream", headers=_BYTES)

    @api.get("/snapshots/{snapshot}/archive", response_class=Response)
    async def archive(request: Request, snapshot: str) -> Response:
        """The file or directory at ?path= as a tar."""
        path = _path(request)
        source = await _looking(rooms).archive(await find(rooms, snapshot), path)
        return StreamingResponse(source, media_type="application/x-tar", headers=_BYTES)

    @api.post("/snapshots/{snapshot}/verify")
    async def verify(snapshot: str) -> Verified:
        """Read and check every stored byte."""
        return await _looking(rooms).verify(await find(rooms, snapshot))

    @api.get("/diff", response_model=None, responses={200: {"model": Difference}})
    async def diff(before: str, after: str, files: bool = True) -> Response:
        """What changed from one snapshot (or session's newest) to another."""
        one, two = await find(rooms, before), await find(rooms, after)
        changes = await _looking(rooms).changes(one, two) if files else []
        common, sides = await compare_logs(rooms.log.db, one, two)
        return Ascii(
            {
                "before": one.model_dump(mode="json"),
                "after": two.model_dump(mode="json"),
                "files": [_file(change) for change in changes],
                "common": common,
                "log": sides,
            }
        )

    @api.websocket("/snapshots/{snapshot}/shell")
    async def shell(socket: WebSocket, snapshot: str) -> None:
        await _shell(rooms, socket, snapshot)

    _ = (files, content, archive, verify, diff, shell)
    return api


async def find(rooms: Rooms, text: str) -> SnapshotInfo:
    """The snapshot that `text` begins, or the newest usable one of the session that it begins.

    Raises NotFound, AmbiguousId.
    """
    first: NotFound | None = None
    if not text.startswith("s_"):
        try:
            return await rooms.catalog.get(await rooms.control.resolve_snapshot(text))
        except NotFound as error:
            if text.startswith("snap_"):
                raise
            first = error
    try:
        view = await rooms.control.session(await rooms.control.resolve(text))
    except NotFound as error:
        likely = [e.remedy for e in (first, error) if e is not None and (e.remedy or "").startswith("did you mean")]
        raise NotFound(
            f"there is no snapshot or session {text[:100]!r}",
            remedy=likely[0] if likely else "`rethaw snapshot ls SESSION` shows those there are",
        ) from error
    if view.snapshot is None:
        raise NotFound(f"session {view.id} has no snapshot yet", remedy="wait for its first model call, or suspend it")
    return await rooms.catalog.get(view.snapshot)


def _looking(rooms: Rooms) -> Looking:
    if rooms.looking is None:
        raise Unavailable("this server runs no sandboxes", remedy="ask the node that holds the snapshot")
    return rooms.looking


def _path(request: Request) -> bytes:
    """?path= byte for byte."""
    query = parse_qs(request.scope["query_string"].decode("latin-1"), errors="surrogateescape")
    return query.get("path", ["/"])[0].encode("utf-8", "surrogateescape")


def _file(entry: FileEntry | FileChange) -> dict[str, Any]:
    values = dataclasses.asdict(entry)
    raw = entry.path.encode("utf-8", "surrogateescape")
    text = raw.decode("utf-8", "replace")
    return values if text == entry.path else {**values, "path": text, "path_hex": raw.hex()}


# ---------------------------------------------------------------- the shell


async def _shell(rooms: Rooms, socket: WebSocket, snapshot: str) -> None:
    try:
        info, looking = await find(rooms, snapshot), _looking(rooms)
    except (NotFound, AmbiguousId, Unavailable) as error:
        await socket.send_denial_response(answer(error))
        return
    await socket.accept()

    async def start() -> Shell:
        return await looking.shell(info, await _request(socket))

    await programs.serve(
        socket, start, lambda shell: {"snapshot": info.id, "session": info.session, "frozen": shell.frozen}
    )


async def _request(socket: WebSocket) -> ShellRequest:
    request = await programs.request(socket, ShellRequest, "docs/inspect.md")
    if not 0 < request.idle_s <= IDLE_MAX_S:
        raise InvalidInput(f"idle_s {request.idle_s:g} is out of range", remedy=f"use up to {IDLE_MAX_S:g}")
    if any("\0" in word for word in request.command):
        raise InvalidInput("the command has a NUL character", remedy="leave it out")
    return request
