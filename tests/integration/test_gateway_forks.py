"""Model traffic of forks and of rewound sessions: what is served from the shared log, what is asked anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    AGENT,
    World,
    cluster_fixture,
    dsn_fixture,
    eventually,
    world_fixture,
)
from gateway_fixtures import CHAT, Call, FakeStream, Gate, Hooks, providers

from rethaw.gateway import Gateway, SessionGateway
from rethaw.model.enums import EventType, Reason, State
from rethaw.model.types import Fence, SnapshotInfo
from rethaw.testing.provider import Reply, ScriptedProvider, echo

E = EventType


def chat(text: str, **more: object) -> bytes:
    return json.dumps({"model": "m-1", "messages": [{"role": "user", "content": text}], **more}).encode()


@dataclass
class Guest:
    """One life of a session, seen from its gateway."""

    w: World
    gateway: SessionGateway
    fence: Fence
    counter: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def call(self, body: bytes) -> Call:
        self.counter += 1
        meta: dict[str, object] = {"provider": "openai", "method": "POST", "path": CHAT, "query": "", "headers": [],
                                   "guest_id": f"1.{self.counter}"}  # fmt: skip
        call = Call(meta, body)
        self.serve(call)
        return call

    def serve(self, *calls: Call) -> None:
        self.gateway.hello([c.exchange for c in calls if c.exchange], {})
        self.tasks += [asyncio.create_task(self.gateway.handle(FakeStream(c))) for c in calls]

    async def done(self) -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*self.tasks)

    async def ask(self, body: bytes) -> Call:
        call = self.call(body)
        await self.done()
        return call

    async def freeze(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()
        await self.gateway.flush()

    async def save(self) -> SnapshotInfo:
        await self.gateway.flush()
        return await self.w.save(self.fence)

    async def count(self, *kinds: EventType) -> int:
        await self.gateway.flush()
        return len([e for e in await self.w.events(self.fence.session, *kinds) if e.session == self.fence.session])


@dataclass
class House:
    w: World
    provider: ScriptedProvider
    gateway: Gateway

    async def boot(self) -> Guest:
        session, fence = await self.w.start(AGENT.model_copy(update={"hold_max_s": 0.0}))
        return await self._life(session, fence, None, None)

    async def _life(self, session: str, fence: Fence, snapshot: str | None, branch: int | None) -> Guest:
        view = await self.w.control.session(session)
        gateway = self.gateway.session(session, view.agent)
        gateway.attach(fence, view.attempt, Gate(), Hooks(), branch=branch)
        await gateway.restored(snapshot)
        return Guest(self.w, gateway, fence)

    async def back(self, session: str, counter: int = 0) -> Guest:
        """The session's next life."""
        a, fence = await self.w.back(session)
        assert a.snapshot is not None
        guest = await self._life(session, fence, a.snapshot.id, a.branch)
        guest.counter = counter
        return guest

    async def fork(self, session: str, at: int | str | None, counter: int = 0) -> Guest:
        (view,) = await self.w.control.fork(session, at)
        return await self.back(view.id, counter)


@pytest.fixture(name="h")
async def house_fixture(w: World) -> AsyncIterator[House]:
    async with ScriptedProvider(echo) as provider:
        gateway = Gateway(w.log, providers(provider), "node-1", batch_ms=5)
        await gateway.start()
        yield House(w, provider, gateway)
        await gateway.close()


async def has(call: Call, size: int) -> bool:
    return len(call.data) >= size


async def end_of(w: World, call: Call) -> int:
    events = await w.log.read((await w.log.exchange(call.exchange or "")).session, all_lines=True)
    return next(e.seq for e in events if e.type == E.EXCHANGE_COMPLETED and e.data["exchange"] == call.exchange)


async def test_answers_up_to_there_are_served_and_no_further(h: House) -> None:
    guest = await h.boot()
    await guest.ask(chat("one"))
    info = await guest.save()
    two = await guest.ask(chat("two"))
    at = await end_of(h.w, two)
    await guest.ask(chat("three"))
    await guest.save()
    fork = await h.fork(guest.fence.session, at, counter=1)
    assert (await h.w.control.session(fork.fence.session)).snapshot == info.id
    again = await fork.ask(chat("two"))
    assert again.data == two.data and again.exchange == two.exchange and h.provider.count == 3
    assert await fork.count(E.EXCHANGE_SERVED) == 1 and await fork.count(E.EXCHANGE_UPSTREAM) == 0
    new = await fork.ask(chat("three"))
    assert new.ended and h.provider.count == 4
    assert await fork.count(E.EXCHANGE_ADOPTED) == 1 and await fork.count(E.EXCHANGE_REQUESTED) == 1
    assert await h.w.log.read_request(new.exchange or "") == chat("three")
    # Once: a second question of the same words is a new one.
    await fork.ask(chat("two"))
    assert h.provider.count == 5
    assert (await h.w.log.verify(fork.fence.session)).problems == []


async def test_a_crash_of_the_fork_pays_for_nothing_twice(h: House) -> None:
    guest = await h.boot()
    info = await guest.save()
    two = await guest.ask(chat("two"))
    fork = await h.fork(guest.fence.session, await end_of(h.w, two))
    assert (await fork.ask(chat("two"))).data == two.data
    mine = await fork.ask(chat("mine"))
    for _ in range(2):
        await fork.freeze()
        await fork.gateway.detach()
        await h.w.control.report_death(fork.fence, Reason.SANDBOX_DIED, "x")
        fork = await h.back(fork.fence.session)
        assert (await h.w.control.session(fork.fence.session)).snapshot == info.id
        assert (await fork.ask(chat("two"))).data == two.data
        assert (await fork.ask(chat("mine"))).data == mine.data
    assert h.provider.count == 2


async def test_a_call_that_was_open_is_issued_again_once_for_each_fork(h: House) -> None:
    guest = await h.boot()
    h.provider.fail(Reply(first_byte_s=0.5, text="for the parent"))
    call = guest.call(chat("open"))
    await h.provider.wait_for_calls(1)
    info = await guest.save()
    saved = call.copy()
    assert saved.exchange is not None and not saved.head
    forks = [await h.fork(guest.fence.session, info.id, counter=1) for _ in range(2)]
    memories = [saved.copy() for _ in forks]
    for number, (fork, memory) in enumerate(zip(forks, memories, strict=True)):
        h.provider.fail(Reply(text=f"for fork {number}"))
        fork.serve(memory)
        await fork.done()
        assert memory.ended and f"for fork {number}".encode() in memory.data
        assert memory.exchange not in (None, saved.exchange)
    await guest.done()
    assert b"for the parent" in call.data and h.provider.count == 3
    # Its crash goes back to the parent's snapshot, which knows the parent's exchange only.
    fork, first = forks[0], memories[0]
    await fork.freeze()
    await fork.gateway.detach()
    await h.w.control.report_death(fork.fence, Reason.SANDBOX_DIED, "x")
    fork = await h.back(fork.fence.session, counter=1)
    again = saved.copy()
    fork.serve(again)
    await fork.done()
    assert again.data == first.data and again.exchange == first.exchange and h.provider.count == 3
    own = await fork.save()
    # A fork of the fork has its answer.
    child = await h.fork(fork.fence.session, own.id, counter=1)
    again = saved.copy()
    again.exchange = first.exchange
    child.serve(again)
    await child.done()
    assert again.data == first.data and h.provider.count == 3
    assert (await h.w.log.verify(child.fence.session)).problems == []


async def test_an_answer_that_is_half_in_the_guest_is_torn(h: House) -> None:
    guest = await h.boot()
    h.provider.fail(Reply(text="y" * 400, chunk_s=0.02))
    call = guest.call(chat("long", stream=True))
    await eventually(lambda: has(call, 200))
    saved = call.copy()
    info = await guest.save()
    fork = await h.fork(guest.fence.session, info.id, counter=1)
    fork.serve(saved)
    await fork.done()
    assert saved.broken and h.provider.count == 1
    (event,) = [e for e in await h.w.events(fork.fence.session, E.EXCHANGE_TORN) if e.session == fork.fence.session]
    assert event.data["exchange"] == call.exchange and event.data["guest_bytes"] == len(saved.data)
    await guest.done()
    assert call.ended and not call.broken  # the parent's goes on
    assert await guest.count(E.EXCHANGE_TORN) == 0


async def test_an_answer_that_ended_before_goes_on_by_offset(h: House) -> None:
    guest = await h.boot()
    call = guest.call(chat("hi", stream=True))
    saved = call.copy()
    await guest.done()
    saved.exchange, saved.head, saved.data = call.exchange, call.head, call.data[:10]
    info = await guest.save()  # of a guest that had not read on
    fork = await h.fork(guest.fence.session, info.id, counter=1)
    fork.serve(saved)
    await fork.done()
    assert saved.ended and saved.data == call.data and h.provider.count == 1


async def test_after_a_rewind_the_same_question_is_asked_anew(h: House) -> None:
    guest = await h.boot()
    session = guest.fence.session
    one = await guest.ask(chat("one"))
    info = await guest.save()
    two = await guest.ask(chat("two"))
    await guest.ask(chat("three"))
    await guest.freeze()
    await guest.gateway.attempt_ended()
    await h.w.report(guest.fence, State.COMPLETED, exit_code=0)
    await guest.gateway.close()
    await h.w.control.rewind(session, await end_of(h.w, two))
    guest = await h.back(session, counter=1)
    assert (await guest.ask(chat("two"))).data == two.data
    assert h.provider.count == 3
    new = await guest.ask(chat("three"))
    assert new.ended and h.provider.count == 4
    await guest.freeze()
    await guest.gateway.detach()
    await h.w.control.report_death(guest.fence, Reason.SANDBOX_DIED, "x")
    guest = await h.back(session, counter=1)
    assert (await guest.ask(chat("two"))).data == two.data
    assert (await guest.ask(chat("three"))).exchange == new.exchange and h.provider.count == 4
    await h.w.control.rewind(session, info.id)
    guest = await h.back(session, counter=1)
    await guest.ask(chat("two"))
    assert h.provider.count == 5 and one.ended
    assert (await h.w.log.verify(session)).problems == []
    assert await guest.count(E.EXCHANGE_ORPHANED) == 0


async def test_a_rewind_issues_what_was_open_again_though_it_is_still_coming(h: House) -> None:
    guest = await h.boot()
    session = guest.fence.session
    h.provider.fail(Reply(first_byte_s=0.6, text="old"))
    call = guest.call(chat("open"))
    await h.provider.wait_for_calls(1)
    info = await guest.save()
    saved = call.copy()
    await guest.freeze()
    await guest.gateway.detach()
    await h.w.control.rewind(session, info.id)
    h.provider.fail(Reply(text="new"))
    guest = await h.back(session, counter=1)
    guest.serve(saved)
    await guest.done()
    assert b"new" in saved.data and h.provider.count == 2 and saved.exchange != call.exchange

    async def both_ended() -> bool:  # what the left line asked for is paid, and kept
        return len(await h.w.log.read(session, types=[E.EXCHANGE_COMPLETED], all_lines=True)) == 2

    await eventually(both_ended)


async def test_a_guest_cannot_name_what_its_line_never_knew(h: House) -> None:
    guest = await h.boot()
    info = await guest.save()
    later = await guest.ask(chat("later"))
    fork = await h.fork(guest.fence.session, info.id)
    lie = Call({"provider": "openai", "method": "POST", "path": CHAT, "query": "", "headers": [], "guest_id": "1.1"},
               chat("later"), exchange=later.exchange)  # fmt: skip
    fork.serve(lie)
    await fork.done()
    assert lie.broken and not lie.data and h.provider.count == 1


async def test_long_conversations_are_not_stored_again(h: House) -> None:
    guest = await h.boot()
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"{i}" + "x" * 4000} for i in range(40)]})
    await guest.ask(body.encode())
    info = await guest.save()
    fork = await h.fork(guest.fence.session, info.id, counter=1)
    longer = body[:-2] + ', {"role": "user", "content": "and now?"}]}'
    asked = await fork.ask(longer.encode())
    stored = await h.w.sql("SELECT coalesce(sum(size), 0) FROM content WHERE session = %s", fork.fence.session)
    assert stored[0][0] < 4000
    h.w.log._memory.forget(guest.fence.session)  # pyright: ignore[reportPrivateUsage] - as after a restart
    h.w.log._memory.forget(fork.fence.session)  # pyright: ignore[reportPrivateUsage]
    again = await fork.ask(longer.replace("and now?", "and then?").encode())
    stored = await h.w.sql("SELECT coalesce(sum(size), 0) FROM content WHERE session = %s", fork.fence.session)
    assert stored[0][0] < 4000
    assert await h.w.log.read_request(asked.exchange or "") == longer.encode()
    assert await h.w.log.read_request(again.exchange or "") == longer.replace("and now?", "and then?").encode()
    assert (await h.w.log.verify(fork.fence.session)).problems == []
