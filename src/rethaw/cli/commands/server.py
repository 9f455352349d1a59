"""Commands about the server and this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json

if TYPE_CHECKING:
    from rethaw.server.config import Config


def _config(
    config: str | None, data_dir: str | None = None, listen: str | None = None, engine: str | None = None
) -> Config:
    from rethaw.server.config import load

    given = {"data_dir": data_dir, "listen": listen, "engine": engine}
    return load(config, overrides={k: v for k, v in given.items() if v is not None})


def up(
    *,
    detach: Annotated[bool, Flag, Parameter(name=("--detach", "-d"))] = False,
    config: str | None = None,
    data_dir: str | None = None,
    listen: str | None = None,
    engine: str | None = None,
    json: Json = False,
) -> int:
    """Start everything on this machine: API, control plane, a node, PostgreSQL.

    Needs root. Whoever called it (through sudo as well) gets credentials for
    the other commands. Ctrl-C or SIGTERM ends it in order: sessions are
    suspended and go on at the next start. SIGKILL loses nothing either. While
    it runs, "up --detach" only writes the credentials again.

    For example:
      sudo rethaw up
      sudo rethaw up --detach
      sudo rethaw up --config /etc/rethaw.toml --listen 127.0.0.1:7500

    Parameters
    ----------
    detach:
        Return once it is ready; it goes on in the background.
    config:
        Configuration file; else RETHAW_CONFIG, else ./rethaw.toml.
    data_dir:
        Where everything is kept.
    listen:
        HOST:PORT of the API.
    engine:
        What runs agents that do not say which: gvisor, or qemu for microVMs.
    """
    from rethaw.cli import daemon
    from rethaw.model.errors import InvalidInput

    settings = _config(config, data_dir, listen, engine)
    if os.geteuid() != 0:
        raise InvalidInput("the server runs sandboxes and has to be root", remedy=f"run: sudo {' '.join(_again())}")
    return daemon.start_detached(settings, json) if detach else daemon.serve(settings, json)


def _again() -> list[str]:
    """This command line as it would be typed again."""
    program = Path(sys.argv[0])
    name = str(program) if program.name == "rethaw" else "rethaw"
    return [name, *sys.argv[1:]]


def doctor(*, config: str | None = None, json: Json = False) -> int:
    """Check that agents can run here: a guest goes through boot, save, restore.

    Asks the server if one answers; else looks at this machine itself, which
    needs root. Says what to install, or why not.

    For example:
      sudo rethaw doctor
      rethaw doctor --json

    Parameters
    ----------
    config:
        Configuration file; else RETHAW_CONFIG, else ./rethaw.toml.
    """
    import asyncio

    from rethaw.cli.connect import client
    from rethaw.model.errors import InvalidInput, Unavailable

    findings: list[dict[str, Any]] = []
    try:
        with client() as connection:
            connection.health()
            output.note(f"asking the server at {connection.url}")
            reports = connection.doctor()
        for report in reports:
            findings.append(_told(report, json))
    except Unavailable:
        if os.geteuid() != 0:
            raise InvalidInput(
                "no server answers, and looking at this machine itself needs root", remedy="run: sudo rethaw doctor"
            ) from None
        output.note("no server answers; looking at this machine itself")
        settings = _config(config)

        async def look() -> None:
            from rethaw.server.doctor import examine

            async for finding in examine(settings):
                findings.append(_told(output.jsonable(finding), json))

        asyncio.run(look())
    bad = [f for f in findings if not f["ok"] and f["needed"]]
    if json:
        output.emit({"ok": not bad, "findings": findings})
    else:
        output.note(
            "agents can run here" if not bad else f"agents cannot run here: {', '.join(f['name'] for f in bad)}"
        )
    return 8 if bad else 0


def _told(finding: dict[str, Any], json: bool) -> dict[str, Any]:
    if not json:
        mark, code = ("ok", "32") if finding["ok"] else ("no", "31") if finding["needed"] else ("--", "33")
        output.data(f"{output.color(mark, code)}  {finding['name']:<20} {output.plain(str(finding['said']))}")
        if not finding["ok"] and finding.get("remedy"):
            output.data(f"    {'':<20} {output.plain(str(finding['remedy']))}")
        sys.stdout.flush()
    return finding
