"""Sections that are read when they are touched: the node's side of `lazyd`, the file system's process.

    DIRECTORY/RANDOM/NAME         a file, in a mount of one server; the directory is closed to all but root
    DIRECTORY/NAME.table          while it is being opened

A process without rights gets at a file by a descriptor that it inherits (/proc/self/fd/N). What maps a file needs the
server for as long as it lives: when the server dies, a page that was not read before is a SIGBUS for its readers. Later
files come from a new server. A node that was killed takes its server with it, and what it left goes with the next start.

Around a page that is touched the kernel reads nothing: the server gives it what lies in the same frame. But where a process
asked for huge pages (MADV_HUGEPAGE), as QEMU does for a guest's memory, it reads 4 MiB. MADV_NOHUGEPAGE takes that back,
in that process, before the guest runs.

A server that hangs is asked for an answer now and then (`_WATCH_S`), and ended when none comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import select
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from rethaw.model.errors import KeyMissing, RethawError, SnapshotUnusable, Unavailable
from rethaw.snapshots import lazyd
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pages import PAGE

log = logging.getLogger("rethaw.snapshots")

_START_S = 20.0
_CALL_S = 60.0
_WATCH_S = (2.0, 15.0)  # between two questions whether it lives, and for the answer
_END_S = 5.0
_LINE = 1 << 28
READ_AHEAD_KIB = 0
_KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "FUSE_LIBRARY_PATH", "LANG")

Ranges = Sequence[tuple[int, int]]  # first page, number of pages
Damage = Callable[["LazyFile", str], None]


class _Server:
    """One process and its mount."""

    def __init__(
        self, mount: Path, process: asyncio.subprocess.Process, event: Callable[[dict[str, Any]], None]
    ) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self.mount = mount
        self._process, self._event = process, event
        self._in, self._out, self._err = process.stdin, process.stdout, process.stderr
        self._pidfd = os.pidfd_open(process.pid)
        self._waiting: deque[asyncio.Future[dict[str, Any]]] = deque()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._said: deque[str] = deque(maxlen=5)
        self.ended = asyncio.Event()
        self._tasks = [asyncio.create_task(self._answers()), asyncio.create_task(self._complaints())]
        self._watching: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(self._pidfd, self._died)

    @classmethod
    async def start(
        cls, directory: Path, init: dict[str, Any], read_ahead: int, event: Callable[[dict[str, Any]], None]
    ) -> _Server:
        """Raises Unavailable."""
        mount = directory / secrets.token_hex(6)
        await asyncio.to_thread(mount.mkdir, 0o700)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "rethaw.snapshots.lazyd", str(mount),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
                start_new_session=True, limit=_LINE, cwd="/",
            )  # fmt: skip
        except OSError as error:
            mount.rmdir()
            raise Unavailable(f"the server of lazy files does not start: {error}") from error
        server = cls(mount, process, event)
        try:
            async with asyncio.timeout(_START_S):
                await server._ready
                server._send({"op": "init", **init})
                await server.call({"op": "ping"})
                await asyncio.to_thread(_read_ahead, mount, read_ahead)
            server._watching = asyncio.create_task(server._watch())
        except TimeoutError:
            await server.close()
            raise Unavailable(f"the server of lazy files was not ready within {_START_S:.0f} s") from None
        except BaseException:
            await server.close()
            raise
        return server

    def alive(self) -> bool:
        return not self.ended.is_set() and not select.select([self._pidfd], [], [], 0)[0]

    def _send(self, message: dict[str, Any]) -> None:
        self._in.write(json.dumps(message).encode() + b"\n")

    async def _watch(self) -> None:
        while not self.ended.is_set():
            await asyncio.sleep(_WATCH_S[0])
            with contextlib.suppress(Unavailable):
                await self.call({"op": "ping"}, _WATCH_S[1])

    async def call(self, message: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Its answer, good or bad. Raises Unavailable."""
        timeout_s = _CALL_S if timeout_s is None else timeout_s
        if not self.alive():
            raise self._gone()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)  # stays there if nobody waits any more: answers come in order
        self._send(message)
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            log.warning("the server of lazy files does not answer and is ended")
            self._kill()
            raise Unavailable(f"the server of lazy files did not answer within {timeout_s:.0f} s") from None

    def _gone(self) -> Unavailable:
        said = "".join(f": {line}" for line in list(self._said)[-1:])
        return Unavailable(f"the server of lazy files ended{said}", remedy="open the file again")

    async def _answers(self) -> None:
        while line := await self._out.readline():
            message: dict[str, Any] = json.loads(line)
            match message.get("event"):
                case None:
                    answer = self._waiting.popleft()
                    if not answer.done():
                        answer.set_result(message)
                case "ready":
                    if not self._ready.done():
                        self._ready.set_result(None)
                case "failed":
                    said = "".join(f" ({line})" for line in list(self._said)[-1:])
                    if not self._ready.done():
                        why = f"snapshots cannot be read lazily: {message['why']}{said}"
                        self._ready.set_exception(Unavailable(why, remedy=message["remedy"]))
                case _:
                    self._event(message)

    async def _complaints(self) -> None:
        while line := await self._err.readline():
            self._said.append(line.decode(errors="replace").strip())
            log.info("server of lazy files: %s", self._said[-1])

    def _died(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._tasks.append(asyncio.create_task(self._after()))

    async def _after(self) -> None:
        """What it said last is read, then its mount goes, in which it left everybody alone."""
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.wait(self._tasks[:2], timeout=_END_S)
        await self._process.wait()
        for answer in (*self._waiting, self._ready):
            if not answer.done():
                answer.set_exception(self._gone())
        self._waiting.clear()
        self._ready.exception()
        await asyncio.to_thread(_clear, self.mount)
        self.ended.set()

    def _kill(self) -> None:
        """Blocking, some system calls: the threads that could make them may all wait for this server."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        _clear(self.mount)  # ends what it may itself be waiting for

    async def close(self) -> None:
        """The process has ended and its mount is gone."""
        self._in.close()
        try:
            await asyncio.wait_for(self.ended.wait(), _END_S)
        except TimeoutError:
            self._kill()
            await self.ended.wait()
        finally:
            if self.ended.is_set() and self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1


def _inode(path: Path) -> int:
    """By which the kernel knows it. Raises Unavailable."""
    try:
        return path.stat().st_ino
    except OSError as error:
        raise Unavailable("the server of lazy files ended", remedy="open the file again") from error


def _read_ahead(mount: Path, kib: int) -> None:
    """How much the kernel reads around a page that is touched. Where it does not let us say so, it is its default."""
    device = mount.stat().st_dev
    with contextlib.suppress(OSError):
        knob = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        knob.write_text(str(kib))


def _clear(directory: Path) -> None:
    """A mount point, with whatever is mounted there."""
    with contextlib.suppress(OSError):
        lazyd.detach(directory)
        directory.rmdir()


def sweep(directory: Path) -> None:
    """Make the directory, without what an earlier node left there."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)
    lazyd.detach(directory)
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class LazyFile:
    """`path`: for whoever may see it, before `close`. `damage`: what of it could not be read, so far."""

    def __init__(self, server: _Server, name: str, size: int, snapshot: str) -> None:
        self._server, self.name = server, name
        self.path = server.mount / name
        self.size, self.snapshot = size, snapshot
        self.damage: list[str] = []

    def alive(self) -> bool:
        """Whether pages that were not read yet can be."""
        return self._server.alive()

    async def touched(self) -> list[tuple[int, int]]:
        """Pages that were read since it was opened, in order of first read: first page and count. The kernel reads
        ahead, so it is some more than was touched. Raises Unavailable."""
        answer = await self._server.call({"op": "touched", "name": self.name})
        return [(first, count) for first, count in answer.get("ranges", [])]

    async def close(self) -> None:
        """Its name goes; those who have it open or mapped keep it. What the kernel kept of it goes after the last."""
        with contextlib.suppress(Unavailable, OSError):
            await self._server.call({"op": "close", "name": self.name})
            await asyncio.to_thread(self.path.unlink)


class LazyFiles:
    """Files out of the packs of one store. Make it with `start`."""

    def __init__(self, directory: Path, init: dict[str, Any], read_ahead: int, damaged: Damage | None) -> None:
        self._directory, self._init, self._read_ahead, self._damaged = directory, init, read_ahead, damaged
        self._server: _Server | None = None
        self._starting = asyncio.Lock()
        self._files: WeakValueDictionary[str, LazyFile] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    async def start(
        cls,
        directory: Path,
        store: Path,
        keys: Keyring | None = None,
        *,
        read_ahead_kib: int = READ_AHEAD_KIB,
        damaged: Damage | None = None,
    ) -> LazyFiles:
        """`directory`: of this node alone, best in memory. `store`: where the packs are. `damaged` is told once of each
        damage that a reader ran into.

        Raises Unavailable, saying what to do, where there is no FUSE; restores are eager then.
        """
        directory = directory.absolute().resolve()
        init = {"store": str(store.absolute()), **(keys or Keyring()).reveal()}
        files = cls(directory, init, read_ahead_kib, damaged)
        try:
            await asyncio.to_thread(sweep, directory)
        except OSError as error:
            raise Unavailable(f"{directory} cannot be used for lazy files: {error}") from error
        try:
            await files._current()
        except BaseException:
            await files.close()
            raise
        return files

    def alive(self) -> bool:
        return self._server is not None and self._server.alive()

    async def _current(self) -> _Server:
        """A server that lives. Raises Unavailable."""
        async with self._starting:
            if self._closed:
                raise Unavailable("lazy files are closed")
            if self._server is None or not self._server.alive():
                if self._server is not None:
                    log.warning("the server of lazy files ended; what maps its files cannot read on")
                    await self._server.close()
                    self._server = None
                self._server = await _Server.start(self._directory, self._init, self._read_ahead, self._event)
            return self._server

    def _event(self, message: dict[str, Any]) -> None:
        file = self._files.get(message.get("name", ""))
        log.warning("snapshot %s: %s", file.snapshot if file else "?", message.get("why"))
        if file is not None:
            file.damage.append(message["why"])
            if self._damaged is not None:
                self._damaged(file, message["why"])

    async def open(
        self,
        snapshot: str,
        manifest: Path,
        section: str,
        size: int,
        table: NDArray[np.int32],
        digest: str | None = None,
    ) -> LazyFile:
        """A file of `size` bytes whose pages are those of the section that `table` names, -1: zeros. To share what the
        kernel keeps of it, clones must share the file.

        Raises SnapshotUnusable, KeyMissing, or Unavailable when the server does not live.
        """
        server = await self._current()
        name = secrets.token_hex(8)
        file = LazyFile(server, name, size, snapshot)
        path = self._directory / f"{name}.table"
        self._files[name] = file
        try:
            await asyncio.to_thread(path.write_bytes, table.astype("<i4").tobytes())
            answer = await server.call({
                "op": "open", "name": name, "snapshot": snapshot, "manifest": str(manifest.absolute()),
                "digest": digest, "section": section, "size": size, "table": str(path),
            })  # fmt: skip
            if not answer["ok"]:
                raise _refused(snapshot, answer)
            await server.call({"op": "inode", "name": name, "number": await asyncio.to_thread(_inode, file.path)})
        except BaseException as error:
            self._files.pop(name, None)
            if isinstance(error, asyncio.CancelledError):
                self._later(file.close())
            raise
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        return file

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def prefetch(self, file: LazyFile, ranges: Ranges) -> None:
        """Let the kernel read these pages ahead, in this order, after the file was mapped: to map one that was opened for
        writing drops what was read. Returns when it is asked for, not when it is there. Raises OSError."""
        await asyncio.to_thread(_prefetch, file.path, ranges)

    async def stats(self) -> dict[str, int]:
        """Bytes of all files: `asked` by the kernel, `raw` decompressed, `stored` read from packs."""
        server = await self._current()
        answer = await server.call({"op": "stats"})
        return {name: answer[name] for name in ("asked", "raw", "stored")}

    async def close(self) -> None:
        """No process, mount or file stays; whoever maps a file cannot read on."""
        self._closed = True
        async with self._starting:
            for task in list(self._tasks):
                task.cancel()
            if self._server is not None:
                await self._server.close()
                self._server = None
            with contextlib.suppress(OSError):
                await asyncio.to_thread(sweep, self._directory)
                self._directory.rmdir()


def _refused(snapshot: str, answer: dict[str, Any]) -> RethawError:
    why = f"snapshot {snapshot}: {answer['file']} {answer['why']}"
    if answer.get("code") == KeyMissing.code:
        return KeyMissing(answer["why"], snapshot=snapshot)
    return SnapshotUnusable(why, remedy="its parent is used instead", snapshot=snapshot, file=answer["file"])


def _prefetch(path: Path, ranges: Ranges) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, count in ranges:
            os.posix_fadvise(fd, first * PAGE, count * PAGE, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
