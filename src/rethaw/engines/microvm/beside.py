"""Runs programs beside the guest's own, told by frames on a port: a thread of PID 1, begun at the first of them, so that
nothing in the guest can kill it. Standard library alone, Python 3.9 or later.

A frame: number of the program, kind, length (little-endian 4, 1, 4 bytes), then the content. Host to guest: START (JSON:
argv, cwd, env, and for a terminal its columns, rows and kind), INPUT, END, SIZE (JSON), KILL. Guest to host: OUTPUT,
ERROR, TAKEN (so many bytes of input went to the program, 4 bytes), EXITED (the code, 4 bytes, signed).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import termios
import time
from collections.abc import Callable
from typing import Any

HEAD = struct.Struct("<IBI")
START, INPUT, END, SIZE, KILL, OUTPUT, ERROR, TAKEN, EXITED = range(1, 10)
MOST = 1 << 20  # bytes of a frame
PIECE = 32768
LINGER_S = 0.2  # after a program's end: its last bytes are in the pipe; a child may hold the pipe open for ever


def set_size(fd: int, columns: int, rows: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Program:
    """`confine` takes its rights from the child, as from every program of the guest, or raises."""

    def __init__(
        self, number: int, about: dict[str, Any], config: dict[str, Any], confine: Callable[[dict[str, Any]], None]
    ) -> None:
        self.number = number
        self.code: int | None = None
        self.until = 0.0
        self.waiting = bytearray()  # input
        self.no_more = False
        self.terminal = about.get("terminal")
        env = {**config["env"], **dict(about["env"])}
        if self.terminal:
            env["TERM"] = self.terminal["kind"]
            master, slave = os.openpty()
            set_size(master, self.terminal["columns"], self.terminal["rows"])
            theirs = (slave, slave, slave)
            self.input: int | None = os.dup(master)
            self.outputs = {master: OUTPUT}
        else:
            (child_in, self.input), (out, child_out), (err, child_err) = os.pipe(), os.pipe(), os.pipe()
            theirs = (child_in, child_out, child_err)
            self.outputs = {out: OUTPUT, err: ERROR}
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                for at, fd in enumerate(theirs):
                    os.dup2(fd, at)
                if self.terminal:
                    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
                confine(config)
                os.chdir(about["cwd"])
                os.execvpe(about["argv"][0], about["argv"], env)
            except BaseException as error:
                os.write(2, f"{about['argv'][0]}: {error}\n".encode())
            os._exit(127)
        for fd in set(theirs):
            os.close(fd)
        for fd in (self.input, *self.outputs):
            os.set_blocking(fd, False)

    def feed(self) -> int:
        """Bytes of input that went to the program right now."""
        taken = 0
        while self.waiting and self.input is not None:
            try:
                done = os.write(self.input, self.waiting[:PIECE])
            except BlockingIOError:
                break
            except OSError:  # nobody reads there any more
                taken += len(self.waiting)
                self.waiting.clear()
                break
            taken += done
            del self.waiting[:done]
        if self.no_more and not self.waiting:
            self.close_input()
        return taken

    def close_input(self) -> None:
        if self.input is not None and not self.terminal:
            os.close(self.input)
            self.input = None

    def read(self, fd: int) -> bytes | None:
        """None: nothing right now; empty: its end."""
        try:
            return os.read(fd, PIECE)
        except BlockingIOError:
            return None
        except OSError:  # a terminal that nobody has any more
            return b""

    def close(self) -> None:
        for fd in [*self.outputs, *([] if self.input is None else [self.input])]:
            os.close(fd)


class Server:
    def __init__(self, port: int, config: dict[str, Any], confine: Callable[[dict[str, Any]], None]) -> None:
        self.port, self.config, self.confine = port, config, confine
        self.programs: dict[int, Program] = {}
        self.coming = bytearray()
        self.serving = False
        self.ended: dict[int, int] = {}  # pid to exit code
        self.woken, self.wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def reaped(self, pid: int, code: int) -> None:
        """A child of PID 1 ended. Called from another thread."""
        if not self.serving:  # then it is none of ours
            return
        self.ended[pid] = code
        with contextlib.suppress(BlockingIOError):
            os.write(self.wake, b"!")

    def say(self, number: int, kind: int, content: bytes) -> None:
        data = memoryview(HEAD.pack(number, kind, len(content)) + content)
        while data:
            data = data[os.write(self.port, data) :]

    def obey(self, number: int, kind: int, content: bytes) -> None:
        if kind == START:
            try:
                self.programs[number] = Program(number, json.loads(content), self.config, self.confine)
            except OSError as error:
                self.say(number, ERROR, f"cannot start it: {error}\n".encode())
                self.say(number, EXITED, struct.pack("<i", 126))
            return
        program = self.programs.get(number)
        if program is None:
            return
        if kind == INPUT:
            program.waiting += content
        elif kind == END:
            program.no_more = True
        elif kind == SIZE and program.terminal:
            size = json.loads(content)
            with contextlib.suppress(OSError):
                set_size(next(iter(program.outputs)), size["columns"], size["rows"])
        elif kind == KILL:
            with contextlib.suppress(OSError):
                os.killpg(program.pid, signal.SIGKILL)
        self.feed(program)

    def feed(self, program: Program) -> None:
        taken = program.feed()
        if taken:
            self.say(program.number, TAKEN, struct.pack("<I", taken))

    def reap(self) -> None:
        for program in self.programs.values():
            if program.code is None and program.pid in self.ended:
                program.code = self.ended[program.pid]
                program.until = time.monotonic() + LINGER_S

    def pass_on(self, program: Program, fd: int) -> None:
        data = program.read(fd)
        if data:
            self.say(program.number, program.outputs[fd], data)
            program.until = time.monotonic() + LINGER_S
        elif data is not None:
            if program.terminal and program.code is None:
                time.sleep(0.01)  # between two that have it open
                return
            del program.outputs[fd]
            os.close(fd)

    def finish(self) -> None:
        for number, program in list(self.programs.items()):
            if program.code is not None and (not program.outputs or time.monotonic() >= program.until):
                self.say(number, EXITED, struct.pack("<i", program.code))
                program.close()
                del self.programs[number]
        if not self.programs:
            self.ended.clear()

    def serve(self) -> None:
        self.serving = True
        while True:
            poll = select.poll()
            poll.register(self.port, select.POLLIN)
            poll.register(self.woken, select.POLLIN)
            owner: dict[int, Program] = {}
            for program in self.programs.values():
                for fd in program.outputs:
                    poll.register(fd, select.POLLIN)
                    owner[fd] = program
                if program.input is not None and program.waiting:
                    poll.register(program.input, select.POLLOUT)
                    owner[program.input] = program
            ending = any(program.code is not None for program in self.programs.values())
            for fd, _ in poll.poll(50 if ending else None):
                if fd == self.port:
                    self.listen()
                elif fd == self.woken:
                    os.read(self.woken, 512)
                elif fd in owner and fd == owner[fd].input:
                    self.feed(owner[fd])
                elif fd in owner and fd in owner[fd].outputs:
                    self.pass_on(owner[fd], fd)
            self.reap()  # also one that ended before it was known
            self.finish()

    def listen(self) -> None:
        self.coming += os.read(self.port, PIECE)
        while len(self.coming) >= HEAD.size:
            number, kind, length = HEAD.unpack_from(self.coming)
            if length > MOST or len(self.coming) < HEAD.size + length:
                return
            content = bytes(self.coming[HEAD.size : HEAD.size + length])
            del self.coming[: HEAD.size + length]
            self.obey(number, kind, content)
