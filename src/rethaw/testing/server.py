"""A real `rethaw up` in a temporary data directory, for tests and benchmarks: start, kill, start again, clean up.

`with RunningServer(providers={"openai": {"base_url": provider.openai_url, "key": "k"}}) as server:
server.cli("run", "-d", "agent.py")`. Needs root and runsc. Images are shared between data directories by
`image_cache()`, since a base image takes 20 s to build.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

from rethaw.model import errors
from rethaw.snapshots.staging import lazy_for, staging_for
from rethaw.testing import processes
from rethaw.testing.processes import Box

_log = logging.getLogger("rethaw.testing")
_BUCKET = ("RETHAW_S3_", "RETHAW_SNAPSHOT_")


def image_cache() -> Path:
    """Where tests keep built images, from run to run."""
    return Path(os.environ.get("RETHAW_TEST_IMAGES") or Path(tempfile.gettempdir()) / "rethaw-test-images")


def toml(config: Mapping[str, Any]) -> str:
    """`config` as TOML: tables of tables, strings, numbers, booleans, lists of strings."""
    lines: list[str] = []

    def key(name: str) -> str:
        return name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name)

    def table(prefix: str, values: Mapping[str, Any]) -> None:
        plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
        if prefix and plain:
            lines.append(f"[{prefix}]")
        lines.extend(f"{key(k)} = {json.dumps(v)}" for k, v in plain.items())
        for k, v in values.items():
            if isinstance(v, Mapping):
                table(f"{prefix}.{key(k)}" if prefix else key(k), cast(Mapping[str, Any], v))

    table("", config)
    return "\n".join(lines) + "\n"


class RunningServer:
    """`providers`: the tables under [providers]. `config`: the rest of rethaw.toml. `faults`: RETHAW_FAULTS of the
    first start. `data_dir`: kept at the end when given, else a temporary one that `close()` removes."""

    def __init__(
        self,
        *,
        providers: Mapping[str, Mapping[str, Any]] | None = None,
        config: Mapping[str, Any] | None = None,
        faults: str = "",
        data_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
        images: Path | None = None,
    ) -> None:
        self._own = data_dir is None
        # Short, because a Unix socket's path below it may have 107 bytes at most.
        self.root = Path(tempfile.mkdtemp(prefix="rethaw-t-")) if data_dir is None else data_dir.parent
        if self._own:
            self.root.chmod(0o711)  # PostgreSQL's user must get through
        self.data_dir = data_dir or self.root / "data"
        self.config_file = self.root / "rethaw.toml"
        self.log_file = self.root / "server.log"
        self.faults = faults
        self._extra_env = dict(env or {})
        self._config = {**(config or {}), "providers": dict(providers or {})}
        self._images = image_cache() if images is None else images
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.port = _free_port()

    # ------------------------------------------------------------ life

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def configure(self, **tables: Any) -> None:
        """Change rethaw.toml; seen at the next start."""
        self._config.update(tables)

    def start(self, timeout_s: float = 120.0) -> Self:
        """Start the server and return once it answers. Raises Unavailable with the end of its log."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._images.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(toml(self._config))
        with contextlib.suppress(FileNotFoundError):
            (self.data_dir / "server.json").unlink()
        command = [sys.executable, "-m", "rethaw.cli.main", "up"]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env | {"RETHAW_FAULTS": self.faults},
                cwd=self.root,
                start_new_session=True,
            )
        self.starts += 1
        self._wait_ready(timeout_s)
        return self

    def _wait_ready(self, timeout_s: float) -> None:
        process, end = self.process, time.monotonic() + timeout_s
        assert process is not None
        while time.monotonic() < end:
            if process.poll() is not None:
                raise errors.Unavailable(
                    f"the server ended with {process.returncode} at its start", log=self.log_tail()
                )
            with contextlib.suppress(OSError, errors.RethawError, http.client.HTTPException, ValueError, KeyError):
                if self.request("GET", "/healthz", timeout_s=5)["ok"]:
                    return
            time.sleep(0.05)
        raise errors.Unavailable(f"the server did not answer within {timeout_s:g} s", log=self.log_tail())

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None, "start() it first"
        return self.process.pid

    def kill9(self) -> None:
        """SIGKILL the server process (API, control plane, node), and nothing else."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM and wait; its exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise errors.Unavailable(f"the server did not stop within {timeout_s:g} s", log=self.log_tail()) from None

    def restart(self, *, faults: str = "", timeout_s: float = 120.0) -> Self:
        """Start it again after a kill (or stop it first)."""
        if self.running:
            self.stop()
        self.faults = faults
        return self.start(timeout_s)

    def close(self) -> None:
        """Stop it, and remove every process, mount and file of it."""
        with contextlib.suppress(errors.Unavailable):
            if self.running:
                self.stop(20)
        processes.sweep(self.data_dir)
        shutil.rmtree(staging_for(self.data_dir), ignore_errors=True)
        # A server that was killed leaves the place where it mounted lazy files, and perhaps a dead mount in it.
        place = lazy_for(self.data_dir)
        with contextlib.suppress(OSError):
            for below in list(place.iterdir()):
                subprocess.run(["umount", "--lazy", str(below)], check=False, capture_output=True)
        shutil.rmtree(place, ignore_errors=True)
        if self._own:
            shutil.rmtree(self.root, ignore_errors=True)

    # ------------------------------------------------------------ what is where

    @property
    def url(self) -> str:
        return str(json.loads((self.data_dir / "server.json").read_text())["url"])

    @property
    def home(self) -> Path:
        """HOME of the server and of its CLI: credentials of tests never meet those of their user."""
        home = self.root / "home"
        home.mkdir(exist_ok=True)
        return home

    @property
    def token(self) -> str:
        return (self.data_dir / "token").read_text().strip()

    @property
    def env(self) -> dict[str, str]:
        """Environment of the server and of `cli`."""
        drop = {
            "RETHAW_URL",
            "RETHAW_TOKEN",
            "RETHAW_CONFIG",
            "RETHAW_FAULTS",
            "SUDO_USER",
            "DATABASE_URL",
            "XDG_CONFIG_HOME",
        }
        # Nor may it ever write into its user's bucket.
        kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith(_BUCKET)}
        own = {
            "HOME": str(self.home),
            "RETHAW_DATA_DIR": str(self.data_dir),
            "RETHAW_LISTEN": f"127.0.0.1:{self.port}",
            "RETHAW_CONFIG": str(self.config_file),
            "RETHAW_IMAGES": str(self._images),
        }
        return kept | own | self._extra_env

    def log_tail(self, lines: int = 40) -> str:
        """The end of the server's own log."""
        try:
            return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def postgres_pid(self) -> int:
        """The embedded PostgreSQL's postmaster."""
        return int((self.data_dir / "pg" / "postmaster.pid").read_text().split()[0])

    def processes(self) -> list[int]:
        """Every process that belongs to the data directory: the server, PostgreSQL, sandboxes."""
        return processes.mentioning(str(self.data_dir))

    def sandboxes(self) -> list[Box]:
        """Running sandboxes of any engine, those that were only created ahead left out."""
        boxes: list[Box] = [*processes.gvisor(self.data_dir / "run"), *processes.qemu(self.data_dir / "vm")]
        return [box for box in boxes if box.status() == "running"]

    # ------------------------------------------------------------ talking to it

    def request(
        self, method: str, path: str, body: object = None, *, timeout_s: float = 30.0, raw: bool = False
    ) -> Any:
        """One API call; JSON (or bytes) in, JSON (or, with `raw`, bytes) out. Raises the error that the server named, OSError
        when it is not there."""
        at = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(at.hostname or "127.0.0.1", at.port, timeout=timeout_s)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        headers = {"content-type": kind}
        with contextlib.suppress(OSError):
            headers["authorization"] = f"Bearer {self.token}"
        try:
            connection.request(method, path, sent, headers)
            answer = connection.getresponse()
            data = answer.read()
        except http.client.HTTPException as error:  # it was killed between two bytes
            raise ConnectionResetError(f"the server broke off: {error!r}") from error
        finally:
            connection.close()
        if answer.status >= 400:
            _raise(answer.status, data)
        return data if raw else json.loads(data)

    def events(self, session: str, *, all_lines: bool = False) -> list[dict[str, Any]]:
        """The session's log from its start; `all_lines`: superseded events as well."""
        out: list[dict[str, Any]] = []
        while True:
            after = out[-1]["seq"] if out else 0
            query = f"after={after}&limit=1000" + ("&all_lines=true" if all_lines else "")
            page: list[dict[str, Any]] = self.request("GET", f"/v1/sessions/{session}/events?{query}")["events"]
            if not page:
                return out
            out += page

    def cli(
        self, *args: str, check: bool = True, timeout_s: float = 120.0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the `rethaw` command as its user would. Raises RethawError with its stderr unless `check` is off."""
        done = subprocess.run(
            [sys.executable, "-m", "rethaw.cli.main", *args],
            env=self.env,
            cwd=cwd,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise errors.RethawError(f"rethaw {' '.join(args)} ended with {done.returncode}: {done.stderr.strip()}")
        return done


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _raise(status: int, data: bytes) -> None:
    try:
        error: dict[str, Any] = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        raise errors.RethawError(f"HTTP {status}: {data[:300].decode(errors='replace')}") from None
    kind = errors.by_code(str(error.get("code", "")))
    raise kind(str(error.get("message", "")), remedy=error.get("remedy"), **(error.get("details") or {}))
