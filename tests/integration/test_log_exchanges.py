"""Exchanges in the context log: exact requests stored once, responses by offset under an epoch, the tail."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
from collections.abc import Callable

import psycopg
import pytest
from db_fixtures import *  # noqa: F403
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rethaw.db.pool import Database
from rethaw.log.store import Log
from rethaw.log.writer import append_in, open_line_in
from rethaw.model.enums import EventType as T
from rethaw.model.enums import ExchangeState as X
from rethaw.model.errors import Conflict, Fenced, InvalidInput, NotFound, TooLarge
from rethaw.model.types import Chunk, Exchange, Fence, NewEvent, RequestMeta, ResponseHead, Usage

_counter = iter(range(1, 1 << 30))


def meta_of(body: bytes, guest_id: str | None = None, **kw: object) -> RequestMeta:
    return RequestMeta(
        provider="openai", method="POST", path="/v1/chat/completions", headers=(("X-A", "b"), ("x-a", "c\0\ud800é")),
        digest=hashlib.sha256(body).hexdigest(), model_call=True, model="m",
        guest_id=guest_id if guest_id is not None else f"1.{next(_counter)}", **kw,
    )  # type: ignore[arg-type]  # fmt: skip


async def ask(log: Log, fence: Fence, body: bytes, guest_id: str | None = None) -> Exchange:
    return await log.begin_exchange(fence, meta_of(body, guest_id), body, "owner")


def completed(x: Exchange) -> NewEvent:
    return NewEvent(type=T.EXCHANGE_COMPLETED, data={"exchange": x.id, "status": 200})


async def answer(log: Log, x: Exchange, data: bytes) -> Exchange:
    await log.append_response(x.id, x.epoch, ResponseHead(status=200), [Chunk(offset=0, data=data, at_us=7)])
    return await log.finish_exchange(x.id, x.epoch, X.COMPLETE, Usage(output_tokens=3, input_tokens=4), completed(x))


async def move(db: Database, fence: Fence, branch: int, generation: str, snapshot: str | None = None) -> Fence:
    """A new life on a new line, as after a crash."""
    async with db.tx() as conn:
        await open_line_in(conn, fence.session, branch, "crash", snapshot)
        await conn.execute("UPDATE sessions SET generation = %s WHERE id = %s", (generation, fence.session))
    return Fence(session=fence.session, generation=generation)


async def snap(db: Database, fence: Fence, name: str, seq: int) -> None:
    """What the snapshot catalog logs."""
    async with db.tx() as conn:
        event = NewEvent(type=T.SNAPSHOT_CREATED, data={"snapshot": name, "seq": seq}, key=f"snapshot:{name}")
        await append_in(conn, fence.session, [event], generation=fence.generation)


async def types(log: Log, fence: Fence) -> list[str]:
    return [e.type.value for e in await log.read(fence.session, all_lines=True)]


# ---------------------------------------------------------------- requests

BODIES = [
    b"", b"{}", b"[]", b"null", b"\0", b"\xff\xfe", b'{"messages":', b'{"messages":[', b'{"messages":[]', b'{"messages":[]}',
    b'{"messages":[1,2,}', b'{"messages" : [ 1 , 2 ] , "x" : 3 } \n', b'\xef\xbb\xbf{"messages":[1]}',
    b'{"messages":["\xff\xff"],"a":1}', b'{"messages":["\\ud800"]}', b'{"messages":"no array","input":[1]}',
    b'{"a":{"messages":[1]}}', b'{"messages":[1],"messages":[2]}', b'{"m\\u0065ssages":[1]}', b'{"x":NaN,"messages":[NaN]}',
    b'{"messages":[1]} trailing', b'{"messages":[1]}{"messages":[2]}', b'{"messages":[' + b"[" * 5000 + b"]" * 5000 + b"]}",
    b'{"messages":[' + b"1" * 5000 + b"]}", json.dumps({"prompt": "x" * 5000}).encode(),
    json.dumps({"system": "s" * 4000, "tools": [{"d": "t" * 3000}] * 3, "messages": [{"c": "m" * 2000}] * 4}).encode(),
    json.dumps({"messages": [{"c": "é" * 2000}], "tools": [{"d": "t" * 3000}] * 3, "z": 1}, ensure_ascii=False).encode(),
    b"\r\n--multipart\r\n\0\xff" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
async def test_a_request_comes_back_exactly(log: Log, db: Database, fence: Fence, body: bytes) -> None:
    for reader in (log, Log(db)):
        x = await ask(reader, fence, body)
        assert await reader.read_request(x.id) == body
        assert x.request_bytes == len(body)
    assert (await log.verify(fence.session)).problems == []


_leaf = st.none() | st.integers() | st.text(max_size=2000) | st.binary(max_size=3000).map(lambda b: b.decode("latin-1"))
_body = st.binary(max_size=3000) | st.dictionaries(
    st.sampled_from(["messages", "input", "model", "tools", "system", "é"]), st.lists(_leaf, max_size=5) | _leaf
).flatmap(lambda d: st.sampled_from([
    json.dumps(d).encode(), json.dumps(d, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass"),
    json.dumps(d).encode()[:-3], json.dumps(d).encode() + b"\n",
]))  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(bodies=st.lists(_body, min_size=1, max_size=3))
async def test_any_body_comes_back_exactly(log: Log, fence: Fence, bodies: list[bytes]) -> None:
    ids = [(await ask(log, fence, body)).id for body in bodies]
    assert [await log.read_request(i) for i in ids] == bodies


def conversation(turns: int, size: int, seed: int = 0) -> list[dict[str, str]]:
    out: list[dict[str, str]] = []
    for turn in range(turns):
        noise = hashlib.shake_256(f"{seed}.{turn}".encode()).hexdigest(size // 2)
        out += [{"role": "user", "content": noise}, {"role": "assistant", "content": f"answer {turn}"}]
    return out


async def stored(db: Database) -> int:
    rows = await db.fetch("SELECT (SELECT coalesce(sum(length(data)), 0) FROM content)"
                          " + (SELECT coalesce(sum(length(parts)), 0) FROM segments)")  # fmt: skip
    return int(rows[0][0])


@pytest.mark.parametrize("form", ["openai", "anthropic", "responses"])
async def test_a_conversation_grows_with_what_is_new(db: Database, log: Log, fence: Fence, form: str) -> None:
    """40 turns of 20 KB are sent as 16 MB and stored as less than what is new in them. The Anthropic form moves its
    cache marker to the newest message each time, as clients do; every second request meets an empty memory."""
    messages = conversation(40, 20_000)
    new = len(json.dumps(messages))
    tools = [{"name": f"t{i}", "description": "d" * 1500} for i in range(8)]
    for turn in range(1, 41):
        sent = json.loads(json.dumps(messages[: 2 * turn - 1]))
        if form == "anthropic":
            sent[-1]["cache_control"] = {"type": "ephemeral"}
            doc = {"max_tokens": 9, "messages": sent, "model": "m", "system": "s" * 9000, "tools": tools}
        elif form == "openai":
            doc = {"messages": sent, "model": "m", "stream": True, "tools": tools, "user": f"changes {turn}"}
        else:
            doc = {"model": "m", "instructions": f"now {turn}", "input": sent, "tools": tools}
        body = json.dumps(doc).encode()
        x = await ask(log if turn % 2 else Log(db), fence, body)
        assert await log.read_request(x.id) == body
    assert await stored(db) < 0.7 * new + 40_000  # hexadecimal compresses to a good half
    assert (await log.verify(fence.session)).ok


async def test_interleaved_conversations_are_each_stored_once(db: Database, log: Log, fence: Fence) -> None:
    talks = [conversation(12, 8000, seed) for seed in range(5)]
    for turn in range(1, 13):
        for talk in talks:
            await ask(log, fence, json.dumps({"messages": talk[: 2 * turn - 1]}).encode())
    assert await stored(db) < 0.7 * len(json.dumps(talks))


async def test_large_parallel_requests(log: Log, fence: Fence) -> None:
    image = os.urandom(5 << 20).hex()
    bodies = [json.dumps({"messages": [{"i": image}, {"n": n}]}).encode() for n in range(4)]
    made = await asyncio.gather(*(ask(log, fence, b) for b in bodies))
    for x, body in zip(made, bodies, strict=True):
        assert await log.read_request(x.id) == body
    with pytest.raises(TooLarge):
        await ask(log, fence, bytes((64 << 20) + 1))


async def test_begin_is_durable_with_its_event_and_repeatable(db: Database, log: Log, fence: Fence) -> None:
    body = b'{"messages":[1]}'
    x = await ask(log, fence, body, "1.1")
    assert (x.state, x.epoch, x.owner, x.received, x.head, x.line, x.attempt, x.seq) == (
        X.OPEN, 1, "owner", 0, None, 1, 1, 1,
    )  # fmt: skip
    assert x.meta == meta_of(body, "1.1")
    assert await log.exchange(x.id) == x
    event = (await log.read(fence.session))[0]
    assert event.type is T.EXCHANGE_REQUESTED and event.key is None
    assert {"exchange": x.id, "provider": "openai", "method": "POST", "path": "/v1/chat/completions", "model": "m",
            "request_bytes": len(body)}.items() <= event.data.items()  # fmt: skip
    assert await ask(log, fence, body, "1.1") == x  # the same call again
    assert (await ask(log, fence, body, "1.2")).id != x.id  # the same question asked anew
    assert (await ask(log, fence, b"other", "1.1")).id != x.id
    first, second = await ask(log, fence, body, ""), await ask(log, fence, body, "")
    assert first.id != second.id
    with pytest.raises(Fenced):
        await ask(log, Fence(session=fence.session, generation="old"), body)
    assert len(await log.list_exchanges(fence.session)) == 5
    with pytest.raises(NotFound):
        await log.exchange("x_none")
    with pytest.raises(NotFound):
        await log.read_request("x_none")


# ---------------------------------------------------------------- responses


def chunk(offset: int, data: bytes, at: int = 0) -> Chunk:
    return Chunk(offset=offset, data=data, at_us=at)


async def test_responses_are_idempotent_by_offset(log: Log, fence: Fence) -> None:
    x = await ask(log, fence, b"q")
    head = ResponseHead(status=200, reason="OK", headers=(("Set-Cookie", "a"), ("set-cookie", "b\0\xff")))
    assert await log.append_response(x.id, 1, head, []) == 0
    assert (await log.exchange(x.id)).head == head
    assert await log.append_response(x.id, 1, None, [chunk(0, b"ab", 1), chunk(2, b"\0\xff", 2)]) == 4
    assert await log.append_response(x.id, 1, None, [chunk(0, b"ab", 1), chunk(2, b"\0\xff", 2)]) == 4
    assert await log.append_response(x.id, 1, None, [chunk(2, b"\0\xff", 9), chunk(4, b"ef", 3)]) == 6
    assert await log.append_response(x.id, 1, None, [chunk(5, b"fg", 4)]) == 7
    with pytest.raises(Conflict, match="7 bytes"):
        await log.append_response(x.id, 1, None, [chunk(8, b"z")])
    with pytest.raises(InvalidInput):
        await log.append_response(x.id, 1, None, [chunk(7, b"z"), chunk(9, b"z")])
    with pytest.raises(Fenced):
        await log.append_response(x.id, 2, None, [chunk(7, b"z")])
    with pytest.raises(NotFound):
        await log.append_response("x_none", 1, None, [chunk(0, b"z")])
    assert await log.read_response(x.id) == [
        chunk(0, b"ab", 1), chunk(2, b"\0\xff", 2), chunk(4, b"ef", 3), chunk(6, b"g", 4),
    ]  # fmt: skip
    assert await log.read_response(x.id, 3) == [chunk(3, b"\xff", 2), chunk(4, b"ef", 3), chunk(6, b"g", 4)]
    assert await log.read_response(x.id, 0, 3) == [chunk(0, b"ab", 1), chunk(2, b"\0\xff", 2)]
    assert await log.read_response(x.id, 7) == []
    with pytest.raises(NotFound):
        await log.read_response("x_none")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=4000), cuts=st.lists(st.integers(0, 4000), max_size=8), offset=st.integers(0, 4000))
async def test_any_response_comes_back(log: Log, fence: Fence, data: bytes, cuts: list[int], offset: int) -> None:
    x = await ask(log, fence, b"q")
    bounds = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    chunks = [chunk(a, data[a:b], a) for a, b in itertools.pairwise(bounds)]
    for n in range(1, len(chunks) + 1):
        await log.append_response(x.id, 1, None, chunks[max(0, n - 2) : n])  # each batch overlaps the last
    assert await log.read_response(x.id, 0, 1 << 20) == chunks
    assert b"".join(c.data for c in await log.read_response(x.id, offset)) == data[offset:]


async def test_finish(log: Log, fence: Fence) -> None:
    x = await ask(log, fence, b"q")
    done = await answer(log, x, b"whole")
    assert (done.state, done.owner, done.received, done.usage) == (
        X.COMPLETE, None, 5, Usage(output_tokens=3, input_tokens=4),
    )  # fmt: skip
    assert await answer(log, x, b"whole") == done  # repeated: no second event
    assert (await types(log, fence)).count("exchange.completed") == 1
    with pytest.raises(Conflict, match="complete"):
        await log.finish_exchange(x.id, 1, X.FAILED, None, completed(x))
    with pytest.raises(Conflict):
        await log.append_response(x.id, 1, None, [chunk(5, b"more")])
    with pytest.raises(Fenced):
        await log.finish_exchange(x.id, 2, X.COMPLETE, None, completed(x))
    with pytest.raises(InvalidInput):
        await log.finish_exchange(x.id, 1, X.OPEN, None, completed(x))


async def test_an_answer_that_comes_after_the_session_moved_on_is_kept(db: Database, log: Log, fence: Fence) -> None:
    x = await ask(log, fence, b"q")
    await move(db, fence, 0, "g2")
    done = await answer(log, x, b"late")
    assert done.state is X.COMPLETE
    event = (await log.read(fence.session, types=[T.EXCHANGE_COMPLETED]))[0]
    assert event.line == 2 and not event.superseded


async def test_take_over(db: Database, log: Log, fence: Fence) -> None:
    x = await ask(log, fence, b"q")
    await log.append_response(x.id, 1, ResponseHead(status=200), [chunk(0, b"cut of")])
    reissued = NewEvent(type=T.EXCHANGE_REISSUED, data={"exchange": x.id})
    taken = await log.take_over(fence, x.id, "new owner", reissued)
    assert (taken.epoch, taken.owner, taken.received, taken.head) == (2, "new owner", 0, None)
    with pytest.raises(Fenced):
        await log.append_response(x.id, 1, None, [chunk(6, b"f")])
    await log.append_response(x.id, 2, ResponseHead(status=201), [chunk(0, b"whole answer")])
    assert [c.data for c in await log.read_response(x.id)] == [b"whole answer"]
    assert (await types(log, fence))[-1] == "exchange.reissued"
    with pytest.raises(Fenced):
        await log.take_over(Fence(session=fence.session, generation="old"), x.id, "zombie")
    await log.finish_exchange(x.id, 2, X.COMPLETE, None, completed(x))
    with pytest.raises(Conflict):
        await log.take_over(fence, x.id, "too late")
    assert (await log.verify(fence.session)).ok


async def test_orphans(log: Log, fence: Fence) -> None:
    x = await ask(log, fence, b"q")
    await log.orphan_exchange(fence, x.id)
    await log.orphan_exchange(fence, x.id)
    assert (await types(log, fence)).count("exchange.orphaned") == 1
    done = await answer(log, x, b"paid for all the same")
    assert done.state is X.ORPHANED and done.usage is not None and done.received == 21
    assert (await log.stats(fence.session))["output_tokens"] == 3
    assert (await answer(log, x, b"paid for all the same")).state is X.ORPHANED
    assert (await types(log, fence)).count("exchange.completed") == 1


async def test_wait_response(log: Log, fence: Fence) -> None:
    x = await ask(log, fence, b"q")
    waiting = asyncio.create_task(log.wait_response(x.id, 0, 20))
    await log.append_response(x.id, 1, None, [chunk(0, b"abc")])
    assert (await asyncio.wait_for(waiting, 10)).received == 3
    waiting = asyncio.create_task(log.wait_response(x.id, 3, 20))
    await log.finish_exchange(x.id, 1, X.FAILED, None, completed(x))
    assert (await asyncio.wait_for(waiting, 10)).state is X.FAILED
    y = await ask(log, fence, b"r")
    assert (await log.wait_response(y.id, 0, 0.05)).received == 0


# ---------------------------------------------------------------- the tail


async def test_tail_is_what_the_restored_agent_will_ask_again(db: Database, log: Log, fence: Fence) -> None:
    before = await ask(log, fence, b"before")
    seq = await log.last_seq(fence.session)
    await snap(db, fence, "snap_a", seq)
    after = [await ask(log, fence, b"after %d" % n) for n in range(4)]
    await log.orphan_exchange(fence, after[1].id)
    await log.finish_exchange(after[2].id, 1, X.TORN, None, NewEvent(type=T.EXCHANGE_TORN))
    two = await move(db, fence, seq, "g2", "snap_a")
    assert [x.id for x in await log.tail(two, "snap_a")] == [after[0].id, after[3].id]
    assert [x.id for x in await log.tail(two, None)] == [before.id, after[0].id, after[3].id]
    with pytest.raises(Fenced):
        await log.tail(fence, "snap_a")
    with pytest.raises(NotFound, match="snap_none"):
        await log.tail(two, "snap_none")

    # what the new line adopted before its own snapshot is on the path; what it adopted after that is not
    first = await log.adopt_exchange(two, after[0].id, "1.9", "digest")
    assert first.id == after[0].id
    await log.adopt_exchange(two, after[0].id, "1.9", "digest")
    assert (await types(log, fence)).count("exchange.adopted") == 1
    seq = await log.last_seq(fence.session)
    await snap(db, two, "snap_b", seq)
    await log.adopt_exchange(two, after[3].id, "1.10", "digest")
    own = await ask(log, two, b"new")
    three = await move(db, two, seq, "g3", "snap_b")
    assert [x.id for x in await log.tail(three, "snap_b")] == [after[3].id, own.id]
    # back to the older snapshot: everything after it is open again
    four = await move(db, three, 1, "g4", "snap_a")
    assert [x.id for x in await log.tail(four, "snap_a")] == [after[0].id, after[3].id, own.id]
    with pytest.raises(NotFound):
        await log.adopt_exchange(four, "x_none", "1.1", "digest")


async def test_tail_is_of_one_attempt(db: Database, log: Log, fence: Fence) -> None:
    await ask(log, fence, b"first attempt")
    async with db.tx() as conn:
        await open_line_in(conn, fence.session, 1, "retry", None, attempt=2)
    assert await log.tail(fence, None) == []
    second = await ask(log, fence, b"second attempt")
    assert [x.id for x in await log.tail(fence, None)] == [second.id]


# ---------------------------------------------------------------- repeats


async def test_every_write_may_be_repeated_after_a_lost_reply(db: Database, log: Log, fence: Fence) -> None:
    """Each call's first transaction commits and its answer is lost."""
    honest = db.retrying

    async def losing(fn: Callable[[], object], **kw: object) -> object:
        lost = False

        async def wrapped() -> object:
            nonlocal lost
            out = await fn()  # type: ignore[misc]
            if not lost:
                lost = True
                raise psycopg.OperationalError("server closed the connection unexpectedly")
            return out

        return await honest(wrapped, **kw)  # type: ignore[arg-type]

    db.retrying = losing  # type: ignore[method-assign,assignment]
    try:
        x = await ask(log, fence, b'{"messages":["%s"]}' % (b"x" * 5000))
        y = await ask(log, fence, b"y")
        taken = await log.take_over(fence, x.id, "o2", NewEvent(type=T.EXCHANGE_REISSUED))
        assert taken.epoch == 2
        await answer(log, taken, b"answer")
        await log.orphan_exchange(fence, y.id)
        await log.adopt_exchange(fence, x.id, "1.5", "digest")
    finally:
        db.retrying = honest  # type: ignore[method-assign]
    assert await types(log, fence) == [
        "exchange.requested", "exchange.requested", "exchange.reissued", "exchange.completed", "exchange.orphaned",
        "exchange.adopted",
    ]  # fmt: skip
    assert (await log.stats(fence.session))["exchanges"] == 2
    assert (await log.verify(fence.session)).ok
