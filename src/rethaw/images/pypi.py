"""Python packages, installed in a build sandbox from where pip on this machine gets them: by the interpreter that they are
for, with its own pip or with a copy of this machine's that is there for the build only."""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rethaw.images import installing
from rethaw.images.driver import SHARE
from rethaw.model.errors import ImageError

_ASK_S = 60.0
_KEPT = (
    "index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "pre", "prefer-binary", "only-binary",
    "no-binary", "timeout", "default-timeout", "retries",
)  # fmt: skip
_WHEELS = ("/usr/share/python-wheels",)  # Debian's, for its ensurepip
# A copy of the node's pip may be too old for the interpreter (or too new): Debian's python3 fetches another one with it.
# One that is too old may say its version and fail at the first look at what is installed, which is what `list` is for.
_COMMAND = """
python=$(command -v {python}) || {{ echo "the image has no {python} to install packages with"; exit 127; }}
: >/tmp/begun
export TMPDIR={share}/tmp
if {own} && "$python" -m pip --version >/dev/null 2>&1; then
    set -- "$python" -m pip
else
    set -- "$python" -I {share}/installing.py pip {share}/pip
    if {own} && ! "$@" list >/dev/null 2>&1; then
        /usr/bin/python3 -I {share}/installing.py pip {share}/pip install {options} --target={share}/fitting \\
            --python-version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" --only-binary=:all: pip
        set -- "$python" -I {share}/installing.py pip {share}/fitting
    fi
fi
"$@" install {options} {files}
"$python" -I {share}/installing.py compile /tmp/begun
"""
# What pip is told, and where it looks when it is told nothing.
_ASK = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
try:
    from pip._internal.models.index import PyPI
    print("default", PyPI.simple_url, "https://" + PyPI.file_storage_domain, flush=True)
except (ImportError, AttributeError):
    pass
sys.argv[:] = ["pip", "config", "list"]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_OPTIONS = "--no-input --no-cache-dir --no-compile --disable-pip-version-check --progress-bar=off"


@dataclass(frozen=True)
class Wanted:
    """Requirements of a step. `before`: of the steps below it, which they have to fit together with."""

    words: tuple[str, ...]
    before: tuple[str, ...] = ()

    def files(self) -> dict[str, str]:
        """For the build sandbox's own directory. With hashes pip wants them of all: those from before are installed, and
        only limit then what else is."""
        hashed = any(" --hash=" in word for word in self.words)
        plain = [word.partition(" --hash=")[0] for word in self.before]
        limits = [re.sub(r"\[[^\]]*\]", "", word, count=1) for word in plain] if hashed else []
        listed = [*self.words, *([] if hashed else plain)]
        return {"requirements.txt": "\n".join(listed) + "\n", "constraints.txt": "\n".join(limits) + "\n"}


def command(python: str, own: bool) -> str:
    """The shell command that installs `Wanted.files()` for the interpreter `python`. `own`: by its own pip if it has one."""
    files = f"-r {SHARE}/requirements.txt -c {SHARE}/constraints.txt"
    return _COMMAND.format(
        python=shlex.quote(python), own="true" if own else "false", share=SHARE, options=_OPTIONS, files=files
    )


def tool() -> dict[str, Path]:
    """Trees for the build sandbox's own directory: a pip. Raises ImageError when this machine has none. Blocking."""
    found = importlib.util.find_spec("pip")
    if found is not None and found.submodule_search_locations:
        return {"pip/pip": Path(found.submodule_search_locations[0])}
    bundled = importlib.util.find_spec("ensurepip")
    places = [Path(place) / "_bundled" for place in (bundled and bundled.submodule_search_locations) or ()]
    places += [Path(place) for place in (sysconfig.get_config_var("WHEEL_PKG_DIR"), *_WHEELS) if place]
    for place in places:
        for wheel in sorted(place.glob("pip-*.whl"), reverse=True):
            return {"pip": wheel}
    raise ImageError("this machine has no pip to install Python packages with", remedy=f"{sys.executable} -m ensurepip")


@dataclass(frozen=True)
class Settings:
    """`values`: pip's options by name; `ca`: certificates that an index may need; `hosts`: of the indexes; `logins`: lines of
    a netrc for those."""

    values: tuple[tuple[str, str], ...] = ()
    ca: str = ""
    hosts: tuple[str, ...] = ()
    logins: str = ""

    def files(self) -> dict[str, str]:
        """For the build sandbox's own directory, which is not of the image."""
        lines = [f"{name} = {value}\n" for name, value in self.values]
        found = {"pip.conf": "[global]\n" + "".join(lines), "pip-ca.pem": self.ca, "netrc": self.logins}
        return {**found, "installing.py": Path(installing.__file__).read_text()}

    def env(self) -> dict[str, str]:
        own = {
            "PIP_CONFIG_FILE": f"{SHARE}/pip.conf",
            "NETRC": f"{SHARE}/netrc",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_BREAK_SYSTEM_PACKAGES": "1",  # an image is nobody's system
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if self.ca:
            own |= {"PIP_CERT": f"{SHARE}/pip-ca.pem", "REQUESTS_CA_BUNDLE": f"{SHARE}/pip-ca.pem"}
        return own


def find() -> Settings:
    """pip's configuration on this machine. Blocking."""
    (name, place), *_ = tool().items()
    argv = [sys.executable, "-c", _ASK, str(place.parent if name == "pip/pip" else place)]
    try:
        text = subprocess.run(argv, capture_output=True, text=True, timeout=_ASK_S, check=False, cwd="/").stdout
    except (OSError, subprocess.SubprocessError):
        text = ""
    return parse(text, os.environ)


def parse(listed: str, environ: Mapping[str, str]) -> Settings:
    """`find` on what `pip config list` printed, with pip's own indexes. Reads the files of certificates and logins that it
    names."""
    values: dict[str, str] = {}
    for section, name, value in re.findall(r"^([\w-]+|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        if section in ("global", "install", ":env:"):
            values[name.lower().replace("_", "-")] = value.replace("\\n", " ").strip()
    for name, value in environ.items():
        if name.startswith("PIP_"):
            values[name[4:].lower().replace("_", "-")] = value
    # Directories of this machine are not there.
    links = [uri for uri in values.get("find-links", "").split() if uri.startswith(("http://", "https://"))]
    values["find-links"] = " ".join(links)
    kept = tuple((name, values[name]) for name in _KEPT if values.get(name))
    ca = ""
    try:
        ca = Path(values["cert"]).read_text()
    except (KeyError, OSError, UnicodeDecodeError):
        ca = ""
    uris = [uri for name in ("index-url", "extra-index-url") for uri in values.get(name, "").split()]
    if not values.get("index-url"):
        uris += [uri for pair in re.findall(r"^default (\S+) (\S+)$", listed, re.MULTILINE) for uri in pair]
    hosts = tuple(sorted({urlsplit(uri).hostname or "" for uri in (*uris, *links)} - {""}))
    return Settings(kept, ca, hosts, _logins(hosts, environ))


def _logins(hosts: Iterable[str], environ: Mapping[str, str]) -> str:
    """What this user's netrc says of these hosts, and of no other."""
    out = ""
    with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError, UnicodeDecodeError):
        known = netrc.netrc(environ.get("NETRC") or str(Path.home() / ".netrc")).hosts
        for host in hosts:
            if host in known:
                login, _, password = known[host]
                out += f"machine {host} login {login} password {password}\n"
    return out
