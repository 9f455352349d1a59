"""PID 1 of a guest, once its file systems are mounted: starts the program, and lets it run only when clock and entropy
are right. Runs on the image's own Python (3.9 or later, standard library alone), from a file that is not in the image.

Lines on the control port, each answered by one:

    sync                     -> synced         what was written is on the disk
    quiet                    -> quiet          the program stands still (its cgroup is frozen)
    run WALL_NS ENTROPY_HEX  -> running        the clock is set, the entropy mixed in, the program goes on
    run                      -> running        the program goes on as it was
    (unasked)                   ended CODE OOM   it ended; the guest powers off

SIGUSR1 makes it take the host name that the program has written into HOSTNAME.

What cannot be done is answered with "error TEXT", and the program stays as it was: not running, after a restore.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
GROUP = CGROUPS / "agent"
PORTS = Path("/sys/class/virtio-ports")
BESIDE = Path("/run/beside.py")
HOSTNAME = Path("/run/rethaw/hostname")
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
POWER_OFF = 0x4321FEDC
LINE_MOST = 4096
FREEZE_S = 2.0
PORT_S = 20.0
LAST_CAPABILITY = 40  # CAP_CHECKPOINT_RESTORE; kernels of the future may have more
libc = ctypes.CDLL(None, use_errno=True)


def port(name: str) -> int:
    """The virtio-serial port `name`, opened."""
    end = time.monotonic() + PORT_S
    while time.monotonic() < end:
        for found in PORTS.iterdir():
            if (found / "name").read_text().strip() == name:
                return os.open(f"/dev/{found.name}", os.O_RDWR | os.O_CLOEXEC)
        time.sleep(0.02)
    raise OSError(f"there is no port {name}")


def counted(path: Path, name: str) -> int:
    """The number that stands beside `name` in a file of names and numbers."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def prepare_group(memory_bytes: int, pids: int) -> None:
    GROUP.mkdir(exist_ok=True)
    (CGROUPS / "cgroup.subtree_control").write_text("+memory +pids")
    (GROUP / "memory.max").write_text(str(memory_bytes))
    (GROUP / "memory.oom.group").write_text("1")
    (GROUP / "pids.max").write_text(str(pids))


def keep_capabilities(kept: list[int]) -> None:
    for number in range(LAST_CAPABILITY + 1):
        if number not in kept and libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"capability {number} cannot be dropped")
    mask = sum(1 << number for number in kept)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", low, low, 0, high, high, 0)
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be set")


def confine(config: dict[str, Any]) -> None:
    """What every program of the guest is let do."""
    for name, value in config["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    keep_capabilities(config["capabilities"])
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for number in (signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def start(config: dict[str, Any], channel: int, errors: int) -> int:
    """The pid of the program, which runs by then. Raises OSError when it cannot be run."""
    why, tell = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(tell)
        with os.fdopen(why, "rb") as f:
            said = f.read()  # nothing, and its end, once the program has taken over
        if said:
            raise OSError(said.decode(errors="replace"))
        return pid
    try:
        os.setsid()
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
        for fd, target in ((channel, 0), (channel, 1), (errors, 2)):
            os.dup2(fd, target)
        confine(config)
        os.chdir("/")
        os.execvpe(config["argv"][0], config["argv"], config["env"])
    except BaseException as error:  # it is the child's last word
        os.write(tell, f"cannot start {config['argv'][0]}: {error}".encode())
    os._exit(127)


class Program:
    """The agent's program, which stands still or runs. Its files are open: in a guest without KVM each call counts."""

    def __init__(self) -> None:
        self._freeze = os.open(GROUP / "cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC)
        self._events = os.open(GROUP / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        self._random = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)

    def stop(self) -> None:
        os.pwrite(self._freeze, b"1", 0)
        end = time.monotonic() + FREEZE_S
        while b"frozen 1" not in os.pread(self._events, 256, 0):
            if time.monotonic() > end:
                raise OSError(f"the program did not stop within {FREEZE_S:g} s")
            os.sched_yield()

    def go_on(self) -> None:
        os.pwrite(self._freeze, b"0", 0)

    def reseed(self, seed: bytes) -> None:
        fcntl.ioctl(self._random, RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(self._random, RNDRESEEDCRNG)

    def obey(self, line: str) -> str:
        words = line.split()
        if words == ["quiet"]:
            self.stop()
            return "quiet"
        if words == ["sync"]:
            os.sync()
            return "synced"
        if words[:1] == ["run"] and len(words) in (1, 3):
            if len(words) == 3:
                self.reseed(bytes.fromhex(words[2]))
                time.clock_settime_ns(time.CLOCK_REALTIME, int(words[1]))
            self.go_on()
            return "running"
        return f"error unknown: {line!r}"


def reap(agent: int, server: Any) -> int | None:
    """Exit code of the program once it has ended. `server` is told of everybody else."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        ended = os.waitstatus_to_exitcode(status)
        ended = ended if ended >= 0 else 128 - ended
        if pid == agent:
            code = ended
        else:
            server.reaped(pid, ended)


def rename() -> None:
    """The program may ask for any name, but it may be up to something else: whatever it does here must harm nobody."""
    try:
        # A pipe or a link in its place must not keep PID 1.
        with os.fdopen(os.open(HOSTNAME, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as f:
            name = (f.read(64) or b"").decode("ascii").strip()
        if re.fullmatch("[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", name):
            socket.sethostname(name)
    except (OSError, ValueError):
        return


def loaded(path: Path) -> Any:
    """The module in the file `path`, from now on whatever becomes of that."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise OSError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(agent: int, program: Program, control: int, woken: int, others: int, server: Any) -> None:
    """`server`: runs other programs, from the first word on the port `others` on."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    poll.register(others, select.POLLIN)
    waiting = b""
    while True:
        ready = dict(poll.poll())
        if others in ready:
            poll.unregister(others)
            threading.Thread(target=server.serve, daemon=True).start()
        if woken in ready:
            if signal.SIGUSR1 in os.read(woken, 512):
                rename()
            code = reap(agent, server)
            if code is not None:
                oom = counted(GROUP / "memory.events", "oom_kill") > 0
                os.write(control, b"ended %d %d\n" % (code, oom))
                return
        if control in ready:
            waiting += os.read(control, LINE_MOST)
            while b"\n" in waiting:
                line, _, waiting = waiting.partition(b"\n")
                try:
                    answer = program.obey(line.decode())
                except Exception as error:  # the host decides what becomes of it
                    answer = f"error {error}"
                os.write(control, answer.replace("\n", " ").encode() + b"\n")
            if len(waiting) > LINE_MOST:
                waiting = b""


def main() -> None:
    path = Path(sys.argv[1])
    config = json.loads(path.read_text())
    path.unlink()
    control, channel, errors, others = port("control"), port("channel"), port("errors"), port("exec")
    server = loaded(BESIDE).Server(others, config, confine)
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, lambda _number, _frame: None)
    prepare_group(config["memory_bytes"], config["pids"])
    try:
        agent = start(config, channel, errors)
    except OSError as error:
        os.write(control, f"error {error}\n".encode())
    else:
        os.close(channel)
        os.close(errors)
        os.write(control, b"started\n")
        serve(agent, Program(), control, woken, others, server)
    os.sync()
    libc.reboot(POWER_OFF)


if __name__ == "__main__":
    main()
