"""A cluster's directories, its operating-system user, and the processes that live in it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import signal
import stat
from dataclasses import dataclass
from pathlib import Path

from rethaw.model.errors import InvalidInput

SOCKET_FILE = ".s.PGSQL.5432"
_SUN_PATH = 107  # bytes of a Unix socket's path, the ending NUL left out (unix(7))
MOUNT = Path("/run/rethaw-pg")  # mount point of launch.py's private namespace


@dataclass(frozen=True)
class Account:
    """Who runs PostgreSQL. `switch`: we are root and must become that user."""

    uid: int
    gid: int
    switch: bool


def account(data_dir: Path) -> Account:
    """The owner of an existing cluster; for a new one `postgres` or else `nobody` when we are root, else ourselves.

    No user is ever created. Raises InvalidInput when the cluster belongs to somebody we cannot become.
    """
    owner = data_dir.stat().st_uid if (data_dir / "PG_VERSION").exists() else None
    if os.geteuid() != 0:
        if owner is not None and owner != os.geteuid():
            raise InvalidInput(
                f"{data_dir} belongs to user id {owner}, not to {os.geteuid()}",
                remedy="run as its owner or as root, or choose another data directory",
            )
        return Account(os.geteuid(), os.getegid(), False)
    if owner is not None and owner != 0:
        try:
            gid = pwd.getpwuid(owner).pw_gid
        except KeyError:
            gid = data_dir.stat().st_gid
        return Account(owner, gid, True)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return Account(found.pw_uid, found.pw_gid, True)
    raise InvalidInput("there is no user `postgres` or `nobody` to run PostgreSQL as", remedy="set DATABASE_URL")


def own_name() -> str:
    """The name of the user that will connect. Raises InvalidInput when it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise InvalidInput(
            f"user id {os.geteuid()} has no name in /etc/passwd, PostgreSQL needs one", remedy="set DATABASE_URL"
        ) from None


def reachable(path: Path, who: Account) -> bool:
    """Whether `who` may pass through every directory down to and including `path`."""
    for directory in (path, *path.parents):
        info = directory.stat()
        shift = 6 if info.st_uid == who.uid else 3 if info.st_gid == who.gid else 0
        if not (info.st_mode >> shift) & stat.S_IXOTH:
            return False
    return True


def socket_parent(run_dir: Path, data_dir: Path) -> Path:
    """Where the directory with our configuration and socket goes: under `run_dir` if the path is short enough."""
    wanted = run_dir / "pg"
    if len(os.fsencode(wanted / "s" / SOCKET_FILE)) <= _SUN_PATH - 4 and "," not in str(wanted):
        return wanted
    mark = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    if os.geteuid() == 0:
        return Path("/run") / f"rethaw-pg-{mark}"
    return Path("/tmp") / f"rethaw-pg-{os.geteuid()}-{mark}"


def private_dir(path: Path, mode: int, who: Account | None = None) -> None:
    """Make `path` a real directory of ours (or of `who`) with `mode`. Raises InvalidInput when it is somebody else's."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    info = path.lstat()
    allowed = {os.geteuid(), who.uid if who is not None else os.geteuid()}
    if not stat.S_ISDIR(info.st_mode) or info.st_uid not in allowed:
        raise InvalidInput(f"{path} is not a directory of ours (owner {info.st_uid})", remedy="remove it")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if who is not None and who.switch:
            os.fchown(fd, who.uid, who.gid)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def processes_in(directory: Path) -> list[int]:
    """Pids of postgres processes whose working directory is `directory`: a postmaster and its children. Told by inode,
    so that neither a recycled pid nor another name of the directory deceives."""
    try:
        wanted = directory.stat()
    except FileNotFoundError:
        return []
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _lives_in(int(entry.name), wanted):
            found.append(int(entry.name))
    return found


def _lives_in(pid: int, wanted: os.stat_result) -> bool:
    try:
        here = Path(f"/proc/{pid}/cwd").stat()
        if (here.st_dev, here.st_ino) != (wanted.st_dev, wanted.st_ino):
            return False
        return Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)") == "postgres"
    except OSError:
        return False


def send(pid: int, directory: Path, number: signal.Signals) -> None:
    """Signal `pid` if it still is a postgres process of `directory`; by pidfd, so that a recycled pid is never hit."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        fd = os.pidfd_open(pid)
        try:
            if _lives_in(pid, directory.stat()):
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


def recorded_pid(directory: Path) -> int | None:
    """The pid in postmaster.pid, alive or not."""
    try:
        return abs(int((directory / "postmaster.pid").read_text().split("\n", 1)[0]))
    except (OSError, ValueError):
        return None


def major_of(directory: Path) -> int | None:
    """The major version that made the cluster; None when there is none yet. Raises InvalidInput for something else."""
    try:
        return int((directory / "PG_VERSION").read_text().split(".")[0])
    except FileNotFoundError:
        if directory.exists() and any(directory.iterdir()):
            raise InvalidInput(
                f"{directory} is not empty and no PostgreSQL cluster",
                remedy="remove it or choose another data directory",
            ) from None
        return None
    except ValueError as e:
        raise InvalidInput(f"{directory / 'PG_VERSION'} is damaged: {e}", remedy="restore it from a backup") from None
