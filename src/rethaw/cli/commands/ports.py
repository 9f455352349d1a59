"""Commands that lead to ports of a session: forward, link."""

from __future__ import annotations

from rethaw.cli import output
from rethaw.cli.app import Json
from rethaw.cli.connect import client


def forward(session: str, /, *ports: str, host: str = "127.0.0.1", json: Json = False) -> None:
    """Let ports of this machine lead to ports of a session, until Ctrl-C.

    A session that waits suspended goes on at the first connection, which
    waits for it. Connections live through saves; a crash and a suspension
    reset them, and new ones work once it runs again, or the server is back.

    For example:
      rethaw forward s_06f2 3000
      rethaw forward s_06f2 3000:8080 5432
      rethaw forward s_06f2 3000:0

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    ports:
        PORT in the sandbox, or PORT:LOCALPORT; LOCALPORT 0 takes a free one.
    host:
        The address of this machine to listen on.
    """
    import asyncio

    from rethaw.model.errors import InvalidInput

    if not ports:
        raise InvalidInput("no port is named", remedy="write `rethaw forward SESSION 3000`")
    wanted = [_pair(text) for text in ports]
    with client() as connection:
        view = connection.sessions.get(session).view
        asyncio.run(_forward(connection.target, view.id, wanted, host, json))


async def _forward(target: object, session: str, wanted: list[tuple[int, int]], host: str, json: bool) -> None:
    import asyncio
    import contextlib
    import signal
    import sys

    from rethaw.sdk.forward import Forward
    from rethaw.sdk.transport import Target

    assert isinstance(target, Target)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        for port, local in wanted:
            one = await stack.enter_async_context(
                Forward(target, session, port, local, host=host, on_trouble=output.note)
            )
            if json:
                output.emit({"session": session, "port": port, "host": host, "local_port": one.local_port})
            else:
                output.data(f"{host}:{one.local_port} -> port {port} of {session}")
        sys.stdout.flush()
        if not json:
            output.note("Ctrl-C ends it")
        await stop.wait()


def link(session: str, port: int, /, *, expires: str = "1h", json: Json = False) -> None:
    """Print an address of a session's port for a browser, which expires.

    Whoever has it may use that port of that session until then, over HTTP and
    WebSocket, and nothing else of the server.

    For example:
      rethaw link s_06f2 3000
      rethaw link s_06f2 3000 --expires 2d

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    port:
        What the program in the sandbox listens on.
    expires:
        How long it works: 1s to 30d.
    """
    from rethaw.sdk import inside

    with client() as connection:
        made = connection.run(inside.link(session, port, expires))
    if json:
        output.emit(made)
    else:
        output.data(made.url)


def _pair(text: str) -> tuple[int, int]:
    from rethaw.model.errors import InvalidInput

    port, colon, local = text.partition(":")
    numbers = (port, local if colon else port)
    if not all(n.isascii() and n.isdigit() and int(n) < 65536 for n in numbers) or int(port) == 0:
        raise InvalidInput(f"{text!r} is not PORT or PORT:LOCALPORT", remedy="write 3000 or 3000:8080")
    return int(numbers[0]), int(numbers[1])
