"""Where npm packages come from: wherever npm on this machine gets them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rethaw.images.driver import SHARE

_KEPT = re.compile(r"registry|@[^:\s]+:registry|strict-ssl")
_SECRET = re.compile(r"//\S+:(?:_authToken|_auth|username|_password|email|always-auth)")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_ASK_S = 60.0
# Scripts of packages run once the tokens are gone. npm's cache is not part of the image.
_COMMAND = """
if ! command -v npm >/dev/null; then
    command -v apt-get >/dev/null || {{ echo "the image has neither npm nor apt-get to install it with"; exit 127; }}
    apt-get update -q
    apt-get install -q -y --no-install-recommends -o Acquire::Retries=3 nodejs npm
    apt-get clean
    rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
fi
npm install --global --ignore-scripts {packages}
rm -f {share}/npmrc
export npm_config_userconfig={share}/npmrc-plain
npm rebuild --global
"""


@dataclass(frozen=True)
class Settings:
    """`plain`: lines of npmrc without secrets; `secret`: those with; `ca`: certificates that the registry may need;
    `hosts`: of the registries."""

    plain: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()
    ca: str = ""
    hosts: tuple[str, ...] = ()

    def files(self) -> dict[str, str]:
        """For the build sandbox's own directory, which is not of the image."""
        plain = "".join(f"{line}\n" for line in self.plain)
        secret = "".join(f"{line}\n" for line in self.secret)
        return {"npmrc": plain + secret, "npmrc-plain": plain, "npm-ca.pem": self.ca}

    def env(self) -> dict[str, str]:
        own = {
            "npm_config_userconfig": f"{SHARE}/npmrc",
            "npm_config_cache": "/tmp/npm",
            "npm_config_audit": "false",
            "npm_config_fund": "false",
            "npm_config_update_notifier": "false",
            "npm_config_progress": "false",
        }
        if self.ca:
            own |= {"npm_config_cafile": f"{SHARE}/npm-ca.pem", "NODE_EXTRA_CA_CERTS": f"{SHARE}/npm-ca.pem"}
        return own


def command(packages: Iterable[str]) -> str:
    """The shell command that installs `packages` for everybody, with node and npm where they are missing."""
    return _COMMAND.format(packages=" ".join(map(shlex.quote, packages)), share=SHARE)


def find() -> Settings:
    """npm's configuration on this machine: its files and environment. Blocking."""
    found = _asked()
    texts = [f"registry={found['registry']}"] if found.get("registry") else []
    # The global file, then the user's, which wins.
    for name in (found.get("globalconfig") or "/etc/npmrc", found.get("userconfig") or Path.home() / ".npmrc"):
        try:
            texts.append(Path(str(name)).read_text())
        except (OSError, UnicodeDecodeError):
            continue
    return parse(texts, os.environ)


def _asked() -> dict[str, Any]:
    """What npm itself says; nothing where it is not installed."""
    found: dict[str, Any] = {}
    if shutil.which("npm") is not None:
        argv = ["npm", "config", "list", "--long", "--json"]
        try:
            said = subprocess.run(argv, capture_output=True, text=True, timeout=_ASK_S, check=False, cwd="/")
            found = json.loads(said.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            pass
    return found


def parse(texts: Iterable[str], environ: Mapping[str, str]) -> Settings:
    """`find` on the contents of npm's files, the weakest first. Reads the files of certificates that these name."""
    values: dict[str, str] = {}
    for text in texts:
        for line in text.splitlines():
            key, equals, value = (part.strip() for part in line.partition("="))
            if equals and not key.startswith(("#", ";", "[")):
                values[key] = _VARIABLE.sub(lambda m: environ.get(m[1], m[0]), value.strip("\"'"))
    for name, value in environ.items():
        if name.lower().startswith("npm_config_"):
            values[name[len("npm_config_") :].lower().replace("_", "-")] = value
    plain = {key: value for key, value in values.items() if _KEPT.fullmatch(key)}
    secret = {key: value for key, value in values.items() if _SECRET.fullmatch(key)}
    ca = ""
    for path in dict.fromkeys(filter(None, (values.get("cafile"), environ.get("NODE_EXTRA_CA_CERTS")))):
        try:
            ca += Path(path).read_text() + "\n"
        except (OSError, UnicodeDecodeError):
            continue
    registries = [value for key, value in plain.items() if key.endswith("registry")]
    hosts = sorted({urlsplit(uri).hostname or "" for uri in registries} - {""})
    return Settings(
        tuple(f"{key}={value}" for key, value in plain.items()),
        tuple(f"{key}={value}" for key, value in secret.items()),
        ca,
        tuple(hosts),
    )
