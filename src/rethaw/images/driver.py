"""PID 1 of a build sandbox, run by the image's own python3 (standard library only, 3.9 or newer): carries the proxy's
socket to a port, runs the command, and writes down what it changed. Read as text by `rethaw.images.sandbox`."""

# ruff: noqa: PTH103, PTH110, PTH123
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from typing import Any

SHARE = "/.rethaw"  # a directory of every image: a mount point that has to be made would be made in the tree itself
PORT = 3128
SKIPPED = ("proc", "sys", "dev", "tmp", "run", ".rethaw")


def connected() -> socket.socket:
    upstream = socket.socket(socket.AF_UNIX)
    upstream.connect(SHARE + "/net.sock")
    return upstream


def lifeline() -> None:
    """The node's end closes when the build is given up, or when the node dies; then there is nothing to do here."""
    line = connected()
    line.sendall(b"L")
    with contextlib.suppress(OSError):
        line.recv(1)
    os._exit(111)


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def carry(client: socket.socket) -> None:
    try:
        upstream = connected()
    except OSError:
        client.close()
        return
    up = threading.Thread(target=copy, args=(client, upstream), daemon=True)
    up.start()
    copy(upstream, client)
    up.join()
    client.close()
    upstream.close()


def accept(listener: socket.socket) -> None:
    while True:
        client, _ = listener.accept()
        threading.Thread(target=carry, args=(client,), daemon=True).start()


def write_changes(begun: float) -> None:
    tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined] - names of owners: it would look one up for each file
    os.makedirs(SHARE + "/out", exist_ok=True)
    with open(SHARE + "/out/names", "wb") as names, tarfile.open(SHARE + "/out/changes.tar", "w") as tar:
        stack = [b""]
        while stack:
            below = stack.pop()
            with os.scandir(b"/" + below) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    name = below + b"/" + entry.name if below else entry.name
                    if not below and os.fsdecode(name) in SKIPPED:
                        continue
                    names.write(name + b"\0")
                    about = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(about.st_mode):
                        stack.append(name)
                    if about.st_ctime < begun:
                        continue
                    tar.inodes = {}  # type: ignore[attr-defined] - a hard link travels as a file
                    member: Any = tar.gettarinfo(os.fsdecode(entry.path), os.fsdecode(name))
                    if member is None or not (member.isfile() or member.isdir() or member.issym()):
                        continue  # sockets, pipes, devices
                    if member.isfile():
                        with open(entry.path, "rb") as file:
                            tar.addfile(member, file)
                    else:
                        tar.addfile(member)
        names.write(b".\0")  # the list is whole


def main() -> int:
    with open(SHARE + "/job.json") as file:
        job = json.load(file)
    threading.Thread(target=lifeline, daemon=True).start()
    listener = socket.create_server(("127.0.0.1", PORT), backlog=64)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    begun = time.time() - 0.05
    os.makedirs(job["workdir"], exist_ok=True)
    if not os.path.exists("/bin/sh"):
        print("the image has no /bin/sh, which commands are run by")
        return 127
    shell = subprocess.Popen(
        ["/bin/sh", "-ec", job["command"]],
        env=job["env"],
        cwd=job["workdir"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    code = shell.wait()
    with contextlib.suppress(OSError):
        os.kill(-1, signal.SIGKILL)  # what it left running; PID 1 itself is spared
    if code:
        return code if code > 0 else 128 - code
    write_changes(begun)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
