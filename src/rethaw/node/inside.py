"""Runs inside a throwaway restore, as `python3 -I -S -X utf8 -c SOURCE VERB [PATH]`: the image may hold an older Rethaw,
so this file is sent whole. Standard library only, Python >= 3.9. PATH is in hex: runsc spoils bytes that are no UTF-8.

VERB is one of
    freeze          stop every process but PID 1, this one and what runs it; prints how many stand still
    files, deep     one JSON line for PATH, or for each thing in it when it is a directory; `deep` goes down
    tree            the same for all there is, but for what is the kernel's or guestd's
    content         the bytes of a regular file
    archive         a tar of PATH
    pack            reads NUL-ended paths from stdin: those to be named in the first member (.rethaw-removed), an empty one,
                    those that a tar is made of, each by itself
    hashes          reads NUL-ended paths from stdin, prints the SHA-256 of each, or "-"

What is wrong with PATH goes to stderr as one JSON line {"code", "message"} before anything is printed; exit code 3.
"""

# Paths are bytes here, which pathlib does not take.
# ruff: noqa: PTH115, PTH116, PTH118, PTH119, PTH123, PTH208

from __future__ import annotations

import errno
import json
import os
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import tarfile

KERNEL = (b"/proc", b"/sys", b"/dev")
OURS = (b"/run/rethaw", b"/.rethaw")  # guestd's own files
CHUNK = 1 << 18
REMOVED = ".rethaw-removed"  # equal to rethaw.node.carry.REMOVED
KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def fail(code: str, message: str) -> None:
    sys.stderr.write(json.dumps({"code": code, "message": message}) + "\n")
    sys.stderr.flush()
    os._exit(3)


def shown(path: bytes) -> str:
    return os.fsdecode(path)


def named(path: bytes) -> str:
    """For a message: quoted, on one line, odd bytes by their number."""
    try:
        return repr(path.decode())
    except UnicodeDecodeError:
        return repr(path)[1:]


def wrong(error: OSError, path: bytes) -> None:
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
    why = "there is no" if error.errno == errno.ENOENT else (error.strerror or str(error)).lower() + ":"
    fail("not_found" if missing else "invalid_input", f"{why} {named(path)}")


def kind_of(found: os.stat_result) -> str:
    return KINDS.get(stat.S_IFMT(found.st_mode), "device")


# ---------------------------------------------------------------- standing still


def state_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "gone"


def parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def lineage(pid: int) -> set[int]:
    """`pid` and those that it descends from: what runs this program among them."""
    out: set[int] = set()
    while pid > 0 and pid not in out:
        out.add(pid)
        pid = parent_of(pid)
    return out


def freeze() -> None:
    """Parents come first, since pids mostly grow: a shell that saw its child stop might act on it. Again until a look
    finds nobody on the move, because a process may start others until it is stopped itself."""
    import contextlib
    import signal
    import time

    end = time.monotonic() + 5
    spared = {1} | lineage(os.getpid())
    kernel = 2 if parent_of(2) == 0 else -1  # the parent of the threads of a kernel's own, as in a microVM
    while True:
        found = sorted(int(n) for n in os.listdir("/proc") if n.isdigit() and int(n) not in spared)
        others = [pid for pid in found if pid != kernel and parent_of(pid) != kernel]
        moving = [pid for pid in others if state_of(pid) not in ("T", "t", "Z", "X", "gone")]
        if not moving:
            print(len([pid for pid in others if state_of(pid) in ("T", "t")]))
            return
        if time.monotonic() > end:
            fail("engine_failed", f"processes {moving} did not stop")
        for pid in moving:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(0.001)


# ---------------------------------------------------------------- files


def entry(path: bytes, found: os.stat_result, times: bool = False) -> str:
    kind = kind_of(found)
    values = {
        "path": shown(path),
        "kind": kind,
        "mode": stat.S_IMODE(found.st_mode),
        "size": found.st_size if kind == "file" else 0,
        "mtime_ns": found.st_mtime_ns,
        "uid": found.st_uid,
        "gid": found.st_gid,
    }
    if times:
        values["ctime_ns"] = found.st_ctime_ns
    if kind == "link":
        values["target"] = shown(os.readlink(path))
    return json.dumps(values)


def below(path: bytes, deep: bool, skip: tuple[bytes, ...], times: bool = False) -> None:
    with os.scandir(path) as listing:
        entries = sorted(listing, key=lambda e: e.name)
    for one in entries:
        if one.path in skip:
            continue
        try:
            found = one.stat(follow_symlinks=False)
            sys.stdout.write(entry(one.path, found, times) + "\n")
        except OSError:  # a process of /proc that ended meanwhile
            continue
        if deep and stat.S_ISDIR(found.st_mode):
            try:
                below(one.path, deep, skip, times)
            except OSError:
                continue


def files(path: bytes, deep: bool) -> None:
    try:
        found = os.stat(path) if path.endswith(b"/") else os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            sys.stdout.write(entry(path, found) + "\n")
        else:
            below(path, deep, KERNEL if deep and path == b"/" else ())
    except OSError as error:
        wrong(error, path)


def hashes() -> None:
    import hashlib

    for path in sys.stdin.buffer.read().split(b"\0")[:-1]:
        digest = "-"
        try:
            with open(path, "rb") as file:
                mark = hashlib.sha256()
                while data := file.read(CHUNK):
                    mark.update(data)
                digest = mark.hexdigest()
        except OSError:
            pass
        sys.stdout.write(digest + "\n")


def content(path: bytes) -> None:
    try:
        # A fifo would block and a device may have no end, so it is looked at before it is read.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        kind = kind_of(os.fstat(fd))
    except OSError as error:
        wrong(error, path)
        return
    if kind != "file":
        hint = "list it with `rethaw snapshot files`" if kind == "directory" else "only regular files can be read"
        fail("invalid_input", f"{named(path)} is a {kind}; {hint}")
    try:
        while data := os.read(fd, CHUNK):
            sys.stdout.buffer.write(data)
    except OSError as error:
        wrong(error, path)


def archive(path: bytes) -> None:
    import tarfile

    whole = os.path.normpath(path)
    if any(whole == top or whole.startswith(top + b"/") for top in KERNEL):
        fail("invalid_input", f"{named(path)} is the kernel's; read single files of it with `rethaw snapshot cat`")
    try:
        os.lstat(whole)
    except OSError as error:
        wrong(error, path)

    # Each hard link is a file of its own here: whoever takes a part of the tree has no use for the name of another part.
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as tar:

        def put(one: bytes, name: bytes) -> None:
            if add(tar, one, name) == "directory":
                for child in sorted(os.listdir(one)):
                    path = os.path.join(one, child)
                    if path not in KERNEL:
                        put(path, os.path.join(name, child))

        put(whole, os.path.basename(whole) or b"root")


def add(tar: tarfile.TarFile, one: bytes, name: bytes) -> str:
    """Put one thing into `tar` under `name`; its kind."""
    import tarfile

    found = os.lstat(one)
    info = tarfile.TarInfo(shown(name))
    info.mode, info.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
    info.uid, info.gid = found.st_uid, found.st_gid
    kind = kind_of(found)
    if kind == "file":
        with open(one, "rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            tar.addfile(info, file)
    elif kind == "link":
        info.type, info.linkname = tarfile.SYMTYPE, shown(os.readlink(one))
        tar.addfile(info)
    elif kind == "directory":
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    return kind


def pack() -> None:
    import contextlib
    import io
    import tarfile

    removed, _, wanted = (b"\0" + sys.stdin.buffer.read()).partition(b"\0\0")
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as tar:
        gone = removed[1:] + b"\0" if removed else b""
        info = tarfile.TarInfo(REMOVED)
        info.size = len(gone)
        tar.addfile(info, io.BytesIO(gone))
        for path in wanted.split(b"\0")[:-1]:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                add(tar, path, path.lstrip(b"/"))


def main() -> None:
    verb = sys.argv[1]
    path = bytes.fromhex(sys.argv[2]) if len(sys.argv) > 2 else b"/"
    if verb == "freeze":
        freeze()
    elif verb in ("files", "deep"):
        files(path, verb == "deep")
    elif verb == "tree":
        below(b"/", True, KERNEL + OURS, times=True)
    elif verb == "hashes":
        hashes()
    elif verb == "pack":
        pack()
    elif verb == "content":
        content(path)
    else:
        archive(path)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
