"""Throwaway restores: a snapshot brought to life without a generation, looked at, and destroyed.

guestd in it is never told `go`, so it ignores its channel for ever: no call is answered, no output taken, nothing
reaches the log. The agent's processes are stopped by the first program that is run beside them, within about 0.1 s of
the restore. What happens inside is seen by nobody else, and such a sandbox cannot be saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rethaw.engines.base import Exec, Sandbox, Terminal
from rethaw.model.errors import EngineError, ImageError, RethawError, Unavailable, by_code
from rethaw.model.looking import IDLE_MAX_S, ShellRequest
from rethaw.model.types import MIB, SnapshotInfo
from rethaw.node.parts import Parts

log = logging.getLogger("rethaw.node")

ROOM = 128 * MIB  # for the shell's own programs, beside an agent that may stand at its limit
_SOURCE = Path(__file__).with_name("inside.py")
_FREEZE_S = 20.0
_PYTHON = ("-I", "-S", "-X", "utf8", "-c")
# The agent's working directory may be gone; the shell is bash where there is one.
_COMMAND = 'cd "$0" 2>/dev/null || cd /; exec "$@"'
_SHELL = 'cd "$0" 2>/dev/null || cd /; command -v bash >/dev/null && exec bash; exec sh'


class Throwaway:
    """One sandbox. `frozen`: how many of its processes stand still."""

    def __init__(self, snapshot: str, sandbox: Sandbox, python: str) -> None:
        self.snapshot = snapshot
        self._python = python
        self.sandbox = sandbox
        self.frozen = 0

    async def tell(self, verb: str, path: bytes | None = None) -> Exec:
        """Start `inside` with a verb."""
        words = () if path is None else (path.hex(),)
        return await self.sandbox.exec([self._python, *_PYTHON, _SOURCE.read_text(), verb, *words])

    async def destroy(self) -> None:
        await self.sandbox.destroy()


class Throwaways:
    """All of one node. `limit`: at once; `keep_s`: how long one that was read from is kept for the next read."""

    def __init__(self, parts: Parts, *, limit: int = 8, keep_s: float = 5.0) -> None:
        self._parts = parts
        self._limit = limit
        self._keep_s = keep_s
        self._open: set[Throwaway] = set()
        self._opening = 0
        self._none_opening = asyncio.Event()
        self._none_opening.set()
        self._shared: dict[str, _Shared] = {}
        self._closed = False

    async def open(self, info: SnapshotInfo) -> Throwaway:
        """A new one, its processes frozen. The caller closes it by `discard`.

        Raises SnapshotUnusable, StorageFull, EngineError, ImageError; Unavailable when there are too many.
        """
        if self._closed:
            raise Unavailable("the server is stopping", remedy="try again when it is back")
        if len(self._open) + self._opening >= self._limit:
            raise Unavailable(
                f"{self._limit} throwaway restores are open, which is the limit", remedy="end a `rethaw shell` first"
            )
        self._opening += 1
        self._none_opening.clear()
        try:
            throwaway = Throwaway(info.id, *await self._restore(info))
            self._open.add(throwaway)
        finally:
            self._opening -= 1
            if not self._opening:
                self._none_opening.set()
        try:
            if self._closed:
                raise Unavailable("the server is stopping", remedy="try again when it is back")
            async with asyncio.timeout(_FREEZE_S):
                out = await drain(await throwaway.tell("freeze"))
            throwaway.frozen = int(out)
        except BaseException as error:
            await self.discard(throwaway)
            if isinstance(error, (TimeoutError, ValueError)):
                raise EngineError(f"the processes in a restore of {info.id} could not be stopped: {error}") from error
            raise
        log.info("throwaway %s of snapshot %s, %d processes stopped", throwaway.sandbox.id, info.id, throwaway.frozen)
        return throwaway

    async def _restore(self, info: SnapshotInfo) -> tuple[Sandbox, str]:
        """The sandbox, and the interpreter of Rethaw's own part in it."""
        parts = self._parts
        agent = await parts.control.agent_of(info.session, info.attempt)
        rootfs = await parts.images.rootfs(info.image)
        if rootfs is None:
            built = await parts.images.ensure(agent.image, lambda _: None)
            code = parts.data_dir / "code" / f"{agent.code}.tar.gz" if agent.code else None
            digest, rootfs = await parts.images.compose(built, code)
            if digest != info.image:
                raise ImageError(f"snapshot {info.id} needs image {info.image[:12]}, which is not here any more")
        spec = await parts.sandbox_spec(info.image, rootfs, agent.memory_bytes, agent.pids)
        engine = parts.engines.of(info.engine)
        if not engine.fixed_memory:
            # Sandboxes created ahead are for sessions; this one is of another size, so it takes none.
            spec = dataclasses.replace(spec, memory_bytes=spec.memory_bytes + ROOM)
        sections = await parts.store.load(info)
        try:
            restored = await engine.restore(spec, sections, build=info.engine_build, cpu=info.cpu, clock=info.clock)
            return restored, spec.argv[0]
        finally:
            parts.store.done(info.id)

    async def discard(self, throwaway: Throwaway) -> None:
        """Destroy it."""
        self._open.discard(throwaway)
        await throwaway.destroy()

    @contextlib.asynccontextmanager
    async def reading(self, info: SnapshotInfo) -> AsyncGenerator[Throwaway]:
        """One that others may read from as well. It is kept for a while, for the next read."""
        shared = self._shared.get(info.id)
        if shared is None:
            shared = self._shared[info.id] = _Shared(asyncio.ensure_future(self.open(info)))
        if shared.ending is not None:
            shared.ending.cancel()
            shared.ending = None
        shared.users += 1
        keep_s = 0.0
        try:
            # Shielded: the first one's caller may leave while others wait for it.
            throwaway = await asyncio.shield(shared.opening)
            keep_s = self._keep_s
            yield throwaway
        except EngineError:
            keep_s = 0.0
            raise
        finally:
            shared.users -= 1
            if not keep_s and self._shared.get(info.id) is shared:
                del self._shared[info.id]  # what has failed once is not given to the next
            if not shared.users:
                shared.ending = asyncio.ensure_future(self._end_later(info.id, shared, keep_s))

    async def _end_later(self, snapshot: str, shared: _Shared, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if self._shared.get(snapshot) is shared:
            del self._shared[snapshot]
        await self._end(shared)

    async def _end(self, shared: _Shared) -> None:
        with contextlib.suppress(RethawError, OSError, asyncio.CancelledError):
            await self.discard(await shared.opening)

    async def close(self) -> None:
        """The node stops: destroy them all."""
        self._closed = True
        shared = list(self._shared.values())
        self._shared.clear()
        for one in shared:
            if one.ending is not None:
                one.ending.cancel()
        await asyncio.gather(*(self._end(one) for one in shared))
        await self._none_opening.wait()  # they find out at their next step
        await asyncio.gather(*(self.discard(one) for one in list(self._open)), return_exceptions=True)


@dataclass
class _Shared:
    """A throwaway for readers."""

    opening: asyncio.Task[Throwaway]
    users: int = 0
    ending: asyncio.Task[None] | None = None


# ---------------------------------------------------------------- what `inside` says


def complaint(text: bytes, code: int) -> RethawError:
    """The error that `inside` told on its standard error."""
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        said = json.loads(text.splitlines()[-1])
        return cast("RethawError", by_code(str(said["code"]))(str(said["message"])))
    tail = text.decode(errors="replace").strip()[-300:]
    return EngineError(f"reading in a throwaway restore failed with {code}: {tail or 'it said nothing'}")


async def stream(run: Exec) -> AsyncIterator[bytes]:
    """What it prints, chunk by chunk. Raises what it complains of; closes it in any case."""
    errors = b""
    try:
        while (got := await run.read()) is not None:
            if got[0] == "stdout":
                yield got[1]
            else:
                errors = (errors + got[1])[-65536:]
        code = await run.wait()
        if code != 0:
            raise complaint(errors, code)
    finally:
        await run.close()


async def drain(run: Exec) -> bytes:
    """All that it prints."""
    return b"".join([chunk async for chunk in stream(run)])


def lines(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# ---------------------------------------------------------------- shells


class NodeShell:
    """See `model.looking.Shell`."""

    def __init__(self, owner: Throwaways, throwaway: Throwaway, run: Exec, idle_s: float) -> None:
        self.frozen = throwaway.frozen
        self._owner = owner
        self._throwaway = throwaway
        self._run = run
        self._why = ""
        self._active = time.monotonic()
        self._watch = [asyncio.ensure_future(self._idle(idle_s)), asyncio.ensure_future(self._died())]

    @classmethod
    async def start(cls, owner: Throwaways, info: SnapshotInfo, workdir: str, request: ShellRequest) -> NodeShell:
        """Restore and run."""
        throwaway = await owner.open(info)
        size = request.terminal
        terminal = None if size is None else Terminal(size.columns, size.rows, size.kind)
        argv: Sequence[str] = ["/bin/sh", "-c", _SHELL, workdir]
        if request.command:
            argv = ["/bin/sh", "-c", _COMMAND, workdir, *request.command]
        try:
            run = await throwaway.sandbox.exec(argv, env=[("RETHAW_SNAPSHOT", info.id)], terminal=terminal)
        except BaseException:
            await owner.discard(throwaway)
            raise
        return cls(owner, throwaway, run, min(request.idle_s, IDLE_MAX_S))

    async def read(self) -> tuple[str, bytes] | None:
        got = await self._run.read()
        self._active = time.monotonic()
        return got

    async def write(self, data: bytes) -> None:
        self._active = time.monotonic()
        await self._run.write(data)

    def end_input(self) -> None:
        self._run.end_input()

    def resize(self, columns: int, rows: int) -> None:
        self._run.resize(columns, rows)

    async def wait(self) -> tuple[int, str]:
        return await self._run.wait(), self._why

    async def _idle(self, limit_s: float) -> None:
        left = limit_s
        while left > 0:
            await asyncio.sleep(left)
            left = self._active + limit_s - time.monotonic()
        self._why = f"nothing was typed or shown for {limit_s:g} s"
        self._throwaway.sandbox.kill()

    async def _died(self) -> None:
        end = await self._throwaway.sandbox.wait()  # the program ends with it
        self._why = self._why or f"the throwaway sandbox is gone: {end.detail}"

    async def close(self) -> None:
        for task in self._watch:
            task.cancel()
        await self._run.close()
        await self._owner.discard(self._throwaway)
        await asyncio.gather(*self._watch, return_exceptions=True)


async def workdir_of(parts: Parts, info: SnapshotInfo) -> str:
    """Where the agent was started."""
    agent = await parts.control.agent_of(info.session, info.attempt)
    return "/app" if agent.entry and agent.workdir == "/" else agent.workdir
