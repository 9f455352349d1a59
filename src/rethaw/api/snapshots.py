"""Routes that keep, carry and take in snapshots."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from rethaw.api import models
from rethaw.api.rooms import Rooms
from rethaw.api.snapshots_look import find
from rethaw.model.errors import Unavailable
from rethaw.model.ids import new_id
from rethaw.model.ports import Carrier
from rethaw.model.types import SessionView, SnapshotInfo

_BLOCK = 1 << 20
_FILE_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}


class PinBody(BaseModel):
    pinned: bool = True


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1", responses=models.ERRORS, tags=["snapshots"])

    @api.get("/snapshots/{snapshot}")
    async def show(snapshot: str) -> SnapshotInfo:
        return await find(rooms, snapshot)

    @api.post("/snapshots/{snapshot}/pin")
    async def pin(snapshot: str, body: PinBody | None = None) -> SnapshotInfo:
        """Retention leaves it alone, or with {"pinned": false} no longer."""
        ident = (await find(rooms, snapshot)).id
        return await rooms.catalog.pin(ident, body is None or body.pinned)

    @api.get("/snapshots/{snapshot}/export", response_class=Response)
    async def export(snapshot: str) -> Response:
        """The snapshot and all that a restore needs as one file, not encrypted."""
        info = await find(rooms, snapshot)
        described = await rooms.control.described(info)
        place = tempfile.TemporaryDirectory(prefix="export-", dir=rooms.blobs_dir)
        try:
            await _carrier(rooms).export(info, described, Path(place.name) / "file")
        except BaseException:
            place.cleanup()
            raise
        return StreamingResponse(_content(place), media_type="application/octet-stream")

    @api.post("/snapshots/import", openapi_extra=_FILE_BODY)
    async def import_(request: Request) -> SessionView:
        """A new session, suspended at the snapshot that the body (an exported file) holds."""
        snapshot = new_id("snap")
        with tempfile.TemporaryDirectory(prefix="import-", dir=rooms.blobs_dir) as place:
            path = Path(place) / "file"
            with path.open("wb") as f:
                async for chunk in request.stream():
                    await asyncio.to_thread(f.write, chunk)
            info, agent, args, origin = await _carrier(rooms).take_in(snapshot, path)
        return await rooms.control.take_in(agent, args, info, rooms.node, origin)

    _ = (show, pin, export, import_)
    return api


def _carrier(rooms: Rooms) -> Carrier:
    if rooms.carrier is None:
        raise Unavailable("no node is part of this server", remedy="ask the server of a node")
    return rooms.carrier


async def _content(place: tempfile.TemporaryDirectory[str]) -> AsyncIterator[bytes]:
    with place, (Path(place.name) / "file").open("rb") as f:
        while block := await asyncio.to_thread(f.read, _BLOCK):
            yield block
