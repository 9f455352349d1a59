"""Where an engine instance keeps what lives as long as its process, and how a later one finds what a dead one left.

DATA/RUN/INSTANCE/lock          held (flock) by the node process for its whole life
DATA/logs/sandbox-ID.log        standard error of a guest that wrote any

gVisor (RUN is `run`):

DATA/run/INSTANCE/BUILD/        runsc --root, one for each build in use
DATA/run/INSTANCE/bundles/SANDBOX/config.json
DATA/run/INSTANCE/restore/SANDBOX/   links to the sections while a restore reads them

QEMU (RUN is `vm`):

DATA/vm/INSTANCE/VM/            a machine's sockets, pipes and disk
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import uuid
from pathlib import Path

from rethaw.engines import processes
from rethaw.engines.cgroups import Cgroups

log = logging.getLogger("rethaw.engines")


class Home:
    """The directories of one engine instance. Names are short: a Unix socket's path has 108 bytes."""

    def __init__(self, data_dir: Path, run: str = "run", mark: str = "--root=", program: str = "runsc-sandbox") -> None:
        """`mark`: how an argument with a path below an instance begins; `program`: argv[0] of what is a sandbox."""
        self.data_dir = data_dir
        self._mark, self._program = mark, program
        self.logs = data_dir / "logs"
        self.engines = data_dir / "engines"
        self._run = data_dir / run
        # cgroups are machine-wide, so their owner's name carries the data directory.
        self._scope = hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]
        self._instance = ""
        self._lock = -1

    def open(self) -> None:
        """Make the directories and take the lock. Blocking; nothing the second time."""
        if self._lock != -1:
            return
        instance = uuid.uuid4().hex[:8]
        for directory in (self._run / instance, self.logs, self.engines):
            directory.mkdir(parents=True, exist_ok=True)
        (self._run / instance).chmod(0o700)
        lock = os.open(self._run / instance / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._instance, self._lock = instance, lock

    @property
    def path(self) -> Path:
        return self._run / self._instance

    @property
    def owner(self) -> str:
        """Name of this instance's cgroups."""
        return f"{self._scope}-{self._instance}"

    def root(self, build: str) -> Path:
        """`--root` for the sandboxes of one build."""
        root = self.path / build[:12]
        root.mkdir(exist_ok=True)
        return root

    def bundle(self, sandbox: str) -> Path:
        return self.path / "bundles" / sandbox

    def close(self, cgroups: Cgroups) -> None:
        """Give the lock back and remove what nothing uses any more. Blocking."""
        if self._lock == -1:
            return
        if not processes.find(f"{self._mark}{self.path}/"):
            shutil.rmtree(self.path, ignore_errors=True)
            cgroups.disown(self.owner)
        os.close(self._lock)
        self._lock = -1

    async def sweep(self, cgroups: Cgroups) -> int:
        """Remove every instance whose process is dead: its sandboxes, state and cgroups; how many sandboxes ran."""
        found = 0
        for path in await asyncio.to_thread(self._others):
            lock = _try_lock(path / "lock")
            if lock is None:
                continue
            try:
                running = await asyncio.to_thread(processes.find, f"{self._mark}{path}/")
                sandboxes = [pid for pid, argv in running.items() if argv[0] == self._program]
                for pid in running:
                    processes.kill_verified(pid, f"{self._mark}{path}/")
                found += len(sandboxes)
                owner = f"{self._scope}-{path.name}"
                for group in cgroups.owned(owner):
                    group.kill()
                    await group.remove()
                cgroups.disown(owner)
                await asyncio.to_thread(shutil.rmtree, path, True)
                if running:
                    log.info("removed %d sandboxes that a dead node process left in %s", len(sandboxes), path)
            finally:
                os.close(lock)
        await asyncio.to_thread(self._sweep_logs)
        return found

    def _others(self) -> list[Path]:
        if not self._run.is_dir():
            return []
        return [p for p in self._run.iterdir() if p.name != self._instance and (p / "lock").is_file()]

    def _sweep_logs(self) -> None:
        """Logs of sandboxes that no instance has any more."""
        alive = {a.rpartition("/")[2] for argv in processes.find(f"{self._mark}{self._run}/").values() for a in argv}
        for path in self.logs.glob("sandbox-*.log"):
            if path.stem.removeprefix("sandbox-") not in alive:
                with contextlib.suppress(OSError):
                    path.unlink()


def _try_lock(path: Path) -> int | None:
    """The lock as a descriptor if nobody holds it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
