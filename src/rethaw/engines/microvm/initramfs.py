"""The guest's first file system: modules, busybox and an init that mounts the image and hands over to the starter."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

OWN = ("starter.py", "beside.py")
MODULES = ("virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_console", "overlay")

# vda, vdb: the image and a layer on top, read-only, shared by all; vdc: this sandbox's own disk, to which changes go.
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /lower /layer /rw /root
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for m in MODULES; do $b insmod /modules/$m.ko || { $b echo "module $m"; $b poweroff -f; }; done
n=0
while [ ! -b /dev/vdc ]; do
    n=$((n+1)); [ $n -gt 500 ] && { $b echo "no disks"; $b poweroff -f; }
    $b usleep 10000
done
$b mount -t ext4 -o ro,noatime /dev/vda /lower || { $b echo "no image"; $b poweroff -f; }
$b mount -t ext4 -o ro,noatime /dev/vdb /layer || { $b echo "no layer"; $b poweroff -f; }
$b mount -t ext4 -o noatime /dev/vdc /rw || { $b echo "no disk"; $b poweroff -f; }
$b mkdir -p /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/layer:/lower,upperdir=/rw/upper,workdir=/rw/work overlay /root || $b poweroff -f
$b mkdir -p /root/proc /root/sys /root/dev /root/tmp /root/run
$b mount -t proc -o nosuid,nodev,noexec proc /root/proc
$b mount -t sysfs -o nosuid,nodev,noexec sys /root/sys
$b mount -t cgroup2 -o nosuid,nodev,noexec cgroup /root/sys/fs/cgroup
$b mount --move /dev /root/dev
$b mkdir -p /root/dev/pts /root/dev/shm
$b mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts /root/dev/pts
$b mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /root/dev/shm
$b mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /root/run
$b mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /root/tmp
$b cp /starter.py /beside.py /config.json /root/run/
echo 1 > /proc/sys/vm/overcommit_memory
$b hostname "$($b cat /hostname)"
$b ip link set lo up 2>/dev/null || $b ifconfig lo 127.0.0.1 up
p=/.rethaw/python/bin/python3
[ -x /root$p ] || p=/usr/bin/python3
exec $b switch_root /root $p -I -S /run/starter.py /run/config.json
"""


def cpio(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A "newc" archive of `files`: path to mode (file type included) and content. Directories come before what is in
    them."""
    out: list[bytes] = []

    def add(number: int, name: str, mode: int, data: bytes) -> None:
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        out.append(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    for number, (name, (mode, data)) in enumerate(files.items(), 1):
        add(number, name, mode, data)
    add(0, "TRAILER!!!", 0, b"")
    return b"".join(out)


def digest() -> str:
    """Of what Rethaw itself adds to the guest."""
    ours = "\0".join((*MODULES, INIT, *(_own(name).decode() for name in OWN)))
    return hashlib.sha256(ours.encode()).hexdigest()[:16]


def _own(name: str) -> bytes:
    return (Path(__file__).parent / name).read_bytes()


def base(kernel_tree: Path, busybox: bytes) -> bytes:
    """What all guests of one kernel share. `kernel_tree`: its unpacked package. Raises FileNotFoundError."""
    files: dict[str, tuple[int, bytes]] = {
        "bin": (0o040755, b""),
        "modules": (0o040755, b""),
        "dev": (0o040755, b""),
        "bin/busybox": (0o100755, busybox),
        "init": (0o100755, INIT.replace("MODULES", " ".join(MODULES)).encode()),
        **{name: (0o100644, _own(name)) for name in OWN},
    }
    modules = {path.stem: path for path in sorted((kernel_tree / "lib" / "modules").rglob("*.ko"))}
    for name in MODULES:
        if name not in modules:
            raise FileNotFoundError(f"the kernel package has no module {name}")
        files[f"modules/{name}.ko"] = (0o100644, modules[name].read_bytes())
    return cpio(files)


def of_one(config: Mapping[str, object], hostname: str) -> bytes:
    """What is one guest's own; the kernel unpacks it after the base."""
    hostname = re.sub(r"[^A-Za-z0-9.-]", "-", hostname)[:63]
    return cpio({"config.json": (0o100600, json.dumps(config).encode()), "hostname": (0o100644, hostname.encode())})
