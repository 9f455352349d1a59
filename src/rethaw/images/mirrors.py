"""Where Debian packages come from: wherever this machine itself gets them."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rethaw.model.errors import ImageError

_KEYRINGS = (Path("/usr/share/keyrings/debian-archive-keyring.gpg"),)


@dataclass(frozen=True)
class Mirrors:
    """`sources`: lines of sources.list; `options`: apt options to pass on (proxies)."""

    sources: tuple[str, ...]
    options: tuple[str, ...]


def architecture() -> str:
    """Debian's name of this machine's architecture."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def _ask(*argv: str) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout


def find(suite: str) -> Mirrors:
    """Sources for `suite` with its updates and security, from this machine's apt configuration. Blocking."""
    listing = _ask("apt-get", "indextargets", "--format", "$(CREATED_BY)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)")
    return parse(suite, listing, _ask("apt-config", "dump"))


def parse(suite: str, targets: str, config: str) -> Mirrors:
    """`find` on the texts that apt printed. Raises ImageError when apt here knows no mirror of `suite`."""
    keyring = next((str(path) for path in _KEYRINGS if path.exists()), "")
    signed = f"[signed-by={keyring}] " if keyring else ""
    found: dict[str, str] = {}
    for line in targets.splitlines():
        kind, _, rest = line.partition("|")
        uri, _, rest = rest.partition("|")
        release, _, component = rest.partition("|")
        if kind == "Packages" and component == "main" and uri.startswith(("http://", "https://", "file:/", "mirror+")):
            found.setdefault(release, uri.rstrip("/"))
    if suite not in found:
        raise ImageError(
            f"apt on this machine knows no mirror of Debian {suite}",
            remedy=f"add one for {suite} main to /etc/apt/sources.list and run apt-get update",
        )
    releases = (suite, f"{suite}-updates", f"{suite}-security")
    sources = tuple(f"deb {signed}{found[release]} {release} main" for release in releases if release in found)
    options = re.findall(r'^(Acquire::(?:http|https|ftp)::Proxy(?:::\S+)? ".+");$', config, re.MULTILINE)
    return Mirrors(sources, tuple(options))
