"""Routes of images: build one before it is needed, list, look at and remove what is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.responses import StreamingResponse

from rethaw.api import models
from rethaw.api.errors import body as error_body
from rethaw.api.rooms import Rooms
from rethaw.control.finding import Filter
from rethaw.model.enums import State
from rethaw.model.errors import Conflict, RethawError, Unavailable
from rethaw.model.image_types import ImageBuilt, ImageDetail, ImageInfo, ImageRemoved, ImageSpec
from rethaw.model.ports import Images

_LIVE = tuple(state for state in State if not state.final)
_PAGE = 1000
_LOOK_S = 0.5  # how often it is seen whether somebody still listens to a build
_NAMED = 5  # users of an image in a refusal
_building: set[asyncio.Task[ImageBuilt]] = set()  # the loop alone would forget one that nobody awaits
_QUIET = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ImageBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    image: ImageSpec


class ImageList(BaseModel):
    images: list[ImageInfo]


def router(rooms: Rooms) -> APIRouter:
    api = APIRouter(prefix="/v1/images", responses=models.ERRORS, tags=["images"])

    def here() -> Images:
        if rooms.images is None:
            raise Unavailable("this process has no node, and so no images", remedy="ask the server of a node")
        return rooms.images

    @api.post("", response_model=ImageBuilt)
    async def build(request: Request, body: ImageBody, follow: bool = False) -> Response | ImageBuilt:
        """Build it; answers once it is there, at once if it was already.

        With ?follow=true: server-sent events `line` (a text of the builder's log), then one of `built` and `error`. Who goes
        away ends the build, and nothing of the step that was being made is left."""
        rooms.must_have_image(body.image)
        if not follow:
            return await here().build(body.image)
        flow = _following(here(), body.image, rooms.heartbeat_s, request)
        return StreamingResponse(flow, media_type="text/event-stream", headers=_QUIET)

    @api.get("")
    async def found() -> ImageList:
        """Images that were built, and the trees of files that they stand on."""
        return ImageList(images=await here().list())

    @api.get("/{digest}")
    async def inspect(digest: str) -> ImageDetail:
        """One, by the beginning of its digest: its layers and who needs it."""
        return await used(await here().find(digest))

    @api.delete("/{digest}")
    async def remove(digest: str) -> ImageRemoved:
        """Remove an image, and the layers that no other image stands on. 409 while a session or snapshot needs it."""
        detail = await used(await here().find(digest))
        users = [f"session {one}" for one in detail.sessions] + [f"snapshot {one}" for one in detail.snapshots]
        if users:
            more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
            raise Conflict(
                f"image {detail.info.digest[:12]} is needed by {', '.join(users[:_NAMED])}{more}",
                remedy="erase these sessions first: rethaw rm SESSION",
                sessions=list(detail.sessions),
                snapshots=list(detail.snapshots),
            )
        return await here().remove(detail.info.digest)

    async def used(detail: ImageDetail) -> ImageDetail:
        made = await rooms.catalog.made_on(detail.composed) if detail.composed else []
        live: list[str] = []
        cursor: str | None = None
        while detail.spec is not None:
            page, cursor = await rooms.control.find(Filter(states=_LIVE), _PAGE, cursor)
            live += [view.id for view in page if here().digest(view.agent.image) == detail.info.digest]
            if cursor is None:
                break
        return detail.model_copy(update={"sessions": tuple(live), "snapshots": tuple(one for one, _ in made)})

    _ = (build, found, inspect, remove)
    return api


async def _following(images: Images, spec: ImageSpec, heartbeat_s: float, request: Request) -> AsyncGenerator[bytes]:
    lines: asyncio.Queue[str | None] = asyncio.Queue()
    building = asyncio.ensure_future(images.build(spec, lines.put_nowait))
    _building.add(building)

    def done(task: asyncio.Task[ImageBuilt]) -> None:
        _building.discard(task)
        if not task.cancelled():
            task.exception()  # it is told below, if somebody still listens
        lines.put_nowait(None)

    building.add_done_callback(done)
    quiet_s = 0.0
    try:
        while not await request.is_disconnected():
            try:
                line = await asyncio.wait_for(lines.get(), _LOOK_S)
            except TimeoutError:
                quiet_s += _LOOK_S
                if quiet_s >= heartbeat_s:
                    quiet_s = 0.0
                    yield b": \n\n"
                continue
            if line is None:
                break
            yield _event("line", json.dumps(line))
        else:
            return
        try:
            yield _event("built", (await building).model_dump_json())
        except RethawError as error:
            said = error_body(error.code, error.message, error.remedy, error.details)
            yield _event("error", json.dumps({**said, "status": error.status}))
    finally:
        # Not awaited: who went away cancels every await here, and the build's own clearing up with it.
        building.cancel()


def _event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()
