"""The agent's process tree: start, reap, signal, and its output with absolute offsets."""

from __future__ import annotations

import errno
import os

from rethaw.channel.lean import signal
from rethaw.guest import loop as loops
from rethaw.guest.wire import Stream, note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

    from rethaw.guest.terminal import Input, Keys, Terminal

KEEP = 1 << 20  # unacknowledged output bytes after which the agent's pipe is not read any more
READ_SIZE = 65536


class Output(Stream):
    """stdout or stderr. Bytes stay here until the node says that they are durable."""

    def __init__(self, kind: str, loop: loops.Loop, fd: int, on_done: Callable[[], None]) -> None:
        super().__init__()
        self.kind = kind
        self._loop = loop
        self._fd: Optional[int] = fd
        self._on_done = on_done
        os.set_blocking(fd, False)
        loop.watch(fd, loops.READ, self._readable)

    @property
    def done(self) -> bool:
        """Whether the pipe has ended and every byte of it is durable."""
        return self._fd is None and not self.out.buffer

    def describe(self) -> Dict[str, Any]:
        return {"kind": self.kind, "meta": {}, "base": self.out.base}

    def on_ack(self, offset: int) -> None:
        if self._fd is not None and len(self.out.buffer) < KEEP:
            self._loop.watch(self._fd, loops.READ, self._readable)
        if self.done:
            self.wire.forget(self)
        self._on_done()

    def on_reset(self, why: str) -> None:
        note(f"{self.kind} is not wanted any more: {why}")
        self._close()
        self.out.buffer.clear()
        self._on_done()

    def drain(self) -> None:
        """The agent has ended: take what is in the pipe now and close it. What its orphans write later is dropped."""
        while self._fd is not None and len(self.out.buffer) < KEEP:
            if not self._read():
                self._close()

    def _readable(self, events: int) -> None:
        self._read()
        if self._fd is not None and len(self.out.buffer) >= KEEP:
            self._loop.mute(self._fd)

    def fresh(self) -> int:
        """Take what is there now; the offset after it."""
        while len(self.out.buffer) < KEEP and self._read():
            pass
        return self.out.end

    def _read(self) -> bool:
        """Whether bytes came. Closes at the end of the pipe."""
        if self._fd is None:
            return False
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:  # of a terminal that nobody has open
            data = b""
        if not data:
            self._close()
            return False
        self.say(data)
        return True

    def _close(self) -> None:
        if self._fd is not None:
            self._loop.mute(self._fd)
            os.close(self._fd)
            self._fd = None
            self.finish()
            self._on_done()


class Agent:
    """The main process and all that comes from it. `on_exit` is called once, when the main process has ended and all
    its output is durable, with the body of the `exit` call."""

    def __init__(self, loop: loops.Loop, on_exit: Callable[[Dict[str, Any]], None]) -> None:
        self._loop = loop
        self._on_exit = on_exit
        self.pid = 0
        self.exit: Optional[Dict[str, Any]] = None
        self._told = False
        self.outputs: List[Output] = []
        self.on_other: Callable[[int, int], None] = lambda pid, status: (
            None
        )  # a child that is not the main process ended
        self.input: Optional[Input] = None
        self.keys: Optional[Keys] = None  # the same, of a terminal
        self.terminal: Optional[Terminal] = None

    def start(
        self,
        command: List[str],
        env: Dict[str, str],
        workdir: str,
        terminal: Optional[Tuple[int, int]] = None,
        stdin: bool = False,
    ) -> List[Stream]:
        """Run `command` in its own session, with a terminal of so many rows and columns, or with pipes. A command that
        cannot be run is an exit with 127 or 126, `error` and `reason`."""
        why_read, why_write = os.pipe()
        fds = self._terminal(*terminal) if terminal is not None else self._pipes(stdin)
        pid = os.fork()
        if pid == 0:
            become(
                command, env, workdir, fds, why_write, enter=self.terminal.enter if self.terminal is not None else None
            )
        for fd in (*fds, why_write) if self.terminal is None else (why_write,):
            os.close(fd)
        if self.terminal is not None:
            self.terminal.entered()
        self.pid = pid
        with os.fdopen(why_read, "rb") as pipe:
            why = pipe.read()
        if why:
            os.waitpid(pid, 0)
            self.pid = 0
            self.exit = _not_run(command, workdir, why)
        return [*self.outputs, self.input] if self.input is not None else [*self.outputs]

    def _pipes(self, stdin: bool) -> Tuple[int, int, int]:
        if stdin:
            from rethaw.guest.terminal import Input

            source, typed = os.pipe()
            self.input = Input(self._loop, typed)
        else:
            source = os.open("/dev/null", os.O_RDONLY)
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        self.outputs = [
            Output("stdout", self._loop, out_read, self._progress),
            Output("stderr", self._loop, err_read, self._progress),
        ]
        return source, out_write, err_write

    def _terminal(self, rows: int, cols: int) -> Tuple[int, int, int]:
        from rethaw.guest.terminal import Keys, Terminal

        self.terminal = Terminal(rows, cols)
        output = Output("stdout", self._loop, self.terminal.master, self._progress)
        self.outputs = [output]
        self.input = self.keys = Keys(self._loop, self.terminal, output.say, output.fresh)
        program = self.terminal.program
        return program, program, program

    def settle(self) -> None:
        """To be called once the outputs are open: a command that did not run has ended already."""
        if self.exit is not None:
            self._ended()

    def reap(self) -> None:
        """Collect every child that ended; orphans land here too, this is PID 1."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid and self.exit is None:
                signalled = os.WIFSIGNALED(status)
                self.exit = {
                    "code": None if signalled else os.WEXITSTATUS(status),
                    "signal": os.WTERMSIG(status) if signalled else None,
                }
                self._ended()
            else:
                self.on_other(pid, status)

    def _ended(self) -> None:
        for output in self.outputs:
            output.drain()
        self._progress()

    def _progress(self) -> None:
        if self.exit is None or self._told:
            return
        for output in self.outputs:
            if not output.done:
                output.drain()
        if all(o.done for o in self.outputs) and not self._told:
            self._told = True
            if self.input is not None:
                self.input.close()
            self._on_exit(self.exit)

    def signal(self, number: int) -> None:
        """To the agent's process group."""
        if self.pid and self.exit is None:
            try:
                os.killpg(self.pid, number)
            except (ProcessLookupError, PermissionError) as error:
                note(f"signal {number} to {self.pid}: {error}")

    def kill(self) -> None:
        """Every process in the sandbox but this one. Not as PID 1 (tests on a host): the agent's group only."""
        try:
            if os.getpid() == 1:
                os.kill(-1, signal.SIGKILL)
            elif self.pid:
                os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # there is none
            return


def _not_run(command: List[str], workdir: str, why: bytes) -> Dict[str, Any]:
    step, number = why.decode().split(" ")
    reason = os.strerror(int(number))
    subject = f"working directory {workdir!r}" if step == "chdir" else f"command {command[0]!r}"
    message = f"{subject}: {reason}"
    missing = step == "exec" and int(number) in (errno.ENOENT, errno.ENOTDIR)
    kind = "command_not_found" if missing else "boot_failed"
    return {"code": 127 if missing else 126, "signal": None, "error": message, "reason": kind}


def become(
    command: List[str],
    env: Dict[str, str],
    workdir: str,
    streams: Tuple[int, int, int],
    why: int,
    enter: Optional[Callable[[], None]] = None,
) -> None:
    """In the forked child, with these as its standard streams: never returns. `enter` is called in its new session."""
    step = "setup"
    try:
        os.setsid()
        if enter is not None:
            enter()
        for target, fd in enumerate(streams):
            os.dup2(fd, target)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        step = "chdir"
        os.chdir(workdir)
        step = "exec"
        os.execvpe(command[0], command, env)
    except OSError as error:
        os.write(why, f"{step} {error.errno}".encode())
    finally:
        os._exit(127)
