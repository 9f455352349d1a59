"""Finds a `runsc`, learns what it can do from its own help, keeps copies of it, and runs its commands."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rethaw.model.errors import EngineError, EngineMismatch, EngineUnusable

log = logging.getLogger("rethaw.engines")

REMEDY = (
    "install runsc 20240729 or newer: on Debian 12 `apt install -t bookworm-backports runsc`, on Debian 13 "
    "`apt install runsc`, or set RETHAW_RUNSC to a newer one"
)
_FLAG = re.compile(r"^\s+-{1,2}([A-Za-z0-9_-]+)", re.MULTILINE)
_NEEDED = {
    "checkpoint": {"image-path", "leave-running"},
    "restore": {"image-path", "bundle", "detach"},
    "create": {"bundle", "pid-file"},
    "flags": {"root", "platform", "network", "overlay2", "ignore-cgroups"},
}
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


@dataclass(frozen=True)
class Features:
    """What one build of runsc understands: version, and flag names by subcommand ("flags" for the top-level ones)."""

    version: str
    flags: dict[str, tuple[str, ...]]
    systrap: bool

    def has(self, command: str, flag: str) -> bool:
        return flag in self.flags.get(command, ())

    def lacking(self) -> list[str]:
        """What Rethaw needs and this build has not, empty when it fits."""
        out = [
            f"{command} -{flag}"
            for command, need in _NEEDED.items()
            for flag in sorted(need)
            if not self.has(command, flag)
        ]
        return out if self.systrap else [*out, "--platform=systrap"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Runsc:
    """One build of runsc: its binary, digest and features."""

    path: Path
    sha256: str
    features: Features
    ignore_cgroups: bool = False

    def command(self, root: Path, *args: str) -> list[str]:
        """argv of a runsc command on the sandboxes under `root`. The same global flags on each call of a sandbox."""
        globals_ = [f"--root={root}", "--platform=systrap", "--network=none", "--overlay2=root:memory"]
        if self.ignore_cgroups:
            globals_.append("--ignore-cgroups")
        debug = os.environ.get("RETHAW_RUNSC_DEBUG")
        if debug:
            globals_ += ["--debug", f"--debug-log={debug}/"]
        return [str(self.path), *globals_, *args]

    @property
    def checkpoint_flags(self) -> list[str]:
        flags = ["-leave-running"]
        if self.features.has("checkpoint", "compression"):
            flags += ["-compression", "none"]
        if self.features.has("checkpoint", "exclude-committed-zero-pages"):
            flags.append("-exclude-committed-zero-pages")
        return flags


async def call(argv: Sequence[str], timeout_s: float) -> Result:
    """Run a command to its end. Raises EngineError when it takes longer than `timeout_s` (it is killed then)."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENV,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout_s)
    except (TimeoutError, asyncio.CancelledError) as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
        raise EngineError(
            f"{' '.join(argv[:1])} took longer than {timeout_s:.0f}s", remedy="see `rethaw doctor`"
        ) from None
    return Result(process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace"))


async def spawn(argv: Sequence[str], stdin: int, stdout: int, stderr: int, timeout_s: float) -> int:
    """Run a command that leaves a sandbox behind, which inherits the three descriptors; its exit code."""
    process = await asyncio.create_subprocess_exec(*argv, stdin=stdin, stdout=stdout, stderr=stderr, env=ENV)
    try:
        return await asyncio.wait_for(process.wait(), timeout_s)
    except (TimeoutError, asyncio.CancelledError) as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
        raise EngineError(
            f"starting a sandbox took longer than {timeout_s:.0f}s", remedy="see `rethaw doctor`"
        ) from None


def digest(path: Path) -> str:
    """sha256 hex of a file. Blocking."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate() -> Path:
    """The runsc that the user has: RETHAW_RUNSC, else the one on PATH. Raises EngineUnusable with what to install."""
    wanted = os.environ.get("RETHAW_RUNSC")
    if wanted:
        path = Path(wanted)
        if not path.is_file() or not os.access(path, os.X_OK):
            raise EngineUnusable(f"RETHAW_RUNSC={wanted} is not a program", remedy=REMEDY)
        return path.resolve()
    found = shutil.which("runsc") or shutil.which("runsc", path="/usr/local/bin:/usr/bin:/usr/sbin")
    if not found:
        raise EngineUnusable("runsc (gVisor) is not on PATH", remedy=REMEDY)
    return Path(found).resolve()


async def learn(path: Path) -> Features:
    """Ask a runsc what it can do. Raises EngineUnusable when it does not even answer."""

    async def text(*args: str) -> str:
        try:
            result = await call([str(path), *args], 20)
        except (OSError, EngineError) as error:
            raise EngineUnusable(f"{path} does not run: {error}", remedy=REMEDY) from None
        return result.out + result.err

    version, flags, checkpoint, restore, create = await asyncio.gather(
        text("--version"), text("flags"), text("help", "checkpoint"), text("help", "restore"), text("help", "create")
    )
    found = re.search(r"runsc version (\S+)", version)
    if not found:
        raise EngineUnusable(f"{path} does not say which runsc it is: {version.strip()[:200]!r}", remedy=REMEDY)
    texts = {"flags": flags, "checkpoint": checkpoint, "restore": restore, "create": create}
    return Features(
        found.group(1),
        {name: tuple(sorted(set(_FLAG.findall(body)))) for name, body in texts.items()},
        "systrap" in flags,
    )


class Builds:
    """The builds of runsc kept in `directory` (DATA/engines): SHA256/runsc with SHA256/features.json beside it.

    The node runs the kept copy, not the file on PATH: a package upgrade under running sandboxes changes nothing.
    """

    def __init__(self, directory: Path, *, ignore_cgroups: bool) -> None:
        self._directory = directory
        self._ignore_cgroups = ignore_cgroups
        self._known: dict[str, Runsc] = {}
        self._lock = asyncio.Lock()

    async def current(self) -> Runsc:
        """The runsc for new sandboxes, copied into the data directory. Raises EngineUnusable when none fits."""
        path = locate()
        async with self._lock:
            sha256 = await asyncio.to_thread(digest, path)
            known = self._known.get(sha256)
            if known is not None:
                return known
            features = await self._features(sha256) or await learn(path)
            lacking = features.lacking()
            if lacking:
                raise EngineUnusable(
                    f"{path} is runsc {features.version}, which lacks {', '.join(lacking)}", remedy=REMEDY
                )
            kept = await asyncio.to_thread(self._keep, path, sha256, features)
            runsc = self._known[sha256] = Runsc(kept, sha256, features, self._ignore_cgroups)
            return runsc

    async def kept(self, sha256: str) -> Runsc:
        """The build that a snapshot needs. Raises EngineMismatch naming it when it is neither kept nor in use."""
        async with self._lock:
            known = self._known.get(sha256)
            if known is not None and known.path.is_file():
                return known
            path = self._directory / sha256 / "runsc"
            if path.is_file() and await asyncio.to_thread(digest, path) == sha256:
                features = await self._features(sha256) or await learn(path)
                runsc = self._known[sha256] = Runsc(path, sha256, features, self._ignore_cgroups)
                return runsc
            self._known.pop(sha256, None)
        what = "is damaged" if path.exists() else "is gone"
        try:
            candidate = locate()
            if await asyncio.to_thread(digest, candidate) == sha256:
                return await self.current()
            here = f"runsc here is {await asyncio.to_thread(digest, candidate)}"
        except EngineUnusable:
            here = "there is no runsc here"
        raise EngineMismatch(
            f"this snapshot needs the runsc build {sha256}, whose copy {path} {what}; {here}",
            remedy=f"put that build back as {path}",
            build=sha256,
        )

    async def _features(self, sha256: str) -> Features | None:
        try:
            data = json.loads(await asyncio.to_thread((self._directory / sha256 / "features.json").read_text))
            flags = {str(k): tuple(str(f) for f in v) for k, v in data["flags"].items()}
            return Features(str(data["version"]), flags, bool(data["systrap"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _keep(self, path: Path, sha256: str, features: Features) -> Path:
        """Copy `path` to SHA256/runsc: complete and durable, or not there at all."""
        home = self._directory / sha256
        kept = home / "runsc"
        if kept.is_file() and digest(kept) == sha256:
            return kept
        home.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"version": features.version, "flags": features.flags, "systrap": features.systrap})
        _durable(home / "features.json", record.encode())
        fd, temporary = tempfile.mkstemp(prefix=".runsc-", dir=home)
        try:
            with os.fdopen(fd, "wb") as out, path.open("rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
                os.fchmod(out.fileno(), 0o755)
                out.flush()
                os.fsync(out.fileno())
            if digest(Path(temporary)) != sha256:
                raise EngineUnusable(f"{path} changed while it was copied", remedy="try again")
            Path(temporary).replace(kept)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
        _sync_directory(home)
        _sync_directory(self._directory)
        return kept

    async def prune(self, keep: set[str]) -> list[str]:
        """Remove the copies of builds that no snapshot in `keep` needs, except the one in use; their digests."""

        def remove() -> list[str]:
            gone: list[str] = []
            if not self._directory.is_dir():
                return gone
            for home in self._directory.iterdir():
                if re.fullmatch(r"[0-9a-f]{64}", home.name) and home.name not in keep and home.name not in self._known:
                    shutil.rmtree(home, ignore_errors=True)
                    gone.append(home.name)
            return gone

        return await asyncio.to_thread(remove)


def _durable(path: Path, data: bytes) -> None:
    fd, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    with os.fdopen(fd, "wb") as out:
        out.write(data)
        os.fchmod(out.fileno(), 0o644)
        out.flush()
        os.fsync(out.fileno())
    Path(temporary).replace(path)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
