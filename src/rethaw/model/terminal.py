"""What the API may ask of a node about the terminal, or the piped stdin, of a session's main program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Shown:
    """Bytes that the program wrote, before they are in the log: provisional."""

    line: int
    attempt: int
    stream: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Came:
    """A life of the session has begun here, and its program holds `taken` bytes of its stdin."""

    line: int
    attempt: int
    taken: int


@dataclass(frozen=True)
class Left:
    """A life of the session is over here. `typed`: whether something waits for the next one."""

    typed: bool


@dataclass(frozen=True)
class Missed:
    """The reader was too slow: what is missing is in the log."""


Live = Shown | Came | Left | Missed


class Seat(Protocol):
    """One who looks at a session's terminal and may type."""

    async def next(self) -> Live:
        """What happens next. What was there before the seat was taken is in the log, but `Came`, which is said again."""
        ...

    @property
    def awake(self) -> bool:
        """Whether a life of the session is here."""
        ...

    async def type(self, data: bytes) -> None:
        """Keys for the program, in the order they come; waits while too many wait."""
        ...

    async def give(self, offset: int, data: bytes) -> None:
        """The part of a piped stdin that begins at `offset`: what was given before is left out, and what comes after a
        gap is dropped."""
        ...

    def end(self, offset: int) -> None:
        """A piped stdin ends there."""
        ...

    def resize(self, rows: int, cols: int) -> None:
        """The terminal's size, now and for every life to come."""
        ...

    def close(self) -> None: ...


class Terminals(Protocol):
    def seat(self, session: str) -> Seat: ...
