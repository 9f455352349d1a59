"""Routes of sessions. Thin: find the session, ask control or the log, shape the answer."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import AwareDatetime
from starlette.responses import StreamingResponse

from rethaw.api import models, rawjson, stream
from rethaw.api.errors import Ascii
from rethaw.api.rooms import Rooms
from rethaw.api.warming import Warming
from rethaw.control.finding import Filter
from rethaw.model.enums import State
from rethaw.model.errors import InvalidInput
from rethaw.model.types import Message, SessionView, SnapshotInfo

_MAX_PAGE = 1000
Limit = Annotated[int, Query(ge=1, le=_MAX_PAGE)]
After = Annotated[int, Query(ge=0, le=1 << 62)]
WaitS = Annotated[float, Query(ge=0, le=3600, allow_inf_nan=False)]


def router(rooms: Rooms, warming: Warming) -> APIRouter:
    api = APIRouter(prefix="/v1/sessions", responses=models.ERRORS, tags=["sessions"])
    control, log, catalog = rooms.control, rooms.log, rooms.catalog

    @api.post("", status_code=201)
    async def start(body: models.StartBody, response: Response) -> SessionView:
        rooms.must_have(body.agent)
        started = None
        if body.agent.template == "auto":
            started = await control.warm.start_auto(body.agent, body.args, body.key, body.options)
        view, new = started or await control.create(body.agent, body.args, body.key, body.options)
        if started is None and body.agent.template == "auto":
            warming.begin(body.agent)
        response.status_code = 201 if new else 200
        return view

    @api.get("")
    async def find(
        state: Annotated[list[State] | None, Query()] = None,
        agent: str | None = None,
        tag: Annotated[list[str] | None, Query()] = None,
        queue: str | None = None,
        search: str | None = None,
        created_after: AwareDatetime | None = None,
        created_before: AwareDatetime | None = None,
        limit: Limit = 100,
        cursor: str | None = None,
    ) -> models.SessionPage:
        """Newest first. `state` and `tag` may be given again: any of the states, all of the tags. `search`: a text in its
        agent's name, key, tags or arguments."""
        wanted = Filter(tuple(state or ()), agent, tuple(tag or ()), queue, search, created_after, created_before)
        found, following = await control.find(wanted, limit, cursor)
        return models.SessionPage(sessions=found, next=following)

    @api.get("/{session}")
    async def show(session: str) -> models.SessionDetail:
        ident = await control.resolve(session)
        view, stats = await control.session(ident), await control.stats(ident)
        budget, spent = await control.limits(ident)
        return models.SessionDetail(
            **{k: getattr(view, k) for k in SessionView.model_fields},
            stats=models.Stats(**stats),
            attempts=await control.attempts(ident),
            budget=budget,
            spent=spent,
        )

    @api.get("/{session}/why")
    async def why(session: str) -> models.Why:
        return models.Why.model_validate(await control.why(await control.resolve(session)))

    @api.delete("/{session}")
    async def erase(session: str, force: bool = False) -> dict[str, Any]:
        return await control.erase(await control.resolve(session), force=force)

    # ------------------------------------------------------------ the log

    @api.get("/{session}/events", response_model=None)
    async def events(
        request: Request,
        session: str,
        after: After = 0,
        limit: Limit = 500,
        types: str | None = None,
        all_lines: bool = False,
        until_final: bool = False,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> Response:
        """JSON, or with `Accept: text/event-stream` a stream that goes on; it honours Last-Event-ID."""
        ident, wanted = await control.resolve(session), stream.types_of(types)
        if "text/event-stream" not in request.headers.get("accept", ""):
            found = await log.read(ident, after, limit, wanted, all_lines)
            return Ascii({"events": [stream.event_json(event) for event in found]})
        if last_event_id:
            if not (last_event_id.isascii() and last_event_id.isdigit()):
                raise InvalidInput(f"Last-Event-ID {last_event_id[:40]!r} is no position", remedy="send a number")
            after = int(last_event_id)
        flow = stream.sse(
            control,
            log,
            ident,
            after,
            types=wanted,
            all_lines=all_lines,
            until_final=until_final,
            heartbeat_s=rooms.heartbeat_s,
        )
        quiet = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(flow, media_type="text/event-stream", headers=quiet)

    @api.get("/{session}/logs", response_class=Response)
    async def logs(
        session: str, stream_: Annotated[str, Query(alias="stream")] = "stdout", follow: bool = False
    ) -> Response:
        """What the program wrote to stdout (or ?stream=stderr, both), as bytes."""
        if stream_ not in ("stdout", "stderr", "both"):
            raise InvalidInput(f"stream {stream_[:40]!r} is not one", remedy="use stdout, stderr or both")
        ident = await control.resolve(session)
        flow = stream.output(control, log, ident, stream_, follow=follow, heartbeat_s=rooms.heartbeat_s)
        return StreamingResponse(flow, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    @api.get("/{session}/exchanges", response_model=None)
    async def exchanges(session: str) -> Response:
        found = await log.list_exchanges(await control.resolve(session))
        return Ascii({"exchanges": [exchange.model_dump(mode="python") for exchange in found]})

    @api.get("/{session}/result", response_class=Response)
    async def result(session: str, wait_s: WaitS = 0.0) -> Response:
        """{"state", "result", "exit_code"} once it has ended; 408 before that."""
        view, value = await control.result(await control.resolve(session), wait_s)
        head = Ascii({}).render(
            {"state": view.state, "exit_code": view.exit_code, "reason": view.reason, "detail": view.detail}
        )
        body = head[:-1] + b',"result":' + (value if value is not None and _is_json(value) else b"null") + b"}"
        return Response(body, media_type="application/json")

    # ------------------------------------------------------------ messages and signals

    @api.post("/{session}/messages", openapi_extra=models.PAYLOAD_BODY)
    async def send(request: Request, session: str) -> Message:
        payload, key = await _payload(request)
        return await control.send(await control.named(session), payload, key)

    @api.get("/{session}/messages")
    async def inbox(session: str, after: After = 0, limit: Limit = _MAX_PAGE) -> models.Messages:
        return models.Messages(messages=await control.inbox(await control.resolve(session), after, limit))

    @api.get("/{session}/outbox")
    async def outbox(session: str, after: After = 0, wait_s: WaitS = 0.0, limit: Limit = _MAX_PAGE) -> models.Messages:
        """Published messages only."""
        ident = await control.named(session)
        return models.Messages(messages=await control.outbox(ident, after, wait_s, limit))

    @api.post("/{session}/signals/{name:path}", openapi_extra=models.PAYLOAD_BODY)
    async def signal(request: Request, session: str, name: str) -> models.SignalGiven:
        payload, key = await _payload(request)
        return models.SignalGiven(signal=await control.signal(await control.named(session), name, payload, key))

    # ------------------------------------------------------------ what people want

    @api.post("/{session}/suspend")
    async def suspend(session: str, body: models.EmptyBody | None = None) -> SessionView:
        return await control.suspend(await control.resolve(session))

    @api.post("/{session}/resume")
    async def resume(session: str, body: models.EmptyBody | None = None) -> SessionView:
        return await control.resume(await control.resolve(session))

    @api.post("/{session}/cancel")
    async def cancel(session: str, body: models.CancelBody | None = None) -> SessionView:
        return await control.cancel(await control.resolve(session), now=body is not None and body.now)

    @api.post("/{session}/fork", status_code=201)
    async def fork(session: str, body: models.ForkBody | None = None) -> models.Forks:
        """New sessions that share this one's log and pages up to `at`."""
        body = body or models.ForkBody()
        ident = await control.resolve(session)
        return models.Forks(sessions=await control.fork(ident, body.at, body.n, redeliver=body.redeliver))

    @api.post("/{session}/rewind")
    async def rewind(session: str, body: models.RewindBody) -> SessionView:
        """The same session, back at `to`; what it did since stays in its log as a superseded line."""
        return await control.rewind(await control.resolve(session), body.to, redeliver=body.redeliver)

    @api.post("/{session}/retry")
    async def retry(session: str, body: models.RetryBody | None = None) -> SessionView:
        """Begin the next attempt now."""
        return await control.retry(await control.resolve(session), body.memory_bytes if body is not None else None)

    @api.post("/{session}/budget")
    async def budget(session: str, body: models.BudgetBody) -> SessionView:
        """Change what the session may spend; one that its budget has ended goes on."""
        return await control.budget(await control.resolve(session), body.limits, body.add)

    @api.post("/{session}/crash")
    async def crash(session: str, body: models.CrashBody | None = None) -> SessionView:
        """Perform a crash: SIGKILL to the session's sandbox, to the whole node, or to the database."""
        ident = await control.resolve(session)
        what = body.what if body is not None else "sandbox"
        if what == "sandbox":
            return await control.crash(ident)
        view = await control.session(ident)
        await rooms.crash_hook(ident, what)
        return view

    @api.post("/{session}/snapshots")
    async def take(session: str, body: models.EmptyBody | None = None) -> SnapshotInfo:
        return await control.snapshot(await control.resolve(session))

    @api.get("/{session}/snapshots")
    async def snapshots(session: str) -> models.Snapshots:
        return models.Snapshots(snapshots=await catalog.list(await control.resolve(session)))

    _ = (
        start, find, show, why, erase, events, logs, exchanges, result, send, inbox, outbox, signal, suspend, resume,
        cancel, fork, rewind, retry, budget, crash, take, snapshots,
    )  # fmt: skip
    return api


async def _payload(request: Request) -> tuple[bytes, str | None]:
    """The exact bytes of `payload`, and the key."""
    found = rawjson.members(await request.body())
    unknown = found.keys() - {"payload", "idempotency_key"}
    if unknown or "payload" not in found:
        wrong = f"{sorted(unknown)[0]!r} is not known" if unknown else "payload is missing"
        raise InvalidInput(f"the body: {wrong}", remedy='send {"payload": ..., "idempotency_key": ...}')
    key = json.loads(found.get("idempotency_key", b"null"))
    if key is not None and not (isinstance(key, str) and 0 < len(key) <= 500 and _storable(key)):
        raise InvalidInput("idempotency_key is no key", remedy="use 1 to 500 characters, no NUL")
    return found["payload"], key


def _storable(text: str) -> bool:
    return "\0" not in text and text.encode("utf-8", "ignore").decode() == text


def _is_json(value: bytes) -> bool:
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return False
    return True
