"""What the API may ask of a node about a running session's inside: connections to its ports, programs beside its agent."""

from __future__ import annotations

from typing import Protocol

from rethaw.model.looking import Shell, TerminalSize
from rethaw.model.wire import Wire

PYTHON = "\1python"  # as the first word of a command: guestd's own interpreter, whatever the image has


class ExecRequest(Wire):
    """What to run in a running session. `env` is added to the agent's; `workdir`: None for the agent's. Without `terminal` its
    streams are plain, and its input is empty unless `input`."""

    command: tuple[str, ...]
    env: dict[str, str] = {}
    workdir: str | None = None
    terminal: TerminalSize | None = None
    input: bool = False


class Connection(Protocol):
    """One TCP connection into a sandbox. It lives through every save; a suspension and a crash reset it (ChannelBroken)."""

    async def read(self) -> bytes | None:
        """The next bytes of the program, None at their end. Raises ChannelBroken saying why when it was reset."""
        ...

    async def write(self, data: bytes) -> None:
        """Raises ChannelBroken as `read` does."""
        ...

    def end(self) -> None:
        """Nothing more is written."""
        ...

    def close(self) -> None:
        """Reset what is not over."""
        ...


class Dialing(Protocol):
    """All raise Unavailable when the session has no sandbox here (`details["sent"]`: whether the program may have been
    started), Conflict when its guestd is too old for it."""

    async def port(self, session: str, port: int) -> Connection:
        """Raises PortClosed."""
        ...

    async def exec(self, session: str, request: ExecRequest) -> Shell:
        """Raises NotFound, InvalidInput for what cannot be run."""
        ...
