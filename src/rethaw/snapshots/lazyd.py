"""A file system (FUSE) whose files are sections as an engine maps them, read out of packs when a page is first touched.

    python -m rethaw.snapshots.lazyd MOUNTPOINT

The node starts it, as root, and talks to it in lines of JSON over stdin and stdout, see `lazy`:

    {"op": "init", "store": DIRECTORY, "active": key id or null, "keys": [hex, ...]}        first of all, no answer
    {"op": "open", "name", "snapshot", "manifest", "digest": hex or null, "section", "size", "table"}
    {"op": "inode", "name", "number"}      by which the kernel knows the file
    {"op": "close", "name"}       allows `unlink` of the file, which the node does next
    {"op": "touched", "name"}     pages that were read, in order of first read: {"ranges": [[first, count], ...]}
    {"op": "stats"}               bytes that the kernel asked for, that were decompressed, that were read from packs
    {"op": "ping"}

Each gets one answer, {"ok": true, ...} or {"ok": false, "why", "file"}. Lines of their own accord: {"event": "ready"}
once it is mounted, {"event": "failed", "why", "remedy"} if it cannot be, {"event": "damaged", "name", "why"}.

`table`: a file of little-endian i32, for each page of the file the page of the section, or -1 for zeros.

Files never change, so the kernel keeps what it read for all who map them. Who opens one for writing, as QEMU does, can
map it only privately: no process changes what another one sees. A page of a damaged pack is an I/O error (a SIGBUS where
it is mapped), never zeros. When stdin ends, the node is gone: the mount is detached and the process ends.

The kernel is told to read nothing around a page that is touched, since it does not know where frames begin. A page alone
that it asks for is one that a reader waits for: before it gets that, it is given the pages that lie around it in the frame
(FUSE_NOTIFY_STORE). To store a page waits for whoever is reading it right now. So only some of the threads may do that at
once, each for other pages, and the others go on answering reads.

It must never touch its own files: killed in the middle of that, it would wait for itself and stay for good (which a store may do as well; aborting the connection ends that, see
`detach`). And it must
never answer a read with less than there is: the kernel would take that for the end of the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import itertools
import json
import os
import re
import resource
import stat
import struct
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Protocol

from rethaw.model.errors import RethawError
from rethaw.snapshots.decode import PackDamaged
from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.lazypages import Content, Opener
from rethaw.snapshots.pack import Damaged
from rethaw.snapshots.pages import PAGE

PACKAGE, NEWER = "libfuse3-3", " (libfuse3-4 from Debian 13 on)"
_THREADS = 10
_BACKGROUND = 128  # reads ahead that the kernel may have under way
_FOREVER_S = 1e6  # names and sizes do not change
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_MNT_FORCE, _MNT_DETACH, _NOFOLLOW = 1, 2, 8
_STORING = _THREADS // 2  # threads that may store pages at once
_STORE = 4  # FUSE_NOTIFY_STORE
_HEAD, _STORED = struct.Struct("<IiQ"), struct.Struct("<QQII")
_libc = ctypes.CDLL(None, use_errno=True)


def detach(below: Path) -> None:
    """Unmount what is mounted at or below `below`, whoever still uses it, dead or not. What a process waits for there ends
    with an error, also if the server itself waits. Raises OSError."""
    found: list[str] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4])
        if point == str(below) or point.startswith(f"{below}/"):
            found.append(point)
    for point in reversed(found):
        if _libc.umount2(os.fsencode(point), _MNT_FORCE | _MNT_DETACH | _NOFOLLOW) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EINVAL, errno.ENOENT):  # somebody else was quicker
                raise OSError(number, os.strerror(number), point)


# ---------------------------------------------------------------- the file system


class _Handle(Protocol):
    """What libfuse keeps for an open file."""

    fh: int
    flags: int
    keep_cache: int
    direct_io: int
    noflush: int


_thread = threading.local()


def _keep_thread() -> None:
    """Python would forget a thread of libfuse after each call, and with it the decompressor that it made. What is kept
    is as small as the number of threads, which do not end."""
    if not hasattr(_thread, "kept"):
        _thread.kept = ctypes.pythonapi.PyGILState_Ensure()


class _Store:
    """Gives the kernel pages that it did not ask for."""

    def __init__(self) -> None:
        self._device: int | None = None
        self._free = threading.Semaphore(_STORING)
        self._lock = threading.Lock()
        self._busy: set[tuple[int, int]] = set()  # files and first pages that are being stored

    def around(self, content: Content, offset: int) -> None:
        """Pages around the one at `offset`, which is about to be answered."""
        first, after = content.around(offset)
        page, key = offset // PAGE, (content.inode, first)
        if content.inode and after - first > 1 and self._free.acquire(blocking=False):
            try:
                with self._lock:
                    if key in self._busy:
                        return
                    self._busy.add(key)
                try:
                    for begin, end in ((page + 1, after), (first, page)):
                        if end > begin:
                            self._write(content, begin * PAGE, content.read(begin * PAGE, (end - begin) * PAGE))
                finally:
                    with self._lock:
                        self._busy.discard(key)
            except (Damaged, PackDamaged, RethawError, OSError):
                return  # whoever needs one of them asks for it
            finally:
                self._free.release()

    def _write(self, content: Content, offset: int, data: bytes) -> None:
        if self._device is None:
            self._device = _fuse_device()
        body = _STORED.pack(content.inode, offset, len(data), 0)
        os.writev(self._device, [_HEAD.pack(_HEAD.size + len(body) + len(data), _STORE, 0), body, data])


def _fuse_device() -> int:
    """libfuse's descriptor. Raises OSError."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":  # noqa: PTH115
                return int(name)
    raise OSError(errno.ENODEV, "no connection to the kernel")


class Files:
    """What libfuse calls, from several threads, by the names it knows. OSError becomes the answer."""

    use_ns = True

    def __init__(self, tell: Any) -> None:
        self._tell = tell
        self._names: dict[str, Content] = {}
        self._closing: set[str] = set()
        self._handles: dict[int, tuple[str, Content]] = {}
        self._numbers = itertools.count(1)
        self._told: set[tuple[str, str]] = set()
        self._store = _Store()
        self.asked_bytes = 0

    def add(self, name: str, content: Content) -> None:
        self._names[name] = content

    def get(self, name: str) -> Content:
        return self._names[name]

    def close(self, name: str) -> None:
        """It may go now. Those who have it open or mapped keep it."""
        self._closing.add(name)

    def init_with_config(self, connection: Any, config: Any) -> None:
        connection.max_background, connection.congestion_threshold = _BACKGROUND, _BACKGROUND * 3 // 4
        config.kernel_cache = config.hard_remove = config.nullpath_ok = 1
        config.entry_timeout = config.attr_timeout = _FOREVER_S
        config.negative_timeout = 0.0
        self._tell(event="ready")

    def _found(self, path: str) -> Content:
        found = self._names.get(path[1:])
        if found is None:
            raise OSError(errno.ENOENT, "no such file")
        return found

    def getattr(self, path: str | None, handle: _Handle | None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o500, "st_nlink": 2}
        content = self._found(path) if path else self._handles[handle.fh][1] if handle else None
        if content is None:
            raise OSError(errno.ENOENT, "no such file")
        # Of nobody's interest but those who were given a descriptor: the directory is closed. QEMU opens for writing.
        return {"st_mode": stat.S_IFREG | 0o666, "st_nlink": 1, "st_size": content.size}

    def readdir(self, path: str, handle: int) -> list[str]:
        return [".", "..", *self._names]

    def open(self, path: str, handle: _Handle) -> int:
        content = self._found(path)
        if handle.flags & os.O_TRUNC:  # the kernel would believe it
            raise OSError(errno.EROFS, "files do not change")
        handle.fh = next(self._numbers)
        handle.keep_cache = handle.noflush = 1  # not flushed, a descriptor can be closed when we are dead
        if handle.flags & os.O_ACCMODE != os.O_RDONLY:
            handle.direct_io = 1  # the kernel refuses to map it shared, and nothing here takes a write
        self._handles[handle.fh] = (path[1:], content)
        return 0

    def read(self, path: str | None, size: int, offset: int, handle: _Handle) -> bytes:
        _keep_thread()
        name, content = self._handles[handle.fh]
        self.asked_bytes += size
        try:
            data = content.read(offset, size)
            if size == PAGE:
                self._store.around(content, offset)
            return data
        except (Damaged, PackDamaged, RethawError, OSError) as error:
            if (name, str(error)) not in self._told:
                self._told.add((name, str(error)))
                self._tell(event="damaged", name=name, why=str(error))
            raise OSError(errno.EIO, "damaged") from error

    def release(self, path: str | None, handle: _Handle) -> int:
        self._handles.pop(handle.fh, None)
        return 0

    def unlink(self, path: str) -> int:
        name = path[1:]
        if name not in self._closing:
            raise OSError(errno.EROFS, "files do not change")
        self._closing.discard(name)
        self._names.pop(name, None)
        self._told = {one for one in self._told if one[0] != name}
        return 0


# ---------------------------------------------------------------- the process


class Server:
    def __init__(self, mount: Path) -> None:
        self._mount = mount
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)  # whatever a library prints is no answer
        self._lock = threading.Lock()
        self._opener: Opener | None = None
        self.files = Files(self.tell)

    def tell(self, **message: Any) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock, contextlib.suppress(OSError):
            while data:
                data = data[self._out.write(data) or 0 :]

    def control(self) -> None:
        """Until stdin ends, and with it the process."""
        try:
            for line in sys.stdin.buffer:
                self._one(json.loads(line))
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                detach(self._mount)
                self._mount.rmdir()
            os._exit(0)

    def _one(self, message: dict[str, Any]) -> None:
        if message["op"] == "init":
            given = {number: bytes.fromhex(key) for number, key in message["keys"].items()}
            active = given.pop(message["active"], None)
            self._opener = Opener(Path(message["store"]), Keyring(active, list(given.values())))
            return
        try:
            self.tell(ok=True, **self._answer(message))
        except (Damaged, PackDamaged, RethawError, OSError, ValueError, KeyError) as error:
            of_pack = isinstance(error, PackDamaged)
            file = f"{error.pack}.pack" if of_pack else Path(message.get("manifest", "")).name
            self.tell(ok=False, why=str(error), file=file, code=getattr(error, "code", None))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._opener is not None
        op, name = message["op"], message.get("name", "")
        if op == "open":
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a file")
            manifest_path, table = Path(message["manifest"]), Path(message["table"])
            self.files.add(
                name,
                self._opener.open(
                    message["snapshot"], manifest_path, message["digest"], message["section"], message["size"], table
                ),
            )
            return {"path": str(self._mount / name)}
        if op == "inode":
            self.files.get(name).inode = message["number"]
            return {}
        if op == "touched":
            return {"ranges": self.files.get(name).touched()}
        if op == "close":
            self.files.close(name)
        elif op == "stats":
            frames = self._opener.frames
            return {"asked": self.files.asked_bytes, "raw": frames.raw_bytes, "stored": frames.stored_bytes}
        elif op != "ping":
            raise ValueError(f"{op!r} is no operation")
        return {}


def library() -> Any:
    """libfuse 3, also where 2 is installed beside it, which would be taken first. Raises ImportError, OSError."""
    os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
    found = importlib.import_module("mfusepy")  # it has no types
    if found.fuse_version_major != 3:
        raise OSError(f"libfuse {found.fuse_version_major} was found, 3 is needed")
    return found


def main() -> None:
    server = Server(Path(sys.argv[1]))
    try:
        fuse = library()
    except (ImportError, OSError) as error:
        server.tell(
            event="failed", why=f"libfuse 3 cannot be used: {error}", remedy=f"apt-get install {PACKAGE}{NEWER}"
        )
        sys.exit(1)
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        server.tell(
            event="failed", why=f"/dev/fuse cannot be opened: {error.strerror}",
            remedy="load the kernel module fuse, or give this container /dev/fuse",
        )  # fmt: skip
        sys.exit(1)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    threading.Thread(target=server.control, daemon=True).start()
    try:
        fuse.FUSE(
            server.files, sys.argv[1], raw_fi=True, foreground=True, fsname="rethaw", subtype="lazy", allow_other=True,
            default_permissions=True, nosuid=True, nodev=True, noexec=True, max_idle_threads=_THREADS,
            **({"max_threads": _THREADS} if fuse.fuse_version_minor >= 12 else {}),
        )  # fmt: skip
    except RuntimeError as error:
        server.tell(
            event="failed", why=f"the file system cannot be mounted (libfuse says {error})",
            remedy="run as root, with CAP_SYS_ADMIN",
        )  # fmt: skip
        sys.exit(1)
    os._exit(0)  # somebody unmounted it; a thread still waits for stdin, which Python would wait for


if __name__ == "__main__":
    main()
