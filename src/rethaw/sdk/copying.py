"""Files into and out of a running session's sandbox, as a tar through a program of guestd's own Python.

Nothing of what comes out is trusted: `looking.unpack` writes it. Both directions stream; memory does not grow with size.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rethaw.model.dialing import PYTHON
from rethaw.model.errors import Conflict, InvalidInput, NotFound, RethawError, Unavailable, by_code
from rethaw.sdk import inside, looking

if TYPE_CHECKING:
    from rethaw.sdk.session import Session
    from rethaw.sdk.shell import Exec

Progress = Callable[[int], None]
_CHUNK = 1 << 17
_ERRORS = 1 << 16

# In the sandbox: standard library only, Python >= 3.9. Paths come in hex.
_COMMON = """
import json, os, stat, sys, tarfile
os.umask(0)
def fail(code, message):
    sys.stderr.write(json.dumps({"code": code, "message": message}) + "\\n")
    sys.stderr.flush()
    os._exit(3)
path = os.fsdecode(bytes.fromhex(sys.argv[1]))
"""
_READ = (
    _COMMON
    + """
inner = path.endswith("/.") or path == "."
whole = os.path.normpath(path)
if any((os.path.abspath(whole) + "/").startswith(top) for top in ("/proc/", "/sys/", "/dev/")):
    fail("invalid_input", "%r is the kernel's; read single files of it with rethaw exec" % path)
try:
    found = os.stat(path) if path.endswith("/") or inner else os.lstat(path)
except OSError as error:
    fail("not_found", "%r in the sandbox: %s" % (path, os.strerror(error.errno)))
if inner and not stat.S_ISDIR(found.st_mode):
    fail("invalid_input", "%r in the sandbox is no directory" % path)
base = os.path.basename(os.path.abspath(whole)) or "root"
out = tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 17)
def put(one, name):
    try:
        info = out.gettarinfo(one, arcname=name)
    except OSError as error:
        sys.stderr.write(json.dumps({"left": one, "why": os.strerror(error.errno)}) + "\\n")
        return
    if info is None:
        return
    info.name = name
    if info.islnk():
        info.type, info.linkname = tarfile.REGTYPE, ""
        info.size = os.lstat(one).st_size
    if info.isreg():
        try:
            with open(one, "rb") as file:
                out.addfile(info, Sized(file, info.size))
        except OSError as error:
            sys.stderr.write(json.dumps({"left": one, "why": os.strerror(error.errno)}) + "\\n")
    else:
        out.addfile(info)
    if info.isdir():
        try:
            children = sorted(os.listdir(one))
        except OSError as error:
            children = []
            sys.stderr.write(json.dumps({"left": one, "why": os.strerror(error.errno)}) + "\\n")
        for child in children:
            below = os.path.join(one, child)
            if os.path.abspath(below) not in ("/proc", "/sys", "/dev"):
                put(below, name + "/" + child)
class Sized:
    # A file that changes meanwhile still gives as many bytes as its header says.
    def __init__(self, file, left):
        self.file, self.left = file, left
    def read(self, size):
        data = self.file.read(min(size, self.left))
        data += b"\\0" * (min(size, self.left) - len(data))
        self.left -= len(data)
        return data
put(whole, base)
out.close()
"""
)
_WRITE = (
    _COMMON
    + """
as_name, must_dir = sys.argv[2] == "name", sys.argv[3] == "dir"
there = os.path.isdir(path)
if must_dir and not there:
    fail("not_found", "there is no directory %r in the sandbox" % path)
parent = os.path.dirname(os.path.abspath(path))
if not there and not os.path.isdir(parent):
    fail("not_found", "there is no directory %r in the sandbox" % parent)
modes = []
def place(name):
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if ".." in parts:
        fail("invalid_input", "the archive has %r, which would lie elsewhere" % name)
    if as_name and not there:
        parts = parts[1:]
    elif as_name and renamed:
        parts = parts[1:]
    return os.path.join(path, *parts) if parts else path
renamed = sys.argv[4] == "merge"
def gone(where):
    try:
        if not stat.S_ISDIR(os.lstat(where).st_mode):
            os.unlink(where)
    except FileNotFoundError:
        pass
try:
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|*") as tar:
        for member in tar:
            where = place(member.name)
            above = os.path.dirname(where)
            if not os.path.isdir(above):
                os.makedirs(above, 0o755)
            if member.isdir():
                if not os.path.isdir(where):
                    gone(where)
                    os.mkdir(where, 0o700)
                modes.append((where, member.mode & 0o7777, member.mtime))
            elif member.isreg():
                gone(where)
                source = tar.extractfile(member)
                fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(fd, "wb") as file:
                    while True:
                        data = source.read(1 << 17)
                        if not data:
                            break
                        file.write(data)
                    os.fchmod(file.fileno(), member.mode & 0o7777)
                os.utime(where, (member.mtime, member.mtime))
            elif member.issym():
                gone(where)
                os.symlink(member.linkname, where)
            elif member.islnk():
                gone(where)
                os.link(place(member.linkname), where)
            else:
                sys.stderr.write(json.dumps({"left": member.name, "why": "no file, directory or link"}) + "\\n")
    for where, mode, mtime in reversed(modes):
        os.chmod(where, mode)
        os.utime(where, (mtime, mtime))
except tarfile.TarError as error:
    fail("invalid_input", "what came is not a whole archive: %s" % error)
except OSError as error:
    fail("invalid_input", "%s in the sandbox: %s" % (error.filename or path, os.strerror(error.errno or 0)))
"""
)


def _start(session: Session[Any], source: str, *words: str) -> Exec:
    from rethaw.sdk.shell import Exec

    command = [PYTHON, "-I", "-S", "-X", "utf8", "-c", source, *words]
    return Exec(session.client.target, session.id, inside.exec_request(command, takes_input=True))


def _hex(path: str | bytes) -> str:
    raw = os.fsencode(path)
    if b"\0" in raw or not raw:
        raise InvalidInput(f"{path!r} is no path", remedy="no file has a NUL in its name")
    return raw.hex()


class _Reader:
    """What the program in the sandbox prints, as a file; what it complains of is kept."""

    def __init__(self, program: Exec, progress: Progress | None = None) -> None:
        self._program = program
        self._progress = progress
        self._buffer = b""
        self.errors = b""
        self.count = 0

    def chunks(self) -> Iterator[bytes]:
        while (got := self._program.read()) is not None:
            if got[0] == "stdout":
                self.count += len(got[1])
                if self._progress is not None:
                    self._progress(self.count)
                yield got[1]
            else:
                self.errors = (self.errors + got[1])[-_ERRORS:]
        self.check()

    def read(self, size: int) -> bytes:
        source = self._source = getattr(self, "_source", None) or self.chunks()
        while len(self._buffer) < size:
            data = next(source, None)
            if data is None:
                break
            self._buffer += data
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def drain(self) -> None:
        """To its end: whether it went well is told there."""
        while self.read(_CHUNK):
            pass

    def check(self) -> None:
        """Raises what the program said went wrong."""
        if self._program.why:
            raise Unavailable(f"the copy broke off: {self._program.why}", remedy="copy again", sent=True)
        if self._program.exit_code:
            raise _complaint(self.errors, self._program.exit_code)

    @property
    def left_out(self) -> list[str]:
        found: list[str] = []
        for said in _lines(self.errors):
            if "left" in said:
                found.append(f"{said['left']}: {said.get('why')}")
        return found


def _lines(errors: bytes) -> list[dict[str, Any]]:
    import json

    out: list[dict[str, Any]] = []
    for line in errors.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict):
            out.append(cast("dict[str, Any]", said))
    return out


def _complaint(errors: bytes, code: int) -> RethawError:
    for said in reversed(_lines(errors)):
        if said.get("code") in ("not_found", "invalid_input"):
            return cast("RethawError", by_code(str(said["code"]))(str(said.get("message"))[:1000]))
    tail = errors.decode(errors="replace").strip()[-300:]
    return Unavailable(f"copying ended with {code} in the sandbox: {tail or 'it said nothing'}")


def read_tar(session: Session[Any], path: str | bytes) -> Iterator[bytes]:
    """`path` as an uncompressed tar, chunk by chunk. Raises NotFound, InvalidInput."""
    with _start(session, _READ, _hex(path)) as program:
        yield from _Reader(program).chunks()


def copy_out(
    session: Session[Any], path: str | bytes, target: Path, *, progress: Progress | object | None = None
) -> list[str]:
    """Copy a file or directory of the sandbox to `target`: below it when that is a directory, under its own name. Links stay
    links and are not followed; nothing is written outside of `target`. Returns what was left out, with why.

    Raises NotFound, Conflict when a file of that name is there, InvalidInput for a hostile archive."""
    text = os.fsdecode(path)
    contents = text == "." or text.endswith("/.")
    told = cast("Progress | None", progress)
    if target.is_dir() and not contents:
        name = os.path.basename(os.path.normpath(text)) or "root"  # noqa: PTH119
        target = target / (name if name not in (".", "..") else "copy")
    elif not target.is_dir() and not target.parent.is_dir():
        raise NotFound(f"there is no directory {str(target.parent)!r}", remedy="make it first")
    with _start(session, _READ, _hex(path)) as program:
        reader = _Reader(program, told)
        file = io.BufferedReader(cast("Any", _Raw(reader)), _CHUNK)
        if target.is_dir() and contents:
            left = _merge(cast("IO[bytes]", file), target, reader)
        elif os.path.lexists(target) and target.is_file() and not target.is_symlink():
            left = _replace(cast("IO[bytes]", file), target, reader)
        else:
            left = _unpack(cast("IO[bytes]", file), target, reader)
        return left + reader.left_out


def _unpack(file: IO[bytes], target: Path, reader: _Reader) -> list[str]:
    """What the sandbox complains of says more than that its archive is cut off."""
    try:
        left = looking.unpack(file, target)
    except Unavailable:
        reader.drain()
        raise
    reader.drain()
    return left


def _replace(file: IO[bytes], target: Path, reader: _Reader) -> list[str]:
    """A file in the place of a file, once it is whole."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".rethaw-cp-") as directory:
        made = Path(directory) / "copy"
        left = _unpack(file, made, reader)
        if made.is_dir() and not made.is_symlink():
            raise Conflict(f"{str(target)!r} is a file, and a directory comes", remedy="name another destination")
        made.replace(target)
        return left


def _merge(file: IO[bytes], target: Path, reader: _Reader) -> list[str]:
    """What is in a directory into one that exists: each of them by itself, none in the place of another."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=target, prefix=".rethaw-cp-") as directory:
        made = Path(directory) / "copy"
        left = _unpack(file, made, reader)
        for one in sorted(made.iterdir()):
            if os.path.lexists(target / one.name):
                left.append(f"{one.name}: {str(target / one.name)!r} exists already")
            else:
                one.rename(target / one.name)
        return left


class _Raw(io.RawIOBase):
    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._reader.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Writer:
    """A file that goes to the program's input."""

    def __init__(self, program: Exec, progress: Progress | None) -> None:
        self._program = program
        self._progress = progress
        self._count = 0

    def write(self, data: bytes) -> int:
        if self._program.exit_code is not None:
            raise BrokenPipeError
        self._program.write(bytes(data))
        self._count += len(data)
        if self._progress is not None:
            self._progress(self._count)
        return len(data)


def _fed(
    session: Session[Any], words: list[str], feed: Callable[[_Writer], None], progress: Progress | None = None
) -> list[str]:
    with _start(session, _WRITE, *words) as program:
        reader = _Reader(program)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                feed(_Writer(program, progress))
            except BrokenPipeError:
                return  # what it complains of is told
            except BaseException as error:
                failed.append(error)
                program.close()
                return
            program.end_input()

        feeding = threading.Thread(target=run, daemon=True)
        feeding.start()
        try:
            reader.drain()
        except RethawError:
            if failed:
                raise failed[0] from None
            raise
        feeding.join()
        return reader.left_out


def write_tar(session: Session[Any], source: IO[bytes], path: str | bytes) -> None:
    """Unpack a tar (of any compression that tarfile knows) into the directory `path` of the sandbox."""

    def feed(out: _Writer) -> None:
        while data := source.read(_CHUNK):
            out.write(data)

    _fed(session, [_hex(path), "each", "dir", "keep"], feed)


def copy_in(
    session: Session[Any],
    source: Path,
    path: str | bytes,
    *,
    trailing: bool = False,
    progress: Progress | object | None = None,
) -> list[str]:
    """Copy a file or directory into the sandbox as `path`, or below it when that is a directory there. `trailing`: only what
    is in the directory `source`. Links stay links. Returns what was left out, with why.

    Raises NotFound, InvalidInput."""
    if not os.path.lexists(source):
        raise NotFound(f"there is no {str(source)!r}", remedy="name a file or directory of this machine")
    left: list[str] = []
    contents = trailing and source.is_dir()
    name = source.name if source.name not in ("", "..") else source.resolve().name or "root"

    def feed(out: _Writer) -> None:
        with tarfile.open(fileobj=cast("IO[bytes]", out), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as tar:
            _add(tar, source.resolve() if trailing else source, name, left)

    words = [_hex(path), "name", "dir" if os.fsdecode(path).endswith("/") else "any", "merge" if contents else "keep"]
    return _fed(session, words, feed, cast("Progress | None", progress)) + left


def _add(tar: tarfile.TarFile, one: Path, name: str, left: list[str]) -> None:
    try:
        info = tar.gettarinfo(str(one), arcname=name)
        if info is None or not (info.isreg() or info.isdir() or info.issym() or info.islnk()):  # pyright: ignore[reportUnnecessaryComparison]
            left.append(f"{one}: no file, directory or link")
            return
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        if info.islnk():
            info.type, info.linkname, info.size = tarfile.REGTYPE, "", one.lstat().st_size
        if info.isreg():
            with one.open("rb") as file:
                tar.addfile(info, file)
            return
        tar.addfile(info)
        if info.isdir():
            for child in sorted(one.iterdir()):
                _add(tar, child, f"{name}/{child.name}", left)
    except PermissionError as error:
        left.append(f"{one}: {error.strerror}")
