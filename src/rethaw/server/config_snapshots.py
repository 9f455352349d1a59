"""The `[snapshots]` and `[snapshots.s3]` tables of rethaw.toml, and the environment over them.

docs/configuration.md describes every setting; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from rethaw.model import durations
from rethaw.model.errors import InvalidInput
from rethaw.model.types import MIB
from rethaw.sdk.sizes import size_bytes
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.lazily import LAZY_FROM
from rethaw.snapshots.tiers.settings import DEFAULT_LINGER_S, DEFAULT_REGION, DEFAULT_TIMEOUT_S, S3Settings

# setting -> environment variable that goes over it
SNAPSHOT_SETTINGS: dict[str, str] = {
    "staging_bytes": "RETHAW_STAGING_BYTES",
    "cache_bytes": "RETHAW_CACHE_BYTES",
    "lazy_from_bytes": "RETHAW_LAZY_FROM_BYTES",
    "encryption_key_file": "RETHAW_SNAPSHOT_KEY_FILE",
    "old_key_files": "RETHAW_SNAPSHOT_OLD_KEY_FILES",
}
S3_SETTINGS: dict[str, str] = {
    "bucket": "RETHAW_S3_BUCKET",
    "endpoint": "RETHAW_S3_ENDPOINT",
    "region": "RETHAW_S3_REGION",
    "prefix": "RETHAW_S3_PREFIX",
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "timeout": "RETHAW_S3_TIMEOUT",
    "linger": "RETHAW_S3_LINGER",
}
DEFAULT_STAGING = 2048 * MIB
DEFAULT_CACHE = 1024 * MIB
_STAGING_LEAST = 64 * MIB
_T = TypeVar("_T")


@dataclass(frozen=True)
class SnapshotSettings:
    """`staging_bytes`: memory that captures may take until they are on disk. `cache_bytes`: raw pages kept in memory for
    quick restores; 0: none. `lazy_from_bytes`: the memory of a microVM that has at least so much in its snapshot is read when it
    is touched. `s3` None: snapshots stay on this machine."""

    staging_bytes: int = DEFAULT_STAGING
    cache_bytes: int = DEFAULT_CACHE
    lazy_from_bytes: int = LAZY_FROM
    encryption_key_file: Path | None = None
    old_key_files: tuple[Path, ...] = ()
    s3: S3Settings | None = None

    def keyring(self, env: Mapping[str, str] | None = None) -> Keyring:
        """Read the keys. Raises InvalidInput naming the setting and the file."""
        return Keyring.load(self.encryption_key_file, self.old_key_files, env)


@dataclass(frozen=True)
class _Reader:
    """One table and the environment over it."""

    table: Mapping[str, Any]
    name: str  # of the table, for messages: "snapshots.s3"
    where: str  # the file
    env: Mapping[str, str]
    variables: Mapping[str, str]

    @classmethod
    def of(
        cls, table: object, name: str, where: str, env: Mapping[str, str], variables: Mapping[str, str], *more: str
    ) -> _Reader:
        if not isinstance(table, Mapping):
            raise InvalidInput(f"{where}: {name} is not a table", remedy=f"write [{name}] and settings below it")
        entries = cast("Mapping[str, Any]", table)
        known = {*variables, *more}
        for key in entries:
            if key not in known:
                raise InvalidInput(
                    f"{where}: {key!r} in [{name}] is not a setting", remedy=f"known: {', '.join(sorted(known))}"
                )
        return cls(entries, name, where, env, variables)

    def raw(self, key: str) -> tuple[Any, str]:
        """The value as written (None: nowhere) and where it stands, for messages."""
        variable = self.variables[key]
        if self.env.get(variable):
            return self.env[variable], f"{variable} (environment)"
        return self.table.get(key), f"{self.where}: {self.name}.{key}"

    def parsed(self, key: str, parse: Callable[[Any], _T], default: _T) -> _T:
        """`parse` of the value; what it refuses is said with the place."""
        value, where = self.raw(key)
        if value is None or value == "":
            return default
        try:
            return parse(value)
        except InvalidInput as e:
            raise InvalidInput(f"{where} = {e.message}", remedy=e.remedy) from e

    def text(self, key: str, pattern: str, what: str, remedy: str, default: str) -> str:
        value, where = self.raw(key)
        if value is None or value == "":
            return default
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise InvalidInput(f"{where} = {value!r} is not {what}", remedy=remedy)
        return value


def snapshot_settings(table: object, where: str, env: Mapping[str, str]) -> SnapshotSettings:
    """Check `[snapshots]` of the file `where`. Raises InvalidInput naming file, key, value and remedy."""
    read = _Reader.of(table, "snapshots", where, env, SNAPSHOT_SETTINGS, "s3")
    staging = read.parsed("staging_bytes", _size, DEFAULT_STAGING)
    if staging < _STAGING_LEAST:
        value, place = read.raw("staging_bytes")
        raise InvalidInput(f"{place} = {value!r} is too small for a capture", remedy='write at least "64MiB"')
    return SnapshotSettings(
        staging_bytes=staging,
        cache_bytes=read.parsed("cache_bytes", _size_or_none, DEFAULT_CACHE),
        lazy_from_bytes=read.parsed("lazy_from_bytes", _size_or_none, LAZY_FROM),
        encryption_key_file=read.parsed("encryption_key_file", _path, None),
        old_key_files=read.parsed("old_key_files", _paths, ()),
        s3=_s3(read.table.get("s3", {}), where, env),
    )


def _s3(table: object, where: str, env: Mapping[str, str]) -> S3Settings | None:
    read = _Reader.of(table, "snapshots.s3", where, env, S3_SETTINGS)
    like = "3 to 63 lower-case letters, digits, dots and hyphens"
    bucket = read.text("bucket", r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "a bucket's name", f"write {like}", "")
    if not bucket:
        if read.table or any(env.get(v) for v in S3_SETTINGS.values() if v.startswith("RETHAW_")):
            raise InvalidInput(
                f"{where}: [snapshots.s3] names no bucket", remedy="set bucket, or leave the whole table out"
            )
        return None
    key, secret, token = _credentials(read, env)
    return S3Settings(
        bucket=bucket,
        endpoint=read.text(
            "endpoint",
            r"https?://[^\s/?#@\\]+/?",
            "an endpoint",
            'write it like "https://s3.example.com", without the bucket',
            "",
        ).rstrip("/")
        or None,
        region=read.text(
            "region",
            r"[A-Za-z0-9-]{1,64}",
            "a region",
            f'write it like "{DEFAULT_REGION}"',
            env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or DEFAULT_REGION,
        ),
        prefix=read.text(
            "prefix",
            r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*/?",
            "a folder",
            'write it like "rethaw" or "team/rethaw"',
            "",
        ).rstrip("/"),
        access_key_id=key,
        secret_access_key=secret,
        session_token=token,
        timeout_s=read.parsed("timeout", _timeout, DEFAULT_TIMEOUT_S),
        linger_s=read.parsed("linger", durations.seconds, DEFAULT_LINGER_S),
    )


def _credentials(read: _Reader, env: Mapping[str, str]) -> tuple[str | None, str | None, str | None]:
    """Both halves from one place, the environment first: halves of different pairs never fit each other."""
    names = ("access_key_id", "secret_access_key")
    from_env = {name: env.get(S3_SETTINGS[name]) or None for name in names}
    from_file = {name: read.table.get(name) or None for name in names}
    for found, place in (
        (from_env, {name: f"{S3_SETTINGS[name]} (environment)" for name in names}),
        (from_file, {name: f"{read.where}: {read.name}.{name}" for name in names}),
    ):
        missing = [name for name in names if found[name] is None]
        if len(missing) == 1:
            raise InvalidInput(f"{place[missing[0]]} is missing", remedy="set both halves of the key, or none")
        for name in names:
            # The value may be a secret, so it is not repeated.
            if not missing and not (isinstance(found[name], str) and re.fullmatch(r"[!-~]+", str(found[name]))):
                raise InvalidInput(f"{place[name]} is not a key", remedy="write it in quotes, without spaces")
        if not missing:
            token = env.get("AWS_SESSION_TOKEN") or None if found is from_env else None
            return found["access_key_id"], found["secret_access_key"], token
    return None, None, None


def _size(value: Any) -> int:
    return size_bytes(int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value)


def _size_or_none(value: Any) -> int:
    return 0 if not isinstance(value, bool) and value in (0, "0") else _size(value)


def _timeout(value: Any) -> float:
    found = durations.seconds(value)
    if not 0.1 <= found <= 600:
        raise InvalidInput(f"{value!r} is out of range", remedy='write something between "100ms" and "10m"')
    return found


def _path(value: Any) -> Path:
    if not isinstance(value, str) or "\0" in value or not Path(value).expanduser().is_absolute():
        raise InvalidInput(f"{value!r} is not a path", remedy="write an absolute path")
    return Path(value).expanduser()


def _paths(value: Any) -> tuple[Path, ...]:
    """A list, or paths with colons between them (environment)."""
    parts = cast("list[Any]", value if isinstance(value, list) else str(value).split(":"))
    return tuple(_path(part) for part in parts if part != "")
