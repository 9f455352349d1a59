"""`ctx.history(form=...)`: the conversation of a session's newest model call, in a provider's form, a page at a time."""

from __future__ import annotations

import json
from typing import Any, cast

from rethaw.gateway.conversation import Conversation, api_of, read
from rethaw.gateway.messages import FORMS, Form, written
from rethaw.gateway.usage import decode, header, is_event_stream
from rethaw.model.enums import EventType, ExchangeState
from rethaw.model.errors import InvalidInput
from rethaw.model.ports import LogSink
from rethaw.model.types import Exchange, Fence

_PAGE = 2 << 20  # bytes of JSON, but at least one message
_READ = 1 << 20
_REFUSED = range(400, 500)
_LATER = (408, 409, 425, 429)  # of those: the request itself was fine


async def page(log: LogSink, fence: Fence, body: dict[str, Any]) -> dict[str, Any]:
    """Messages from number `after` on. `exchange`: the call whose conversation earlier pages are of."""
    form = body["form"]
    if form not in FORMS:
        raise InvalidInput(f"{form!r} is no form of the history", remedy=f"use one of events, {', '.join(FORMS)}")
    found, exchange = await conversation(log, fence, body.get("exchange"))
    messages, system = ([], "") if found is None else written(found, cast("Form", form))
    after, size, out = int(body.get("after", 0)), 0, list[dict[str, Any]]()
    for message in messages[after:]:
        size += len(json.dumps(message))
        if out and size > _PAGE:
            break
        out.append(message)
    return {"messages": out, "system": system, "exchange": exchange, "more": after + len(out) < len(messages)}


async def conversation(
    log: LogSink, fence: Fence, exchange: str | None = None
) -> tuple[Conversation | None, str | None]:
    """Of the newest call of the session's path that can be understood (or of `exchange`), and the call's id."""
    calls = await _calls(log, fence.session)
    if exchange is not None and exchange in calls:
        calls = calls[calls.index(exchange) :]
    for at, ident in enumerate(calls):
        found = await _one(log, fence, ident)
        if found is not None:
            return await _with_former(log, fence, found, calls[at + 1 :]), ident
    return None, None


async def _calls(log: LogSink, session: str) -> list[str]:
    """Ids of the exchanges that the path asked for, newest first."""
    found: dict[str, None] = {}
    after = 0
    while True:
        events = await log.read(
            session, after=after, limit=1000, types=[EventType.EXCHANGE_REQUESTED, EventType.EXCHANGE_ADOPTED]
        )
        for event in events:
            ident = str(event.data["exchange"])
            found.pop(ident, None)
            found[ident] = None
        if len(events) < 1000:
            return list(reversed(found))
        after = events[-1].seq


async def _one(log: LogSink, fence: Fence, ident: str) -> Conversation | None:
    """None for one that is no model call, or that the provider would not have."""
    exchange = await log.exchange(ident)
    api = api_of(exchange.meta.path)
    if not exchange.meta.model_call or api is None:
        return None
    state = await log.stood(fence, ident) or exchange.state
    head = exchange.head
    if state is ExchangeState.COMPLETE and head is not None and head.status in _REFUSED and head.status not in _LATER:
        return None
    request = decode(await log.read_request(ident), header(exchange.meta.headers, "content-encoding"))
    if request is None:
        return None
    answered = state is ExchangeState.COMPLETE and head is not None and head.status < 300
    answer = await _answer(log, exchange) if answered else None
    return read(api, request, answer, stream=head is not None and is_event_stream(head.headers))


async def _answer(log: LogSink, exchange: Exchange) -> bytes | None:
    assert exchange.head is not None
    body = bytearray()
    while chunks := await log.read_response(exchange.id, len(body), _READ):
        for chunk in chunks:
            body += chunk.data
    return decode(bytes(body), header(exchange.head.headers, "content-encoding"))


async def _with_former(log: LogSink, fence: Fence, found: Conversation, older: list[str]) -> Conversation:
    """With the calls that it goes on from by `previous_response_id`, as far as the path has them."""
    for ident in older:
        if found.previous is None:
            break
        former = await _one(log, fence, ident)
        if former is not None and former.api == found.api and former.answer == found.previous:
            found = found.after(former)
    return found
