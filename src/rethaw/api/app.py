"""The HTTP API: thin routes over control, log and catalog. OpenAPI at /openapi.json."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.encoders import jsonable_encoder
from starlette.middleware import Middleware
from starlette.responses import StreamingResponse

from rethaw import __version__
from rethaw.api import (
    agents,
    blobs,
    errors,
    images,
    inside,
    models,
    queues,
    rawjson,
    schedules,
    sessions,
    snapshots,
    snapshots_look,
    templates,
    terminal,
    top,
)
from rethaw.api.doors import Doors
from rethaw.api.errors import Ascii
from rethaw.api.guard import Guard
from rethaw.api.links import Links
from rethaw.api.rooms import Rooms
from rethaw.api.warming import Warming
from rethaw.control.control import Control
from rethaw.control.snapshots import Catalog
from rethaw.log.store import Log
from rethaw.model.dialing import Dialing
from rethaw.model.looking import Looking
from rethaw.model.ports import Carrier, Images
from rethaw.model.terminal import Terminals


def create_app(
    control: Control,
    log: Log,
    catalog: Catalog,
    *,
    token: str,
    crash_hook: Callable[[str, str], Awaitable[None]],
    doctor_hook: Callable[[], Awaitable[Any]],
    blobs_dir: Path,
    public_url: str,
    heartbeat_s: float = 15.0,
    looking: Looking | None = None,
    carrier: Carrier | None = None,
    node: str = "",
    cpu: Callable[[str], float | None] | None = None,
    trees: Images | None = None,
    usage: Callable[[], Awaitable[dict[str, tuple[float, int]]]] | None = None,
    terminals: Terminals | None = None,
    dialing: Dialing | None = None,
    link_key: bytes | None = None,
) -> FastAPI:
    """The application. Everything but /healthz, /openapi.json and /v1/callbacks wants `Authorization: Bearer TOKEN`; what is
    below /sessions is a guest's, for that token or a signed link."""
    rooms = Rooms(
        control,
        log,
        catalog,
        crash_hook,
        doctor_hook,
        blobs_dir,
        heartbeat_s,
        looking,
        carrier,
        trees,
        node,
        terminals,
        cpu,
        usage,
        dialing,
        Links(link_key, public_url) if link_key else None,
    )
    app = FastAPI(
        title="Rethaw",
        version=__version__,
        description="Durable AI agents by snapshot and restore.",
        servers=[{"url": public_url}],
        middleware=[Middleware(Doors, rooms=rooms, token=token), Middleware(Guard, token=token)],
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    app.state.warming = Warming(rooms)
    app.include_router(sessions.router(rooms, app.state.warming))
    app.include_router(terminal.router(rooms))
    app.include_router(snapshots_look.router(rooms))
    app.include_router(snapshots.router(rooms))
    app.include_router(templates.router(rooms))
    app.include_router(queues.router(rooms))
    app.include_router(schedules.router(rooms, app.state.warming))
    app.include_router(agents.router(rooms))
    app.include_router(images.router(rooms))
    app.include_router(top.router(rooms))
    app.include_router(inside.router(rooms))
    _other_routes(app, rooms)
    _describe_token(app)
    return app


def _other_routes(app: FastAPI, rooms: Rooms) -> None:
    @app.get("/healthz", tags=["server"])
    async def healthz() -> models.Health:
        return models.Health(ok=True, version=__version__)

    @app.post("/v1/blobs", tags=["server"], responses=models.ERRORS, openapi_extra=models.BLOB_BODY)
    async def put_blob(request: Request) -> models.Blob:
        """Upload an agent's code, or files of an image: a tar.gz, raw."""
        return models.Blob(digest=await blobs.keep(request.stream(), rooms.blobs_dir))

    @app.get("/v1/blobs/{digest}", tags=["server"], responses=models.ERRORS)
    async def has_blob(digest: str) -> models.BlobThere:
        """Whether it need not be uploaded again."""
        return models.BlobThere(there=rooms.has_blob(digest))

    @app.post("/v1/callbacks/{token}", tags=["sessions"], responses=models.ERRORS, openapi_extra=models.ANY_BODY)
    async def callback(request: Request, token: str) -> models.SignalGiven:
        """Complete the wait that this one-time address was made for, with any JSON."""
        payload = rawjson.check(await request.body() or b"null")
        return models.SignalGiven(signal=await rooms.control.callback(token, payload))

    @app.get("/v1/exchanges/{exchange}/request", tags=["log"], responses=models.ERRORS, response_class=Response)
    async def request_bytes(exchange: str) -> Response:
        """The exact bytes of the request."""
        body = await rooms.log.read_request(await rooms.control.resolve_exchange(exchange))
        return Response(body, media_type="application/octet-stream")

    @app.get("/v1/exchanges/{exchange}/response", tags=["log"], responses=models.ERRORS, response_class=Response)
    async def response_bytes(exchange: str) -> Response:
        """The bytes of the response that are durable by now."""
        ident = await rooms.control.resolve_exchange(exchange)
        return StreamingResponse(_response(rooms.log, ident), media_type="application/octet-stream")

    @app.get("/v1/nodes", tags=["server"], responses=models.ERRORS)
    async def nodes() -> dict[str, list[dict[str, Any]]]:
        return {"nodes": await rooms.control.nodes()}

    @app.post("/v1/doctor", tags=["server"], responses=models.ERRORS, response_model=None)
    async def doctor() -> Response:
        """Probe each engine of the server: a guest through boot, save and restore."""
        return Ascii({"reports": jsonable_encoder(await rooms.doctor_hook())})

    _ = (healthz, put_blob, has_blob, callback, request_bytes, response_bytes, nodes, doctor)


async def _response(log: Log, exchange: str) -> AsyncIterator[bytes]:
    offset = 0
    while chunks := await log.read_response(exchange, offset):
        for chunk in chunks:
            yield chunk.data
        offset = chunks[-1].offset + len(chunks[-1].data)


def _describe_token(app: FastAPI) -> None:
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"token": []}]
        for path, methods in schema["paths"].items():
            if path == "/healthz" or path.startswith("/v1/callbacks/"):
                for operation in methods.values():
                    operation["security"] = []
        return schema

    app.openapi = openapi
