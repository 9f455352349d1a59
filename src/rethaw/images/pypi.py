"""Python packages installed by an image's own pip, in a build sandbox, from where pip on this machine gets them."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rethaw.images.driver import SHARE

_ASK_S = 60.0
_KEPT = ("index-url", "extra-index-url", "trusted-host")
_COMMAND = """
python3 -m pip --version >/dev/null 2>&1 || {{ echo "the image has no python3 with pip to install packages with"; exit 127; }}
python3 -m pip install --no-input --no-cache-dir --disable-pip-version-check --progress-bar=off {packages}
"""


@dataclass(frozen=True)
class Settings:
    """`values`: pip's options by name; `ca`: certificates that an index may need; `hosts`: of the indexes."""

    values: tuple[tuple[str, str], ...] = ()
    ca: str = ""
    hosts: tuple[str, ...] = ()

    def files(self) -> dict[str, str]:
        """For the build sandbox's own directory, which is not of the image."""
        lines = [f"{name} = {value}\n" for name, value in self.values]
        return {"pip.conf": "[global]\n" + "".join(lines), "pip-ca.pem": self.ca}

    def env(self) -> dict[str, str]:
        own = {
            "PIP_CONFIG_FILE": f"{SHARE}/pip.conf",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_BREAK_SYSTEM_PACKAGES": "1",  # an image is nobody's system
        }
        if self.ca:
            own |= {"PIP_CERT": f"{SHARE}/pip-ca.pem", "REQUESTS_CA_BUNDLE": f"{SHARE}/pip-ca.pem"}
        return own


def command(requirements: Iterable[str]) -> str:
    return _COMMAND.format(packages=" ".join(shlex.quote(one) for one in requirements))


def find() -> Settings:
    """pip's configuration on this machine. Blocking."""
    text = ""
    if importlib.util.find_spec("pip") is not None:
        argv = [sys.executable, "-m", "pip", "config", "list"]
        try:
            text = subprocess.run(argv, capture_output=True, text=True, timeout=_ASK_S, check=False, cwd="/").stdout
        except (OSError, subprocess.SubprocessError):
            text = ""
    return parse(text, os.environ)


def parse(listed: str, environ: Mapping[str, str]) -> Settings:
    """`find` on what `pip config list` printed. Reads the file of certificates that it names."""
    values: dict[str, str] = {}
    for section, name, value in re.findall(r"^([\w-]+|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        if section in ("global", "install", ":env:"):
            values[name.lower().replace("_", "-")] = value.replace("\\n", " ").strip()
    for name, value in environ.items():
        if name.startswith("PIP_"):
            values[name[4:].lower().replace("_", "-")] = value
    kept = tuple((name, values[name]) for name in _KEPT if values.get(name))
    ca = ""
    try:
        ca = Path(values["cert"]).read_text()
    except (KeyError, OSError, UnicodeDecodeError):
        ca = ""
    uris = [uri for name in ("index-url", "extra-index-url") for uri in values.get(name, "").split()]
    hosts = {urlsplit(uri).hostname or "" for uri in uris} - {""}
    return Settings(kept, ca, tuple(sorted(hosts)))
