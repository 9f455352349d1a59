"""`rethaw mcp`: sessions for MCP clients."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Json


def mcp(
    *,
    http: str | None = None,
    agents: Path | None = None,
    allow_host: Annotated[list[str] | None, Parameter(negative="")] = None,
    json: Json = False,
) -> None:
    """Let MCP clients start, watch, message, fork and read sessions.

    Speaks on stdin and stdout, as clients that start it expect, or over HTTP.
    There it asks for the token that the server asks for, and the path is /mcp.

    For example:
      rethaw mcp
      rethaw mcp --agents ~/agents
      rethaw mcp --http 127.0.0.1:7421

    Parameters
    ----------
    http:
        HOST:PORT to listen on, in place of stdin and stdout.
    agents:
        A directory whose Python agents clients may start. They are imported on
        this machine for that, as "rethaw run" does.
    allow_host:
        Another HOST[:PORT] under which clients reach it, say of a proxy; may be
        given again.
    """
    from rethaw.mcp.local import AgentsDir
    from rethaw.mcp.server import listen, serve_http, serve_stdio
    from rethaw.model.errors import InvalidInput

    opened = AgentsDir(agents) if agents is not None else None
    if http is None:
        if allow_host:
            raise InvalidInput("--allow-host is for HTTP", remedy="give --http HOST:PORT as well")
        if sys.stdin.isatty():
            output.note("waiting for an MCP client on stdin; see docs/mcp.md for how a client is told to start this")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the thread that reads stdin would hold up anything gentler
        asyncio.run(serve_stdio(opened))
        return

    def ready(url: str) -> None:
        if json:
            output.emit({"url": url})
        else:
            output.data(f"ready at {url}")
            sys.stdout.flush()

    with listen(http) as sock:
        asyncio.run(serve_http(sock, opened, allow_host or [], ready))
