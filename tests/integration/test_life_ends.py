"""What a life ends with: the reason that a session's log names."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace
from typing import Any

from link_fixtures import guest, until

from rethaw.engines.base import Exit
from rethaw.model.enums import Reason
from rethaw.node.life import Life


async def test_a_guest_that_ran_out_of_memory_in_the_middle_of_a_ping_was_called_unresponsive() -> None:
    """Its channel breaks before its sandbox has said why it is going: a moment by gVisor, a second by an emulated machine."""
    async with guest() as g:
        await g.start("sleep", "1000")
        gone: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        life: Any = Life.__new__(Life)  # of all that it has, what watches its end
        life.parts = SimpleNamespace(timing=SimpleNamespace(ping_every=0.0, ping_timeout=20.0))
        life.agent = SimpleNamespace(memory_bytes=96 << 20)
        life.saver = SimpleNamespace(frozen=False)
        life.sandbox = SimpleNamespace(wait=lambda: asyncio.shield(gone), kill=lambda: None)
        life.link, life.ended = g.link, asyncio.get_running_loop().create_future()
        pinging, watching = asyncio.ensure_future(life._ping()), asyncio.ensure_future(life._watch_death())
        g.process.send_signal(signal.SIGSTOP)
        await until(lambda: g.link._pongs, 10)  # pyright: ignore[reportPrivateUsage]
        g.process.kill()
        await asyncio.wait_for(pinging, 10)
        assert not life.ended.done()
        gone.set_result(Exit(137, True, "out of memory"))
        await asyncio.wait_for(watching, 10)
        assert life.ended.result() == (Reason.OUT_OF_MEMORY, "the sandbox went over its memory limit of 96 MiB")
