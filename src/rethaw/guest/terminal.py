"""What is typed: into the terminal of the main program, whose master side is here and so inside the snapshot, or into a
pipe that is its stdin.

Some kernels (gVisor's) leave to us what a terminal does with the keys that send signals: theirs sends the signal, and leaves
the key in the input for whoever reads next. They also know neither how to erase a line nor SIGWINCH. `_lame` finds out, and
`Keys` does it for them: a process in the program's session, which alone may ask who is in the foreground, sends the signals.
"""

# Loaded only for a program with a terminal or a stdin: PID 1 of all others does without.

from __future__ import annotations

import fcntl
import os
import struct
import termios

from rethaw.channel.lean import signal
from rethaw.channel.mux import Receiver
from rethaw.guest import loop as loops
from rethaw.guest.wire import Stream, note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

PIECE = 4096
_IFLAG, _LFLAG, _CC = 0, 3, 6  # of what tcgetattr gives
_IUTF8 = 0o40000  # letters are erased whole
_SIGNALS = ((termios.VINTR, signal.SIGINT), (termios.VQUIT, signal.SIGQUIT), (termios.VSUSP, signal.SIGTSTP))


class Input(Stream):
    """Bytes for a descriptor, which is ours from now on. They stay in memory until it takes them."""

    kind = "stdin"

    def __init__(self, loop: loops.Loop, fd: int) -> None:
        super().__init__()
        self._loop = loop
        self._fd: Optional[int] = fd
        self._held = bytearray()
        self._ready = bytearray()  # what of it goes out next
        self._ended = False
        os.set_blocking(fd, False)

    def describe(self) -> Dict[str, Any]:
        return {
            "kind": self.kind,
            "meta": {"ended": self._ended or self._fd is None},
            "received": self.inp.offset,
            "held": self.inp.held,
        }

    def resync(self) -> None:
        self.out.rewind()
        self.inp = Receiver(self.id, self.inp.offset, self.inp.held)

    def on_data(self, data: bytes) -> None:
        if self._fd is None:
            self.took(len(data))  # nobody reads it
            return
        self._held += data
        self.pump()

    def on_end(self) -> None:
        self._ended = True
        self.pump()

    def on_reset(self, why: str) -> None:
        note(f"stdin: {why}")

    def pump(self, events: int = 0) -> None:
        """Give the descriptor as much as it takes."""
        while self._fd is not None:
            if not self._ready:
                self.cook()
            if not self._ready:
                self._loop.mute(self._fd)
                if self._ended and not self._held:
                    self.hang_up()
                return
            try:
                done = os.write(self._fd, self._ready[:PIECE])
            except BlockingIOError:
                self._loop.watch(self._fd, loops.WRITE, self.pump)
                return
            except OSError:  # its reader is gone
                self.close()
                return
            del self._ready[:done]

    @property
    def pending(self) -> int:
        """Bytes that nothing has looked at yet."""
        return len(self._held)

    def cook(self) -> None:
        """Move bytes from `_held` to `_ready`."""
        self._ready += self._held[:PIECE]
        self._taken(PIECE)

    def _taken(self, most: int) -> None:
        size = min(most, len(self._held))
        del self._held[:size]
        if size:
            self.took(size)

    def hang_up(self) -> None:
        """All of the input has been taken."""
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            self._loop.mute(self._fd)
            os.close(self._fd)
            self._fd = None
            self._ready.clear()
            self._taken(len(self._held))


class Keys(Input):
    """What is typed into a terminal. `say` puts bytes among its output, after what it has written so far."""

    def __init__(
        self, loop: loops.Loop, terminal: Terminal, say: Callable[[bytes], None], fresh: Callable[[], int]
    ) -> None:
        super().__init__(loop, os.dup(terminal.master))
        self._terminal = terminal
        self._say = say
        self._fresh = fresh
        self._line = b""  # typed and not finished, as far as we know
        self._wanted: List[int] = []  # signals that the process in the session is to send
        self._asked = False
        self._closed = False
        if terminal.answers is not None:
            loop.watch(terminal.answers, loops.READ, self._sent)

    def resize(self, rows: int, cols: int) -> Dict[str, Any]:
        """Its new size, and where in the output that was: what is said of it to the node."""
        at = self._fresh()
        self._terminal.size = (rows, cols, at)
        set_size(self._terminal.master, rows, cols)
        if self._terminal.lame:
            self._signal(signal.SIGWINCH)
        return self._terminal.about()

    def hang_up(self) -> None:
        """There is no end of a terminal's input but the key for it."""

    def close(self) -> None:
        super().close()
        if not self._closed:
            self._closed = True
            if self._terminal.answers is not None:
                self._loop.mute(self._terminal.answers)
            self._terminal.close()

    # ------------------------------------------------------------ what the kernel leaves to us

    def cook(self) -> None:
        if not self._terminal.lame:
            super().cook()
            return
        while self._held and not self._ready and not self._asked:  # what follows a signal is read after it
            self._cook()

    def _cook(self) -> None:
        try:
            attributes = termios.tcgetattr(self._terminal.slave)
        except termios.error:
            super().cook()
            return
        flags, cc = attributes[_LFLAG], attributes[_CC]
        canonical = bool(flags & termios.ICANON)
        special = {cc[at]: number for at, number in _SIGNALS} if flags & termios.ISIG else {}
        if canonical:
            special.update({cc[termios.VKILL]: 0, cc[termios.VWERASE]: 0})
        piece = bytes(self._held[:PIECE])
        first = min((at for at in (piece.find(key) for key in special if key != b"\0") if at >= 0), default=len(piece))
        if first:
            self._ready += piece[:first]
            self._line = _unfinished(self._line + piece[:first], cc) if canonical else b""
            self._taken(first)
            return
        key = piece[:1]
        self._taken(1)
        if special[key]:
            self._interrupt(special[key], key, attributes)
        else:
            keep = b"" if key == cc[termios.VKILL] else self._line.rstrip(b" \t").rpartition(b" ")[0]
            keep += b" " if keep else b""
            self._ready += cc[termios.VERASE] * _letters(self._line[len(keep) :])
            self._line = keep

    def _interrupt(self, number: int, key: bytes, attributes: List[Any]) -> None:
        """What was typed ahead of the key is dropped, the key is echoed, the signal is sent."""
        flags = attributes[_LFLAG]
        if not flags & termios.NOFLSH:
            self._flush(attributes)
        if flags & termios.ECHO:
            self._fresh()
            self._say(b"^" + bytes([key[0] ^ 0x40]))
        self._signal(number)

    def _flush(self, attributes: List[Any]) -> None:
        slave, flags, cc = self._terminal.slave, attributes[_LFLAG], attributes[_CC]
        _drain(slave)
        if flags & termios.ICANON and self._line:
            quiet = [*attributes]
            quiet[_LFLAG] = flags & ~termios.ECHO
            try:
                termios.tcsetattr(slave, termios.TCSANOW, quiet)
                os.write(self._terminal.master, cc[termios.VERASE] * len(self._line))
                termios.tcsetattr(slave, termios.TCSANOW, attributes)
            except (OSError, termios.error) as error:
                note(f"the terminal's input was not dropped: {error}")
        self._line = b""

    def _signal(self, number: int) -> None:
        self._wanted.append(number)
        self._ask()

    def _ask(self) -> None:
        while self._wanted and not self._asked:
            number = self._wanted.pop(0)
            try:
                if self._terminal.asks is not None:
                    os.write(self._terminal.asks, bytes([number]))
                    self._asked = True
            except OSError as error:
                note(f"no signal from the terminal: {error}")

    def _sent(self, events: int) -> None:
        answers = self._terminal.answers
        if answers is not None and not os.read(answers, 64):
            self._terminal.alone()  # the program killed it
            self._loop.mute(answers)
        self._asked = False
        self._ask()
        self.pump()


class Terminal:
    """A pseudo-terminal: the program gets `program`, `slave` is a second descriptor of that side."""

    def __init__(self, rows: int, cols: int) -> None:
        self.size: Tuple[int, int, int] = (rows, cols, 0)
        self.master, self.program = os.openpty()
        self.slave = os.open(os.ttyname(self.program), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        attributes = termios.tcgetattr(self.slave)
        attributes[_IFLAG] |= _IUTF8
        termios.tcsetattr(self.slave, termios.TCSANOW, attributes)
        self.lame = _lame(self.master, self.slave)
        set_size(self.master, rows, cols)
        self.asks: Optional[int] = None
        self.answers: Optional[int] = None
        self._inside: Tuple[int, int] = (-1, -1)
        if self.lame:
            ask, self.asks = os.pipe()
            self.answers, answer = os.pipe()
            self._inside = (ask, answer)

    def about(self) -> Dict[str, Any]:
        """For the node: size, and the offset of the output from which on it is so."""
        return {"size": list(self.size)}

    def enter(self) -> None:
        """In the program's process, before it becomes the program: the terminal is the one of its session."""
        fcntl.ioctl(self.program, termios.TIOCSCTTY, 0)
        if self.lame:
            child = os.fork()
            if child == 0:
                if os.fork():
                    os._exit(0)
                _send_signals(self.program, *self._inside)
            os.waitpid(child, 0)

    def entered(self) -> None:
        """In guestd: the program has its side."""
        for fd in (self.program, *self._inside):
            if fd >= 0:
                os.close(fd)

    def alone(self) -> None:
        """Without the process that sends signals."""
        for fd in (self.asks, self.answers):
            if fd is not None:
                os.close(fd)
        self.asks = self.answers = None

    def close(self) -> None:
        self.alone()
        os.close(self.slave)


def set_size(fd: int, rows: int, cols: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def _lame(master: int, slave: int) -> bool:
    """Whether this kernel leaves the key for a signal in the input. Nobody has the terminal yet."""
    os.set_blocking(master, False)
    os.write(master, b"\x03\n")
    try:
        left = os.read(slave, 16)
    except BlockingIOError:
        left = b""
    _drain(master)  # its echo
    return left.startswith(b"\x03")


def _drain(fd: int) -> None:
    try:
        while os.read(fd, PIECE):
            pass
    except OSError:  # there is no more
        return


def _signal_foreground(terminal: int, number: int) -> None:
    try:
        os.killpg(os.tcgetpgrp(terminal), number)
    except OSError:  # nobody is
        return


def _send_signals(terminal: int, ask: int, answer: int) -> None:
    """A process in the program's session: sends the signal that it is asked for to those in the foreground. Never
    returns."""
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        keep = sorted((terminal, ask, answer))
        for at, fd in enumerate(keep):
            os.closerange(keep[at - 1] + 1 if at else 0, fd)
        os.closerange(keep[-1] + 1, 1024)
        while True:
            wanted = os.read(ask, 1)
            if not wanted:
                return
            _signal_foreground(terminal, wanted[0])
            os.write(answer, b".")
    except OSError:
        return
    finally:
        os._exit(0)


def _unfinished(text: bytes, cc: List[Any]) -> bytes:
    """The line that is being typed at the end of `text`."""
    tail = max(text.rfind(end) for end in (b"\n", b"\r", cc[termios.VEOF]))
    line, erase = bytearray(), cc[termios.VERASE][0]
    for byte in text[tail + 1 :][-PIECE:]:
        if byte != erase:
            line.append(byte)
        elif line:
            while len(line) > 1 and line[-1] & 0xC0 == 0x80:
                line.pop()
            line.pop()
    return bytes(line)


def _letters(text: bytes) -> int:
    return sum(byte & 0xC0 != 0x80 for byte in text)
