"""Programs run in a sandbox beside its own: streams, exit codes, terminals, and that it is never saved afterwards."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import ask, restored

from rethaw.engines.base import Engine, Exec, SandboxSpec, Terminal
from rethaw.model.errors import EngineError

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


async def whole(run: Exec) -> tuple[bytes, bytes, int]:
    """All that it writes, and its exit code."""
    out = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(30):
        while (got := await run.read()) is not None:
            out[got[0]] += got[1]
        code = await run.wait()
    await run.close()
    return out["stdout"], out["stderr"], code


class Screen:
    """What a terminal shows, in one string."""

    def __init__(self, run: Exec) -> None:
        self.run = run
        self.seen = ""

    async def until(self, text: str) -> None:
        async with asyncio.timeout(20):
            while text not in self.seen:
                got = await self.run.read()
                assert got is not None, f"it ended before {text!r}: {self.seen!r}"
                self.seen += got[1].decode(errors="replace")

    async def say(self, text: str) -> None:
        self.seen = ""
        await self.run.write(text.encode())


async def test_a_program_has_its_streams_and_its_exit_code(boot: Any) -> None:
    box = await boot()
    script = 'read line; echo "got $line"; cat; echo problem >&2; echo "$MARK $MORE"; pwd; exit 7'
    run = await box.exec(["/bin/sh", "-c", script], cwd="/tmp", env=[("MORE", "a=b c")])
    await run.write(b"first\nand the rest")
    run.end_input()
    assert await whole(run) == (b"got first\nand the restconformance a=b c\n/tmp\n", b"problem\n", 7)
    killed = await box.exec(["/bin/sh", "-c", "kill -9 $$"])
    assert (await whole(killed))[2] == 137
    # no more than the guest's programs have; CAP_SYS_ADMIN is PID 1's
    (status, _, _) = await whole(await box.exec(["/bin/cat", "/proc/self/status"]))
    for name in (b"CapPrm", b"CapEff", b"CapBnd"):
        assert name + b":\t00000000000004fb\n" in status
    missing = await box.exec(["/no/such/program"])
    assert (await whole(missing))[2] != 0
    assert await ask(box, "1 + 1") == 2, "the guest goes on beside it"


async def test_much_output_comes_whole_and_waits_for_its_reader(boot: Any) -> None:
    box = await boot()
    run = await box.exec(["/bin/sh", "-c", "head -c 5000000 /dev/zero; echo end"])
    out, _, code = await whole(run)
    assert (len(out), out[-4:], code) == (5000004, b"end\n", 0)


async def test_a_child_that_keeps_the_output_open_holds_up_nobody(boot: Any) -> None:
    box = await boot()
    run = await box.exec(["/bin/sh", "-c", "sleep 1000 & echo started"])
    assert await whole(run) == (b"started\n", b"", 0)


async def test_a_terminal_has_a_size_and_ctrl_c(boot: Any) -> None:
    box = await boot()
    run = await box.exec(["/bin/bash", "--norc"], env=[("PS1", "ready> ")], terminal=Terminal(101, 33, "vt100"))
    screen = Screen(run)
    await screen.until("ready> ")
    await screen.say("stty size; echo $TERM\n")
    await screen.until("33 101\r\nvt100\r\n")
    await screen.until("ready> ")
    await screen.say("trap 'stty size; echo changed' WINCH\n")
    await screen.until("ready> ")
    run.resize(122, 44)
    await screen.until("44 122\r\nchanged")
    await screen.say("sh -c 'echo begun; exec sleep 1000'\n")
    await screen.until("begun\r\n")
    await screen.say("\x03")
    await screen.until("ready> ")
    await screen.say("echo code $?\n")
    await screen.until("code 130\r\n")
    await screen.until("ready> ")
    await screen.say("sh -c 'echo begun; exec cat'\n")
    await screen.until("begun\r\n")
    await screen.say("word\n")
    await screen.until("word\r\nword\r\n")
    await screen.say("\x04")
    await screen.until("ready> ")
    await screen.say("exit 3\n")
    assert (await whole(run))[2] == 3


async def test_a_restored_sandbox_takes_a_program_and_is_never_saved_again(
    engine: Engine, spec: SandboxSpec, boot: Any, staging: Path
) -> None:
    box = await boot()
    await ask(box, "open('/root/kept', 'w').write('from before') and None")
    saved = await box.capture(staging / "one")
    twin = await boot(await restored(engine, spec, saved))
    assert (await whole(await twin.exec(["/bin/cat", "/root/kept"])))[0] == b"from before"
    with pytest.raises(EngineError, match="cannot be saved: a program was run in it"):
        await twin.capture(staging / "two")
    assert not (staging / "two").exists()
    assert await ask(box, "open('/root/kept').read()") == "from before"
    await box.capture(staging / "three")


async def test_a_sandbox_that_goes_ends_its_programs(boot: Any) -> None:
    box = await boot()
    run = await box.exec(["/bin/sh", "-c", "echo up; sleep 1000"])
    assert await run.read() == ("stdout", b"up\n")
    await box.destroy()
    assert (await whole(run))[2] != 0
    with pytest.raises(EngineError, match="is gone"):
        await box.exec(["/bin/true"])
