"""The release gate: an answer waits for a snapshot that holds the request it answers, the newest one of it."""

from __future__ import annotations

import asyncio

from rethaw.node.gate import Gate


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_answer_waits_for_its_snapshot() -> None:
    gate = Gate()
    gate.requested("x1")
    waiting = asyncio.ensure_future(gate.released("x1"))
    before = gate.captured()
    gate.requested("x2")
    await settle()
    assert not waiting.done()
    gate.cover(before)
    await asyncio.wait_for(waiting, 1)
    later = asyncio.ensure_future(gate.released("x2"))
    await settle()
    assert not later.done()
    gate.cover(gate.captured())
    await asyncio.wait_for(later, 1)


async def test_a_request_that_came_again_during_a_save_is_not_released_by_it() -> None:
    gate = Gate()
    gate.requested("x1")
    captured = gate.captured()
    gate.requested("x1")  # its client gave up and asked again; the guest as captured does not know
    waiting = asyncio.ensure_future(gate.released("x1"))
    gate.cover(captured)
    await settle()
    assert not waiting.done()
    gate.cover(gate.captured())
    await asyncio.wait_for(waiting, 1)


async def test_whoever_waited_for_the_first_request_waits_for_the_second() -> None:
    gate = Gate()
    gate.requested("x1")
    waiting = asyncio.ensure_future(gate.released("x1"))
    await settle()
    gate.requested("x1")
    await settle()
    assert not waiting.done()
    gate.cover(gate.captured())
    await asyncio.wait_for(waiting, 1)


async def test_what_nobody_requested_is_free() -> None:
    await asyncio.wait_for(Gate().released("x1"), 1)


async def test_giving_up_lets_everything_go_until_it_is_closed_again() -> None:
    gate = Gate()
    gate.requested("x1")
    waiting = asyncio.ensure_future(gate.released("x1"))
    await settle()
    gate.give_up()
    await asyncio.wait_for(waiting, 1)
    gate.requested("x2")
    await asyncio.wait_for(gate.released("x2"), 1)
    gate.close()
    held = asyncio.ensure_future(gate.released("x2"))
    await settle()
    assert not held.done()
    gate.cover(gate.captured())
    await asyncio.wait_for(held, 1)
