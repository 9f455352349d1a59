"""Where the server is and the token it asks for: ~/.config/rethaw/credentials.json, mode 0600.

`rethaw up` runs as root and writes the file for the person who started it (`invoking_user`, aware of sudo). It writes as
that person, never as root: a directory that a user controls may hold any symbolic link.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rethaw.model.errors import InvalidInput, RethawError

DEFAULT_URL = "http://127.0.0.1:7420"


@dataclass(frozen=True)
class Credentials:
    """`token` None: nothing is known, the server will say so. `source` names where the token came from, `named` where the
    URL did: empty when nothing names one."""

    url: str = DEFAULT_URL
    token: str | None = None
    source: str = "no credentials file"
    named: str = field(default="", compare=False)


@dataclass(frozen=True)
class User:
    """Whom the credentials are for."""

    name: str
    uid: int
    gid: int
    home: Path

    @property
    def path(self) -> Path:
        return path_in(self.home)


def path_in(home: Path) -> Path:
    """The credentials file of the user with this home directory."""
    return home / ".config" / "rethaw" / "credentials.json"


def invoking_user(env: Mapping[str, str] | None = None) -> User:
    """The person behind this process: SUDO_USER's account when root was reached by sudo, else this process's own."""
    env = os.environ if env is None else env
    name = env.get("SUDO_USER", "") if os.geteuid() == 0 else ""
    if name and name != "root":
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return User(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))
    uid, gid = os.geteuid(), os.getegid()
    try:
        own = pwd.getpwuid(uid)
        name, home = own.pw_name, own.pw_dir
    except KeyError:
        name, home = str(uid), "/"
    return User(name, uid, gid, Path(env.get("HOME") or home))


def load(env: Mapping[str, str] | None = None) -> Credentials:
    """RETHAW_URL and RETHAW_TOKEN, then the file of this process's user, then the default URL without a token.

    A token from the file is only for the URL it was written for. Raises InvalidInput for a file that is not as
    `save` writes it.
    """
    env = os.environ if env is None else env
    url, token = env.get("RETHAW_URL"), env.get("RETHAW_TOKEN")
    if url:
        url = checked_url(url, "RETHAW_URL")
    named = "RETHAW_URL" if url else ""
    if token:
        return Credentials(url or DEFAULT_URL, token, "RETHAW_TOKEN", named)
    path = path_in(Path(env.get("HOME") or Path.home()))
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Credentials(url or DEFAULT_URL, named=named)
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput(f"{path} cannot be read: {e}", remedy="remove it and run `rethaw up` again") from e
    try:
        found: Any = json.loads(text)
        stored, secret = str(found["url"]), str(found["token"])
    except (ValueError, KeyError, TypeError) as e:
        raise InvalidInput(f"{path} is damaged", remedy="remove it and run `rethaw up` again") from e
    stored = checked_url(stored, str(path))
    if url and url != stored:
        return Credentials(url, None, f"{path} (which is for {stored})", named)
    return Credentials(stored, secret, str(path), named or str(path))


def save(url: str, token: str, user: User | None = None) -> Path:
    """Write the file for `user` (default: `invoking_user()`), replacing it at once. Returns its path.

    As root for somebody else it forks and becomes that user first. Raises RethawError naming the path and cause.
    """
    user = invoking_user() if user is None else user
    text = json.dumps({"url": url, "token": token}, indent=2) + "\n"
    if user.uid == os.geteuid():
        try:
            _write(user.path, text)
        except OSError as e:
            raise RethawError(f"{user.path} cannot be written: {e.strerror}") from e
        return user.path
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(user.gid)
            os.setuid(user.uid)
            _write(user.path, text)
            status = 0
        except OSError as e:
            status = min(e.errno or 1, 255)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise RethawError(
            f"{user.path} cannot be written as {user.name}: {os.strerror(status) if status > 0 else 'killed'}",
            remedy="set RETHAW_URL and RETHAW_TOKEN instead",
        )
    return user.path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def checked_url(url: str, where: str) -> str:
    """`url` without trailing slash. Raises InvalidInput naming `where`."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fits = False
    if not fits:
        raise InvalidInput(f"{where} = {url!r} is not a server's URL", remedy=f"write it like {DEFAULT_URL}")
    return url.rstrip("/")
