"""A Ceph cluster of one monitor, one OSD in memory and one S3 gateway, all on loopback and below one directory.

    with CephGateway(Path("/tmp/ceph")) as ceph:
        ceph.url, ceph.access_key, ceph.secret_key

Needs Debian's ceph-mon, ceph-osd and radosgw (`scripts/setup.sh long`). Authentication (cephx) is on. The daemons are
children of this process, in the foreground, and die with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from rethaw.model.errors import Unavailable

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "ceph", "ceph-authtool", "monmaptool", "radosgw-admin", "setpriv")
_COMMAND_S = 60.0

_CONF = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon}
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {dir}/$name.keyring
log file =
log to file = false
log to stderr = true
err to stderr = true
run dir = {dir}
admin socket =
pid file =
crash dir = {dir}
ms bind ipv6 = false

[mon]
mon data = {dir}/mon
keyring = {dir}/mon/keyring
mon allow pool size one = true
mon cluster log file =
auth allow insecure global id reclaim = false

[osd]
osd data = {dir}/osd
keyring = {dir}/osd/keyring
osd objectstore = memstore
memstore device bytes = {bytes}
osd crush chooseleaf type = 0
osd class dir = /usr/lib/{machine}-linux-gnu/rados-classes
osd max backfills = 1

[client]
rgw data = {dir}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw run sync thread = false
rgw enable usage log = false
rgw multipart min part size = 5242880
"""
# Pools are made by the gateway, so what they are is said to monitor and gateway alike.
_POOLS = """\
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 2
osd pool default pgp num = 2
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon max pg per osd = 1000
"""


def missing_programs() -> list[str]:
    """What has to be installed first."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class CephGateway:
    """`directory` is made, and holds nothing but this cluster. `memory_bytes`: how much the OSD may store."""

    def __init__(self, directory: Path, memory_bytes: int = 1 << 30) -> None:
        self._dir = directory
        self._memory = memory_bytes
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._ports = _free_ports(2)
        self.access_key, self.secret_key = "rethaw", os.urandom(20).hex()
        self.address = ("127.0.0.1", self._ports[1])
        self.url = f"http://127.0.0.1:{self._ports[1]}"

    def start(self, timeout_s: float = 120.0) -> None:
        """Ready for S3 requests when this returns. Raises Unavailable with the log of the daemon that is not."""
        deadline = time.monotonic() + timeout_s
        try:
            self._prepare()
            self._monitor(deadline)
            self._osd(deadline)
            self._gateway(deadline)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the daemons, last first. What they stored is gone."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGKILL)  # nothing of theirs is kept
        for daemon in self._daemons:
            daemon.wait()
        self._daemons.clear()

    def __enter__(self) -> CephGateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------ steps

    def _prepare(self) -> None:
        for name in ("", "mon", "osd", "rgw"):
            (self._dir / name).mkdir(mode=0o700, parents=True)
        self._fsid = str(uuid.uuid4())
        conf = _CONF.format(
            fsid=self._fsid,
            dir=self._dir,
            mon=self._ports[0],
            rgw=self._ports[1],
            bytes=self._memory,
            machine=os.uname().machine,
        )
        (self._dir / "ceph.conf").write_text(conf.replace("\n[mon]\n", f"{_POOLS}\n[mon]\n"))
        keys = self._dir / "initial.keyring"
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        self._tool("ceph-authtool", "--create-keyring", str(keys), "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        admin = self._dir / "client.admin.keyring"
        self._tool("ceph-authtool", "--create-keyring", str(admin), "--gen-key", "-n", "client.admin", *everything)
        self._tool("ceph-authtool", str(keys), "--import-keyring", str(admin))
        monmap = self._dir / "monmap"
        address = f"[v2:127.0.0.1:{self._ports[0]}]"
        self._tool("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address, str(monmap))
        self._tool("ceph-mon", *self._conf, "--mkfs", "-i", "a", "--monmap", str(monmap), "--keyring", str(keys))

    def _monitor(self, deadline: float) -> None:
        self._daemon("mon", ["ceph-mon", *self._conf, "-f", "-i", "a"])
        self._until("mon", deadline, lambda: self._ceph("mon", "stat"))

    def _osd(self, deadline: float) -> None:
        osd = str(uuid.uuid4())
        self._ceph("osd", "new", osd)
        key = self._dir / "osd" / "keyring"
        self._tool("ceph-authtool", "--create-keyring", str(key), "--gen-key", "-n", "osd.0")
        self._ceph("auth", "add", "osd.0", "mon", "allow profile osd", "osd", "allow *", "-i", str(key))
        self._tool("ceph-osd", *self._conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("osd", ["ceph-osd", *self._conf, "-f", "-i", "0"])
        self._until("osd", deadline, lambda: '"num_up_osds":1' in self._ceph("osd", "stat", "-f", "json"))

    def _gateway(self, deadline: float) -> None:
        keyring = self._dir / "client.rgw.keyring"
        self._ceph("auth", "get-or-create", "client.rgw", "mon", "allow *", "osd", "allow *", "-o", str(keyring))
        self._daemon("rgw", ["radosgw", *self._conf, "-f", "-n", "client.rgw"])
        self._until("rgw", deadline, self._gateway_answers)
        user = ["--uid", "rethaw", "--display-name", "rethaw"]
        keys = ["--access-key", self.access_key, "--secret", self.secret_key]
        self._tool("radosgw-admin", *self._conf, "-n", "client.rgw", "user", "create", *user, *keys)

    def _gateway_answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(self.address, timeout=1):
            return True
        return False

    # ------------------------------------------------------------------ helpers

    @property
    def _conf(self) -> list[str]:
        return ["-c", str(self._dir / "ceph.conf")]

    def _ceph(self, *words: str) -> str:
        return self._tool("ceph", *self._conf, "--connect-timeout", "10", *words)

    def _tool(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_COMMAND_S)
        if done.returncode != 0:
            raise Unavailable(
                f"{' '.join(words)} failed with {done.returncode}: {done.stderr.strip()[-500:]}",
                remedy=f"look at {self._dir}",
            )
        return done.stdout

    def _daemon(self, name: str, words: Sequence[str]) -> None:
        with (self._dir / f"{name}.log").open("wb") as log:
            # When this process is killed, the daemon is too.
            command = ["setpriv", "--pdeathsig", "KILL", *words]
            self._daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _until(self, name: str, deadline: float, done: object) -> None:
        assert callable(done)
        last = "nothing"
        while time.monotonic() < deadline and self._daemons[-1].poll() is None:
            try:
                if done():
                    return
                last = "not yet"
            except (Unavailable, subprocess.TimeoutExpired) as error:
                last = str(error)
            time.sleep(0.1)
        log = (self._dir / f"{name}.log").read_text(errors="replace")
        raise Unavailable(
            f"Ceph's {name} did not come up ({last}):\n{log[-2000:]}", remedy="is the machine overloaded?"
        )


def _free_ports(number: int) -> list[int]:
    """Of loopback. Held together while they are chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for _ in range(number):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            found.append(sock.getsockname()[1])
        return found
