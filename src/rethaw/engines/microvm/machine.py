"""The QEMU process of one sandbox: its command line and its ports.

It runs as a user of its own without any privilege, in an empty network namespace, under QEMU's own seccomp filter, and
has five devices: three disks, a console and a serial controller with four ports. All files and sockets are given to it as
descriptors: it can open nothing by name but what everybody may read.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rethaw.engines.microvm.accelerators import Accelerator
from rethaw.model.errors import EngineError, EngineUnusable

QEMU = "qemu-system-x86_64"
PORTS = ("control", "channel", "errors", "exec")
SOCKETS = (*PORTS, "console", "qmp")
OWN = "own"  # what QEMU calls a sandbox's own disk
_JOIN = 'n=$0; while [ "$n" -gt 0 ]; do echo $$ > "$1/cgroup.procs" || exit 1; shift; n=$((n - 1)); done; exec "$@"'
_FIRST_USER = 0x70000000  # host users that nobody has; one for each sandbox
_CMDLINE = "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t rdinit=/init random.trust_cpu=on mitigations=off"


@dataclass(frozen=True)
class Files:
    """Descriptors for QEMU. `kernel`, `initrd`: of one that boots; 14 MiB that a restored one would keep for nothing. `state`:
    with one it waits for `migrate-incoming` to go on from there and from what is in `memory` by
    then; `saved`: where states are saved to."""

    kernel: int | None
    initrd: int | None
    memory: int | None
    base: int
    layer: int
    own: int
    saved: int
    state: int | None
    sockets: dict[str, int]

    def all(self) -> list[int]:
        found = [self.base, self.layer, self.own, self.saved, *self.sockets.values()]
        return found + [fd for fd in (self.kernel, self.initrd, self.memory, self.state) if fd is not None]


def command(directory: Path, size: int, files: Files, accelerator: Accelerator) -> list[str]:
    """QEMU's command line. `size`: bytes of memory; `directory` is only a name, by which orphans are found."""
    argv = [
        QEMU, "-name", f"guest={directory}",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-M", "microvm,acpi=on,pic=on,pit=on,rtc=on,isa-serial=on,usb=off,pcie=off,memory-backend=ram",
        *accelerator.options,
        "-smp", "1", "-m", f"size={size}b",
        "-object", _memory(size, files.memory),
    ]  # fmt: skip
    if files.kernel is not None and files.initrd is not None:
        argv += ["-kernel", _path(files.kernel), "-initrd", _path(files.initrd)]
        argv += ["-append", _CMDLINE + accelerator.kernel_arguments()]
    for name, fd in files.sockets.items():
        argv += ["-chardev", f"socket,id={name},fd={fd}"]
    argv += ["-mon", "chardev=qmp,mode=control", "-serial", "chardev:console"]
    fixed, own = "read-only=on", "read-only=off,discard=unmap"
    for name, fd, options in (("base", files.base, fixed), ("layer", files.layer, fixed), (OWN, files.own, own)):
        argv += ["-add-fd", f"fd={fd},set={fd}"]
        argv += ["-blockdev", f"driver=file,node-name={name}f,filename=/dev/fdset/{fd},locking=off,cache.no-flush=on,"
                 f"{options}"]  # fmt: skip
        argv += ["-blockdev", f"driver=raw,node-name={name},file={name}f,{options}"]
        argv += ["-device", f"virtio-blk-device,drive={name}"]
    argv += ["-device", "virtio-serial-device,id=serial"]
    for number, name in enumerate(PORTS, 1):
        argv += ["-device", f"virtserialport,bus=serial.0,nr={number},chardev={name},name={name}"]
    if files.state is not None:
        argv += ["-S", "-incoming", "defer", "-global", "migration.send-configuration=off"]
    return argv


def _memory(size: int, fd: int | None) -> str:
    if fd is None:
        return f"memory-backend-ram,id=ram,size={size},share=off,prealloc=off"
    return f"memory-backend-file,id=ram,size={size},mem-path={_path(fd)},share=off,prealloc=off"


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def new_user() -> int:
    return _FIRST_USER + secrets.randbelow(1 << 24)


def start(
    argv: Sequence[str],
    user: int,
    descriptors: Sequence[int],
    errors: Path,
    groups: Sequence[Path],
    member: int | None = None,
) -> int:
    """The pid of the process, which is our child and in the cgroups `groups`. `member`: a group of users that it belongs
    to. Blocking, some milliseconds.

    Raises EngineUnusable, EngineError.
    """
    wrapped = [
        "sh",
        "-c",
        _JOIN,
        str(len(groups)),
        *map(str, groups),
        "unshare",
        "--net",
        "--ipc",
        "--",
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--no-new-privs",
    ]
    wrapped += [
        "--clear-groups" if member is None else f"--groups={member}",
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--pdeathsig=keep",
        "--",
        *argv,
    ]
    try:
        with errors.open("ab") as err:
            process = subprocess.Popen(
                wrapped, stdin=subprocess.DEVNULL, stdout=err, stderr=err, pass_fds=descriptors, cwd="/",
                start_new_session=True, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            )  # fmt: skip
    except FileNotFoundError as error:
        raise EngineUnusable(f"{error.filename} is not installed", remedy="apt-get install qemu-system-x86") from None
    except OSError as error:
        raise EngineError(f"cannot start QEMU: {error}") from error
    return process.pid


async def streams(ours: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Our end of a port as streams."""
    return await asyncio.open_connection(sock=ours, limit=1 << 20)
