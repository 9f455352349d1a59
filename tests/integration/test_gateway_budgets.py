"""The gateway asks before a model call of a session with a budget goes upstream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from gateway_fixtures import MemoryLog, Rig, make_rig

from rethaw.model.enums import EventType
from rethaw.model.errors import Fenced
from rethaw.model.types import BudgetSpec, CallAsked, Fence
from rethaw.testing.provider import ScriptedProvider, echo


def chat(text: str, model: str = "m-1") -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()


class Books:
    """Admits `most` calls, by what the log has."""

    def __init__(self, log: MemoryLog, most: int = 100) -> None:
        self.log = log
        self.most = most
        self.refusal: str | None = None
        self.asked: list[CallAsked] = []

    async def admit(self, fence: Fence, call: CallAsked) -> str | None:
        assert fence == self.log.fence
        self.asked.append(call)
        await asyncio.sleep(0.01)
        if len(self.log.of(EventType.EXCHANGE_UPSTREAM)) >= self.most:
            raise Fenced("the budget is used up")
        return self.refusal


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with ScriptedProvider(echo) as p:
        yield p


@pytest.fixture
async def rig(provider: ScriptedProvider) -> AsyncIterator[Rig]:
    rig = await make_rig(provider, budget=BudgetSpec(model_calls=2))
    yield rig
    await rig.gateway.close()


def books(rig: Rig, most: int = 100) -> Books:
    made = Books(rig.log, most)
    rig.gateway._shared.books = made  # pyright: ignore[reportPrivateUsage]
    return made


async def test_asked_once_before_each_model_call(rig: Rig) -> None:
    asked = books(rig)
    call = await rig.ask(chat("hi"))
    assert call.status == 200
    (one,) = asked.asked
    assert (one.guest_id, one.model) == ("1.1", "m-1")
    assert one.digest == rig.log.rows[call.exchange or ""].x.meta.digest
    await rig.ask(b"", path="/v1/models", method="GET")
    assert len(asked.asked) == 1


async def test_a_session_without_a_budget_is_not_asked_about(provider: ScriptedProvider) -> None:
    rig = await make_rig(provider)
    asked = books(rig, most=0)
    assert (await rig.ask(chat("hi"))).status == 200 and asked.asked == []
    await rig.gateway.close()


async def test_a_refused_call_is_answered_here_and_never_sent(rig: Rig) -> None:
    books(rig).refusal = 'model "m-1" has no price; add [prices."m-1"]'
    call = await rig.ask(chat("hi"))
    assert call.status == 400 and b'[prices.\\"m-1\\"]' in call.data
    assert rig.provider.calls == [] and rig.upstream_tries() == 0
    row = rig.log.rows[call.exchange or ""]
    assert not row.x.meta.model_call and rig.gate.asked == []


async def test_parallel_calls_do_not_go_over_it_together(rig: Rig) -> None:
    books(rig, most=2)
    calls = [rig.call(chat(f"n{n}")) for n in range(6)]
    rig.serve(*calls)
    done = await asyncio.gather(*(rig.tasks[id(c)] for c in calls), return_exceptions=True)
    assert [type(d) for d in done].count(Fenced) == 4
    assert len(rig.provider.calls) == 2
    assert sorted(c.status or 0 for c in calls) == [0, 0, 0, 0, 200, 200]


async def test_what_the_log_answers_costs_nothing(rig: Rig) -> None:
    asked = books(rig, most=1)
    call = rig.call(chat("hi"))
    await rig.snapshot("before")
    rig.serve(call)
    await rig.done(call)
    await rig.restore("before")
    again = rig.call(chat("hi"))
    again.meta["guest_id"] = call.meta["guest_id"]
    rig.serve(again)
    await rig.done(again)
    assert again.data == call.data and len(asked.asked) == 1 and len(rig.provider.calls) == 1
