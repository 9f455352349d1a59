"""`rethaw up` in the foreground, and how it is started in the background."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rethaw.cli import output
from rethaw.model.errors import RethawError, Unavailable

if TYPE_CHECKING:
    from rethaw.server.config import Config

_READY_S = 300.0
_POLL_S = 0.05


def serve(settings: Config, as_json: bool) -> int:
    """Run the server until it is told to stop."""
    from rethaw.server import up

    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("rethaw").setLevel(settings.log_level)

    def ready(url: str, token: str) -> None:
        _give_credentials(url, token)
        if as_json:
            output.emit({"url": url, "pid": os.getpid()})
        else:
            output.data(f"ready at {url}")
            sys.stdout.flush()

    if settings.source is not None:
        output.note(f"configuration {settings.source}")
    asyncio.run(up.serve(settings, output.note, ready))
    return 0


def _give_credentials(url: str, token: str) -> None:
    """Write them for whoever called this, and say so."""
    from rethaw.sdk import credentials

    user = credentials.invoking_user()
    try:
        said = f"credentials for {user.name} in {credentials.save(url, token, user)}"
    except RethawError as e:
        said = f"no credentials for {user.name}: {e}"
    output.note(said)


def start_detached(settings: Config, as_json: bool) -> int:
    """Start `serve` in a session of its own and wait until it is ready. Its output goes to DATA_DIR/logs/server.log."""
    running = _running(settings.data_dir)
    if running is None:
        running = _spawn(settings)
    else:
        output.note("it runs already")
        with contextlib.suppress(OSError):  # somebody else may ask, or have lost theirs
            _give_credentials(running["url"], (settings.data_dir / "token").read_text().strip())
    if as_json:
        output.emit({"url": running["url"], "pid": running["pid"]})
    else:
        output.data(f"ready at {running['url']}")
        output.note(f"stop it: sudo kill {running['pid']}")
    return 0


def _running(data_dir: Path) -> dict[str, Any] | None:
    """What server.json says, if that server lives."""
    try:
        found = cast("dict[str, Any]", json.loads((data_dir / "server.json").read_text()))
        # After a SIGKILL the file stays, and its pid may be anybody's by now.
        if b"rethaw" not in Path(f"/proc/{int(found['pid'])}/cmdline").read_bytes():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _spawn(settings: Config) -> dict[str, Any]:
    logs = settings.data_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / "server.log"
    command = [sys.executable, "-m", "rethaw.cli.main", "up", "--data-dir", str(settings.data_dir)]
    command += ["--engine", settings.engine]
    command += ["--listen", f"[{settings.host}]:{settings.port}" if ":" in settings.host else _listen(settings)]
    if settings.source is not None:
        command += ["--config", str(settings.source)]
    with path.open("ab") as log:
        begin = log.tell()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    end = time.monotonic() + _READY_S
    with path.open("rb") as reader:
        reader.seek(begin)
        try:
            while time.monotonic() < end:
                ended = child.poll()
                _relay(reader.read())
                found = _running(settings.data_dir)
                if found is not None and found["pid"] == child.pid:
                    _relay(reader.read())
                    return found
                if ended is not None:
                    raise SystemExit(ended or 1)
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)
            raise
    raise Unavailable(f"the server is not ready after {_READY_S:.0f} s", remedy=f"see {path}", pid=child.pid)


def _listen(settings: Config) -> str:
    return f"{settings.host}:{settings.port}"


def _relay(chunk: bytes) -> None:
    """What the server says on its way, to stderr; that it is ready is said by whoever waits."""
    for line in chunk.splitlines(keepends=True):
        if not line.startswith(b"ready at "):
            output.raw(line, stderr=True)
