"""Exchanges that the log has but this process does not: left open by a process that is gone."""

from __future__ import annotations

import json

from rethaw.gateway.run import completed
from rethaw.gateway.usage import header, is_event_stream, terminal_at, usage_of
from rethaw.model.enums import EventType, ExchangeState
from rethaw.model.ports import LogSink
from rethaw.model.types import Exchange, NewEvent

_JSON_LIMIT = 8 << 20


async def recorded_bytes(log: LogSink, exchange: str, upto: int) -> bytes:
    """The durable response bytes before `upto`."""
    out = bytearray()
    while len(out) < upto:
        chunks = await log.read_response(exchange, len(out))
        size = len(out)
        for chunk in chunks:
            out += chunk.data[max(0, len(out) - chunk.offset) :]
        if len(out) == size:
            break
    return bytes(out[:upto])


async def closed_if_whole(log: LogSink, x: Exchange) -> Exchange | None:
    """Close `x` if what its lost owner recorded is provably the whole answer: that owner died between the last byte
    and the end, and the agent may have acted on it already."""
    if x.head is None:
        return None
    if x.meta.method == "HEAD" or x.head.status in (204, 304):
        body = b""
    else:
        length = header(x.head.headers, "content-length")
        if length is not None and length.isdigit() and int(length) != x.received:
            return None
        body = await recorded_bytes(log, x.id, x.received)
        if not (length is not None and length.isdigit()) and not _ends(x, body):
            return None
    usage = usage_of(x.head.headers, body) if x.meta.model_call else None
    event = completed(x.id, x.head.status, x.received, usage, recovered=True)
    return await log.finish_exchange(x.id, x.epoch, ExchangeState.COMPLETE, usage, event)


def _ends(x: Exchange, body: bytes) -> bool:
    """Whether a body without a length shows its own end."""
    assert x.head is not None
    if header(x.head.headers, "content-encoding") not in (None, "identity"):
        return False
    if is_event_stream(x.head.headers):
        return terminal_at(body) >= 0 and body.endswith((b"\n\n", b"\r\n\r\n"))
    if "json" not in (header(x.head.headers, "content-type") or "") or len(body) > _JSON_LIMIT:
        return False
    try:
        return isinstance(json.loads(body), (dict, list))
    except (ValueError, RecursionError):
        return False


def torn(x: Exchange, held: int, key: str | None = None) -> NewEvent:
    """`held`: bytes of the answer that the guest has."""
    data = {"exchange": x.id, "epoch": x.epoch, "guest_bytes": held, "recorded_bytes": x.received}
    return NewEvent(type=EventType.EXCHANGE_TORN, data=data, key=key or f"torn:{x.id}:{x.epoch}")


def reissued(x: Exchange) -> NewEvent:
    data = {"exchange": x.id, "former_owner": x.owner, "former_epoch": x.epoch, "recorded_bytes": x.received}
    return NewEvent(type=EventType.EXCHANGE_REISSUED, data=data, key=f"reissued:{x.id}:{x.epoch}")
