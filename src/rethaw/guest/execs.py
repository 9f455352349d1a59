"""Programs that the node starts beside the agent, in its environment.

On the stream, in both directions, are the records of `rethaw.channel.records`.

A program belongs to the session, not to the connection: it is in each snapshot. Whoever leaves hangs it up (SIGHUP). When
a restore has cut the connection, one that has a terminal or still reads is hung up; any other goes on, and what it
writes is discarded.
"""

from __future__ import annotations

import errno
import os
import struct

from rethaw.channel.lean import cast, signal
from rethaw.channel.mux import Receiver
from rethaw.channel.records import EXIT, INPUT, INPUT_END, RECORD, SIZE, STDERR, STDOUT
from rethaw.guest import loop as loops
from rethaw.guest.dial import Dials, Refused
from rethaw.guest.process import become
from rethaw.guest.wire import Stream
from rethaw.model.errors import ChannelBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional, Tuple

    from rethaw.guest.terminal import Keys, Terminal

AHEAD = 128 << 10  # bytes read from the program before the node has taken them
READ_SIZE = 32768


def begin(dials: Dials, ident: str, message: Dict[str, Any]) -> None:
    """Start the program of a `dial {id, kind: "exec", command, env, workdir, terminal, input}`."""
    try:
        command = [str(a) for a in cast("List[Any]", message["command"])]
        given = {str(k): str(v) for k, v in cast("Dict[str, Any]", message.get("env") or {}).items()}
        workdir = str(message.get("workdir") or dials.workdir)
        size = message.get("terminal")
        terminal = None if size is None else (int(size[0]), int(size[1]))
        fed = message.get("input") is True
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ChannelBroken(f"malformed dial: {error!r}") from None
    if not command or any("\0" in word for word in (*command, *given, *given.values(), workdir)):
        raise ChannelBroken("malformed dial: the command is empty or has a NUL")
    if command[0] == "\1python":  # guestd's own interpreter, whatever the image has
        import sys

        command[0] = sys.executable
    env = {**dials.env, **given}
    try:
        pid, fds, screen, why = _spawn(command, env, workdir, terminal, fed)
    except OSError as error:
        Refused(dials, ident, f"the program cannot be started: {error.strerror}", "unavailable", exit=126)
        return
    if why is not None:
        step, number = why
        subject = f"working directory {workdir!r}" if step == "chdir" else f"command {command[0]!r}"
        missing = step == "exec" and number in (errno.ENOENT, errno.ENOTDIR)
        code = "not_found" if missing else "invalid_input"
        Refused(dials, ident, f"{subject}: {os.strerror(number)}", code, exit=127 if missing else 126)
        return
    Program(dials, ident, pid, fds, screen)


def _spawn(
    command: List[str], env: Dict[str, str], workdir: str, terminal: Optional[Tuple[int, int]], fed: bool
) -> Tuple[int, Dict[int, int], Optional[Terminal], Optional[Tuple[str, int]]]:
    """Process id; our descriptors (INPUT, STDOUT, STDERR), of a terminal only where its output comes; that terminal; why it
    could not run."""
    opened: List[int] = []
    screen: Optional[Terminal] = None

    def pipe() -> Tuple[int, int]:
        ends = os.pipe()
        opened.extend(ends)
        return ends

    try:
        if terminal is not None:
            from rethaw.guest.terminal import Terminal

            columns, rows = terminal
            screen = Terminal(rows & 0xFFFF, columns & 0xFFFF)
            theirs = screen.program, screen.program, screen.program
            ours = {STDOUT: screen.master}
        else:
            if fed:
                in_read, in_write = pipe()
            else:
                in_read, in_write = os.open("/dev/null", os.O_RDONLY), -1
                opened.append(in_read)
            (out_read, out_write), (err_read, err_write) = pipe(), pipe()
            theirs, ours = (in_read, out_write, err_write), {STDOUT: out_read, STDERR: err_read}
            if fed:
                ours[INPUT] = in_write
        why_read, why_write = pipe()
        pid = os.fork()
    except OSError:
        for fd in opened:
            os.close(fd)
        if screen is not None:
            _closed(screen)
        raise
    if pid == 0:
        become(command, env, workdir, theirs, why_write, enter=screen.enter if screen is not None else None)
    for fd in {why_write} if screen is not None else {*theirs, why_write}:
        os.close(fd)
    if screen is not None:
        screen.entered()
    with os.fdopen(why_read, "rb") as said:
        why = said.read()
    if why:
        os.waitpid(pid, 0)
        if screen is not None:
            screen.close()
        for fd in set(ours.values()):
            os.close(fd)
        step, number = why.decode().split(" ")
        return 0, {}, None, (step, int(number))
    for fd in ours.values():
        os.set_blocking(fd, False)
    return pid, ours, screen, None


def _closed(screen: Terminal) -> None:
    """Nobody has entered it."""
    screen.entered()
    screen.close()
    os.close(screen.master)


def _keys(program: Program, screen: Terminal) -> Keys:
    """What is typed into the program's terminal; the records' stream has the credits for it."""
    from rethaw.guest.terminal import Keys

    class Typed(Keys):
        def took(self, size: int) -> None:
            program.grant()

    return Typed(program.loop, screen, program.echoed, program.fresh)


class Program(Stream):
    """One program and whoever asked for it."""

    kind = "dial"

    def __init__(self, dials: Dials, ident: str, pid: int, fds: Dict[int, int], screen: Optional[Terminal]) -> None:
        super().__init__()
        self._dials = dials
        self.loop = dials.loop
        self._ident = ident
        self._pid = pid
        self._running = True
        self._terminal = screen is not None
        self._fds = fds
        self._attached = True
        self._status: Optional[int] = None  # exit code; the program has ended
        self._in = bytearray()  # records that are not whole yet
        self._left = 0  # bytes of the present input record that are still to come
        self._input = bytearray()  # not yet taken by the program
        self._input_ended = INPUT not in fds
        self._keys = _keys(self, screen) if screen is not None else None
        dials.open[ident] = self
        dials.programs[pid] = self
        dials.wire.open(self)
        self._watch()

    # ---- the channel's side

    def describe(self) -> Dict[str, Any]:
        return {
            "kind": self.kind,
            "meta": {"id": self._ident, "pid": self._pid},
            "received": self.inp.offset,
            "held": self.inp.held,
            "base": self.out.base,
        }

    def resync(self) -> None:
        self.out.rewind()
        self.inp = Receiver(self.id, self.inp.offset, self.inp.held)

    def on_data(self, data: bytes) -> None:
        self._in += data
        while self._in:
            if self._left:
                part = bytes(self._in[: self._left])
                del self._in[: len(part)]
                self._left -= len(part)
                if self._keys is not None:
                    self._keys.on_data(part)
                elif not self._input_ended and INPUT in self._fds:
                    self._input += part
                continue
            if len(self._in) < RECORD.size:
                break
            kind, length = RECORD.unpack_from(self._in)
            if kind == INPUT:
                del self._in[: RECORD.size]
                self._left = length
                continue
            if length > 16:
                raise ChannelBroken(f"stream {self.id}: a record of kind {kind} with {length} bytes")
            if len(self._in) < RECORD.size + length:
                break
            payload = bytes(self._in[RECORD.size : RECORD.size + length])
            del self._in[: RECORD.size + length]
            self._told(kind, payload)
        self._feed()

    def grant(self) -> None:
        """Nothing is held but what neither the records' reader nor the program has taken."""
        typed = self._keys.pending if self._keys is not None else 0
        size = self.inp.held - len(self._in) - len(self._input) - typed
        if size > 0:
            self.took(size)

    def _told(self, kind: int, payload: bytes) -> None:
        if kind == INPUT_END:
            if self._keys is not None:
                self._keys.on_data(b"\4")
            self._input_ended = True
        elif kind == SIZE and len(payload) == 4:
            if self._keys is not None and STDOUT in self._fds:
                columns, rows = struct.unpack(">HH", payload)
                self._keys.resize(rows, columns)
        else:
            raise ChannelBroken(f"stream {self.id}: a record of kind {kind} with {len(payload)} bytes")

    def on_end(self) -> None:
        return  # the records say what there is to say

    def on_ack(self, offset: int) -> None:
        if self._status is not None:
            self._drain()
        self._watch()

    def on_accept(self, exchange: str) -> None:
        return

    def on_reset(self, why: str) -> None:
        self._dials.open.pop(self._ident, None)
        if self._attached:
            self._detach(hang_up=self._running)

    def lost(self) -> None:
        """A new life: nobody is connected to it any more."""
        self.wire.forget(self)
        self._dials.open.pop(self._ident, None)
        self._detach(hang_up=self._running and (self._terminal or INPUT in self._fds))

    def _detach(self, hang_up: bool) -> None:
        self._attached = False
        self.out.buffer.clear()
        self._input.clear()
        if hang_up:
            self._signal(signal.SIGHUP)
            self._signal(signal.SIGCONT)
        if self._keys is not None:
            self._keys.close()
        if self._terminal or not self._running:
            for kind in list(self._fds):
                self._close(kind)
        else:
            self._close(INPUT)
            self._watch()  # what it writes is discarded

    # ---- the program's side

    def _signal(self, number: int) -> None:
        """To its process group, as a terminal would."""
        if not self._running:
            return
        try:
            os.killpg(self._pid, number)
        except (ProcessLookupError, PermissionError, OSError):
            return

    def ended(self, status: int) -> None:
        """It was reaped."""
        self._running = False
        self._status = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self._close(INPUT)
        self._input.clear()
        self._input_ended = True
        if self._keys is not None:
            self._keys.close()
        self.grant()
        self._drain()

    def _drain(self) -> None:
        """All that is in its pipes now; then how it ended. What its orphans write later is dropped."""
        for kind in (STDOUT, STDERR):
            while kind in self._fds and (not self._attached or len(self.out.buffer) <= AHEAD):
                if not self._read(kind):
                    self._close(kind)
        if STDOUT in self._fds or STDERR in self._fds:
            self._watch()
        elif self._attached and not self.out.finished:
            self.say(RECORD.pack(EXIT, 4) + struct.pack(">I", self._status or 0))
            self.finish()

    def _feed(self) -> None:
        """As much of the input as it takes."""
        while self._input and INPUT in self._fds:
            try:
                done = os.write(self._fds[INPUT], self._input)
            except BlockingIOError:
                break
            except OSError:  # it does not read any more
                done = len(self._input)
                self._input_ended = True
                self._close(INPUT)
            del self._input[:done]
        if self._input_ended and not self._input:
            self._close(INPUT)
        self.grant()
        self._watch()

    def _watch(self) -> None:
        masks: Dict[int, int] = {}
        for kind in (STDOUT, STDERR):
            fd = self._fds.get(kind)
            if fd is not None:
                masks[fd] = loops.READ if not self._attached or len(self.out.buffer) <= AHEAD else 0
        fd = self._fds.get(INPUT)
        if fd is not None:
            masks[fd] = masks.get(fd, 0) | (loops.WRITE if self._input else 0)
        for fd, mask in masks.items():
            if mask:
                self.loop.watch(fd, mask, self._events_of(fd))
            else:
                self.loop.mute(fd)  # a pipe whose other end is closed would be told of for ever

    def _events_of(self, fd: int) -> Any:
        def happened(events: int) -> None:
            if self._fds.get(INPUT) == fd and events & (loops.WRITE | loops.GONE) and self._input:
                self._feed()
            for kind in (STDOUT, STDERR):
                if self._fds.get(kind) == fd and events & (loops.READ | loops.GONE):
                    self._read(kind)
            self._watch()

        return happened

    def echoed(self, data: bytes) -> None:
        """The terminal shows `data`, which the kernel did not echo."""
        if self._attached:
            self.say(RECORD.pack(STDOUT, len(data)) + data)

    def fresh(self) -> int:
        """Take what the terminal shows by now."""
        while STDOUT in self._fds and len(self.out.buffer) <= AHEAD and self._read(STDOUT):
            pass
        return 0

    def _read(self, kind: int) -> bool:
        """Whether bytes came. Closes at the end."""
        try:
            data = os.read(self._fds[kind], READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:  # a terminal that nobody has open any more
            data = b""
        if not data:
            self._close(kind)
            return False
        if self._attached:
            self.say(RECORD.pack(kind, len(data)) + data)
        return True

    def _close(self, kind: int) -> None:
        fd = self._fds.pop(kind, None)
        if fd is not None and fd not in self._fds.values():
            self.loop.mute(fd)
            os.close(fd)


__all__ = ["Program", "begin"]
