"""The server's configuration: rethaw.toml, then the environment over it. Every setting has a default.

Which file: `--config`, else RETHAW_CONFIG, else ./rethaw.toml if there is one. Nothing else is searched.
docs/configuration.md describes every setting; a test compares the two.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rethaw.control.prices import Prices, prices_from
from rethaw.gateway.providers import Providers
from rethaw.model.egress import EgressSettings
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.server.config_egress import egress_settings
from rethaw.server.config_snapshots import SnapshotSettings, snapshot_settings

DEFAULT_DATA_DIR = Path("/var/lib/rethaw")
DEFAULT_LISTEN = "127.0.0.1:7420"
LOG_LEVELS = ("debug", "info", "warning", "error")

# setting in rethaw.toml -> environment variable that goes over it
SETTINGS: dict[str, str] = {
    "data_dir": "RETHAW_DATA_DIR",
    "listen": "RETHAW_LISTEN",
    "public_url": "RETHAW_PUBLIC_URL",
    "database_url": "DATABASE_URL",
    "log_level": "RETHAW_LOG_LEVEL",
    "engine": "RETHAW_ENGINE",
}
ENGINES = ("gvisor", "qemu")


@dataclass(frozen=True)
class Config:
    """Checked settings. `port` 0: any free one. `public_url` is what callback addresses begin with, no trailing slash,
    None when that is the listen address. `database_url` None: the embedded PostgreSQL. `source` is the file they came
    from, None when there was none."""

    data_dir: Path
    host: str
    port: int
    public_url: str | None
    database_url: str | None
    log_level: int
    providers: Providers
    engine: str = ENGINES[0]  # of agents that do not say which
    source: Path | None = None
    snapshots: SnapshotSettings = field(default_factory=SnapshotSettings)
    prices: Prices = field(default_factory=Prices)
    egress: EgressSettings = field(default_factory=EgressSettings)

    def url_at(self, port: int) -> str:
        """Where a client on this machine reaches a server that listens on `port`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def load(
    path: Path | str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Config:
    """Read and check. `overrides` (setting -> text, from command-line options) go over everything.

    Raises NotFound when a file that was asked for is not there, InvalidInput naming file, key, value and remedy.
    """
    env = os.environ if env is None else env
    source = _find(path, env)
    table = _read(source) if source else {}
    where = str(source) if source else "rethaw.toml"
    known = {*SETTINGS, "providers", "snapshots", "prices", "egress", "image"}  # the last: see `cli.imagefile`
    for key in table:
        if key not in known:
            raise InvalidInput(f"{where}: {key!r} is not a setting", remedy=f"known: {', '.join(sorted(known))}")

    def value(key: str, default: str | None) -> tuple[str | None, str]:
        """The text of a setting and where it stands, for messages."""
        if overrides and key in overrides:
            return overrides[key], f"--{key.replace('_', '-')}"
        if env.get(SETTINGS[key]):
            return env[SETTINGS[key]], f"{SETTINGS[key]} (environment)"
        if key in table:
            text = table[key]
            if not isinstance(text, str):
                raise InvalidInput(f"{where}: {key} = {text!r} is not text", remedy="write it in quotes")
            return text or default, f"{where}: {key}"
        return default, key

    data_dir = _data_dir(*value("data_dir", str(DEFAULT_DATA_DIR)))
    host, port = _listen(*value("listen", DEFAULT_LISTEN))
    return Config(
        data_dir=data_dir,
        host=host,
        port=port,
        public_url=_public_url(*value("public_url", None)),
        database_url=_database_url(*value("database_url", None)),
        log_level=_log_level(*value("log_level", "info")),
        engine=_engine(*value("engine", ENGINES[0])),
        providers=_providers(table.get("providers", {}), where, env),
        source=source,
        snapshots=snapshot_settings(table.get("snapshots", {}), where, env),
        prices=prices_from(table.get("prices", {}), where),
        egress=egress_settings(table.get("egress", {}), where, env),
    )


def _find(path: Path | str | None, env: Mapping[str, str]) -> Path | None:
    asked, by = (path, "--config") if path else (env.get("RETHAW_CONFIG"), "RETHAW_CONFIG")
    if asked:
        found = Path(asked).expanduser()
        if not found.is_file():
            raise NotFound(f"{by} names {asked}, which is no file", remedy="correct the path or leave it out")
        return found.absolute()
    here = Path("rethaw.toml")
    return here.absolute() if here.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InvalidInput(f"{path} is not TOML: {e}", remedy="correct that line") from e
    except OSError as e:
        raise InvalidInput(f"{path} cannot be read: {e.strerror}", remedy="check its permissions") from e


def _data_dir(text: str | None, where: str) -> Path:
    path = Path(text or "").expanduser()
    if not path.is_absolute() or path == Path("/") or "\0" in str(path):
        raise InvalidInput(f"{where} = {text!r} is not a directory of its own", remedy="write an absolute path")
    try:
        is_other = path.exists() and not path.is_dir()
    except OSError as e:
        remedy = "run it as root (sudo), or check the permissions of the directories above"
        raise InvalidInput(f"{where} = {text!r} cannot be looked at: {e.strerror}", remedy=remedy) from e
    if is_other:
        raise InvalidInput(f"{where} = {text!r} is not a directory", remedy="name another path")
    return path


def _listen(text: str | None, where: str) -> tuple[str, int]:
    host, colon, port = (text or "").rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    valid_host = bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", bare))
    if not valid_host:
        try:
            valid_host = bool(ipaddress.ip_address(bare))
        except ValueError:
            valid_host = False
    if not (colon and valid_host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise InvalidInput(f"{where} = {text!r} is not HOST:PORT", remedy=f'write it like "{DEFAULT_LISTEN}"')
    return bare, int(port)


def _public_url(text: str | None, where: str) -> str | None:
    if text is not None and not re.fullmatch(r"https?://[^\s/?#@\\]+(/[^\s?#\\]*)?", text):
        raise InvalidInput(
            f"{where} = {text!r} is not a base URL", remedy='write it like "https://agents.example.com", without query'
        )
    return text.rstrip("/") if text else None


def _database_url(text: str | None, where: str) -> str | None:
    if text is not None and not re.match(r"postgres(ql)?://\S+$", text):
        # The value may hold a password, so it is not repeated.
        raise InvalidInput(
            f"{where} is not a PostgreSQL URL", remedy='write it like "postgresql://user:password@host:5432/database"'
        )
    return text


def _engine(text: str | None, where: str) -> str:
    if text not in ENGINES:
        raise InvalidInput(f"{where} = {text!r} is not an engine", remedy=f"use one of {', '.join(ENGINES)}")
    return text


def _log_level(text: str | None, where: str) -> int:
    name = (text or "").lower()
    if name not in LOG_LEVELS:
        raise InvalidInput(f"{where} = {text!r} is not a log level", remedy=f"use one of {', '.join(LOG_LEVELS)}")
    return cast("int", getattr(logging, name.upper()))


def _providers(table: object, where: str, env: Mapping[str, str]) -> Providers:
    if not isinstance(table, Mapping):
        raise InvalidInput(f"{where}: providers is not a table", remedy="write [providers.NAME] and base_url below it")
    try:
        return Providers.from_config(cast("Mapping[str, Any]", table), env)
    except InvalidInput as e:
        raise InvalidInput(f"{where}: {e.message}", remedy=e.remedy, **e.details) from e
