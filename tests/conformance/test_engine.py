"""What every engine must do, whatever it is made of. Each case runs once per engine."""

from __future__ import annotations

import ast
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import MIB, ask, restored, until

from rethaw.engines.base import Engine, Sandbox, SandboxSpec
from rethaw.model import faults
from rethaw.model.errors import EngineError, EngineMismatch, RethawError, StorageFull

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
Boot = Callable[..., Any]

# A program that is busy with everything a snapshot must carry, and checks it all again on every round.
BUSY = r"""
import hashlib, os, pty, random, socket, sqlite3, subprocess, threading, time
class Busy:
    def __init__(self):
        self.errors = []; self.rounds = 0
        self.memory = bytearray(os.urandom(8 << 20)); self.sum = hashlib.sha256(self.memory).hexdigest()
        os.makedirs("/root/work", exist_ok=True)
        self.blobs = {}
        self.gone = open("/root/gone", "w+b"); os.unlink("/root/gone")
        self.child = subprocess.Popen(["python3", "-uc", "import sys\nn=0\nfor l in sys.stdin:\n n+=int(l)\n print(n)"],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.total = 0
        server = socket.create_server(("127.0.0.1", 0)); self.near = socket.create_connection(server.getsockname())
        self.far, _ = server.accept()
        self.read, self.write = os.pipe()
        pid, self.tty = pty.fork()
        if pid == 0:
            os.execvp("sh", ["sh", "-c", "stty -echo; echo ready; while read l; do echo \"tty $l\"; done"])
        said = b""
        while b"ready" not in said: said += os.read(self.tty, 1000)
        self.db = sqlite3.connect("/root/db", isolation_level=None, check_same_thread=False)
        self.db.execute("create table t (n integer)"); self.db.execute("begin"); self.rows = 0
        threading.Thread(target=self.run, daemon=True).start()
    def check(self, what, ok):
        if not ok: self.errors.append("%s in round %d" % (what, self.rounds))
    def run(self):
        try:
            while True: self.round()
        except BaseException as error:
            self.errors.append(repr(error))
    def round(self):
        n = self.rounds
        at = random.randrange(len(self.memory) - 4096)
        self.check("memory", hashlib.sha256(self.memory).hexdigest() == self.sum)
        self.memory[at:at + 4096] = os.urandom(4096); self.sum = hashlib.sha256(self.memory).hexdigest()
        where = "/%s/f%d" % (("root/work", "tmp", "dev/shm")[n % 3], n % 30)
        if where in self.blobs: self.check("file " + where, open(where, "rb").read() == self.blobs[where])
        self.blobs[where] = os.urandom(5000)
        with open(where, "wb") as f: f.write(self.blobs[where])
        self.gone.seek(0); self.gone.write(self.blobs[where]); self.gone.seek(0)
        self.check("deleted file", self.gone.read(5000) == self.blobs[where])
        self.child.stdin.write("%d\n" % n); self.total += n
        self.check("child", int(self.child.stdout.readline()) == self.total)
        self.near.sendall(b"x" * 3000); got = b""
        while len(got) < 3000: got += self.far.recv(3000)
        self.check("loopback", got == b"x" * 3000)
        os.write(self.write, b"p%d" % n); self.check("pipe", os.read(self.read, 100) == b"p%d" % n)
        os.write(self.tty, b"%d\n" % n); said = b""
        while not said.endswith(b"\n"): said += os.read(self.tty, 1000)
        self.check("pty", said.strip().endswith(b"tty %d" % n))
        self.db.execute("insert into t values (?)", (n,)); self.rows += 1
        self.check("transaction", self.db.execute("select count(*) from t").fetchone()[0] == self.rows)
        self.rounds += 1
busy = Busy()
"""

TIMERS = r"""
import asyncio, ctypes, subprocess, threading, time
class Span(ctypes.Structure): _fields_ = [("s", ctypes.c_long), ("n", ctypes.c_long)]
fired = {}
def timed(name, wait):
    def run():
        start = time.monotonic(); wait(); fired[name] = time.monotonic() - start
    threading.Thread(target=run, daemon=True).start()
def arm(seconds):
    fired.clear()
    timed("time.sleep", lambda: time.sleep(seconds))
    timed("event", lambda: threading.Event().wait(seconds))
    timed("asyncio", lambda: asyncio.run(asyncio.sleep(seconds)))
    timed("nanosleep", lambda: ctypes.CDLL(None).nanosleep(ctypes.byref(Span(seconds, 0)), None))
    timed("program", lambda: subprocess.call(["sleep", str(seconds)]))
"""


# ---------------------------------------------------------------- what is inside


async def test_a_guest_sees_its_image_and_nothing_of_the_host(boot: Boot, spec: SandboxSpec) -> None:
    box = await boot()
    assert await ask(box, "__import__('socket').gethostname()") == "agent"
    assert await ask(box, "__import__('os').environ['MARK']") == "conformance"
    assert await ask(box, "__import__('socket').gethostbyname('localhost')") == "127.0.0.1"
    assert await ask(box, "open('/usr/bin/new', 'w').write('x') and open('/usr/bin/new').read()") == "x"
    assert not (spec.rootfs / "usr/bin/new").exists()
    for directory in ("/tmp", "/run", "/dev/shm"):
        assert await ask(box, f"open('{directory}/f', 'w').write('x')") == 1
    meminfo = await ask(box, "int(open('/proc/meminfo').readline().split()[1])")
    assert spec.memory_bytes <= meminfo * 1024 <= spec.memory_bytes * 5 // 4  # a microVM has a kernel in there too
    programs = "[__import__('shutil').which(p) for p in ('python3', 'git', 'rg')]"
    assert None not in await ask(box, programs)


async def test_no_network_card_and_few_capabilities(boot: Boot) -> None:
    box = await boot()
    assert await ask(box, "__import__('socket').if_nameindex()") == [(1, "lo")]
    refused = await ask(box, "__import__('socket').create_connection(('1.1.1.1', 53), 2)")
    assert "OSError" in refused or "unreachable" in refused
    # chown dac_override fowner fsetid kill setgid setuid net_bind_service
    bits = sum(1 << n for n in (0, 1, 3, 4, 5, 6, 7, 10))
    await ask(box, "import re, subprocess; look = lambda text: dict(re.findall(r'(Cap\\w+):\\s*(\\w+)', text))")
    of_a_program = await ask(
        box, "look(subprocess.run(['cat', '/proc/self/status'], capture_output=True, text=True).stdout)"
    )
    assert {name: int(of_a_program[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {
        "CapEff": bits, "CapPrm": bits, "CapBnd": bits
    }  # fmt: skip
    assert int(of_a_program["CapInh"], 16) == 0
    own = await ask(box, "look(open('/proc/self/status').read())")  # guestd's: it may change the host name
    assert int(own["CapBnd"], 16) == bits and int(own["CapEff"], 16) in (bits, bits | 1 << 21)
    assert await ask(box, "subprocess.run(['hostname', 'x']).returncode") != 0
    assert "PermissionError" in await ask(box, "__import__('os').chroot('/tmp')")
    assert "PermissionError" in await ask(box, "(lambda s: s.socket(s.AF_INET, s.SOCK_RAW, 1))(__import__('socket'))")


async def test_the_things_an_agent_does_as_root_work(boot: Boot) -> None:
    box = await boot()
    await ask(box, "import subprocess, os")
    run = "subprocess.run({!r}, shell=True, capture_output=True, text=True, cwd='/root')"
    script = (
        "set -e; git init -q r; cd r; echo a > a; git add a; "
        "git -c user.name=a -c user.email=a@b commit -qm first; git log --oneline | wc -l; rg -c a a; "
        "chown 1000:1000 a; stat -c %u a; "
        "mkdir -p p/DEBIAN p/opt/tool; printf 'Package: tool\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b>\\n"
        "Description: t\\n' > p/DEBIAN/control; echo hi > p/opt/tool/f; dpkg-deb -b p t.deb >/dev/null; "
        "dpkg -i t.deb >/dev/null; cat /opt/tool/f"
    )
    done = await ask(box, f"(lambda r: (r.returncode, r.stdout.split(), r.stderr))({run.format(script)})", 60)
    assert done[0] == 0, done
    assert done[1] == ["1", "1", "1000", "hi"]


# ---------------------------------------------------------------- save and restore


async def test_three_generations_of_a_busy_program(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path
) -> None:
    box: Sandbox = await boot()
    await ask(box, BUSY)
    seen = 0
    for generation in range(3):
        before = await ask(box, "busy.rounds")
        await until_rounds(box, before + 5)
        saved = await box.capture(staging / str(generation))
        assert saved.raw_bytes > 8 * MIB
        assert all(path.is_file() for path in saved.sections.values())
        await ask(box, f"lost_{generation} = True")
        await box.destroy()
        box = await boot(await restored(engine, spec, saved))
        now = await ask(box, "busy.rounds")
        assert now >= max(seen, before + 5), "the restored program does not go on from its save"
        assert "NameError" in await ask(box, f"lost_{generation}")
        seen = now
        await until_rounds(box, now + 5)
        assert await ask(box, "busy.errors") == []
        shutil.rmtree(staging / str(generation))
    assert await ask(box, "busy.db.execute('commit') and busy.db.execute('pragma integrity_check').fetchone()") in (
        ("ok",),
        "OperationalError: cannot commit - no transaction is active",
    )


async def until_rounds(box: Sandbox, rounds: int) -> None:
    deadline = time.monotonic() + 30
    while await ask(box, "busy.rounds") < rounds:
        assert await ask(box, "busy.errors") == []
        assert time.monotonic() < deadline, "the program stands still"
        await asyncio.sleep(0.02)


async def test_saves_in_a_row_under_load_leave_the_guest_running(boot: Boot, staging: Path) -> None:
    box = await boot()
    await ask(box, BUSY)
    pid = box.pid
    for n in range(5):
        saved = await box.capture(staging / str(n))
        assert saved.clock["frozen"] is True
        shutil.rmtree(staging / str(n))
    await until_rounds(box, await ask(box, "busy.rounds") + 5)
    assert box.pid == pid
    assert await ask(box, "busy.errors") == []


async def _timers(boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path, timer: int, frozen: float) -> None:
    box: Sandbox = await boot()
    await ask(box, TIMERS)
    for generation in range(3):
        await ask(box, f"arm({timer})")
        await ask(box, "time.sleep(0.5)")
        saved = await box.capture(staging / str(generation))
        monotonic = await ask(box, "time.monotonic()")
        assert await ask(box, "fired") == {}
        await box.destroy()
        await asyncio.sleep(frozen)
        box = await boot(await restored(engine, spec, saved))
        now, wall, fired = await ask(box, "(time.monotonic(), time.time(), dict(fired))")
        assert abs(wall - time.time()) < 1.0
        assert now - monotonic < 1.0, "the monotonic clock went on while the guest was frozen"
        assert fired == {}, "a timer fired because of the freeze"
        deadline = time.monotonic() + timer + 5
        while len(fired := await ask(box, "dict(fired)")) < 5:
            assert time.monotonic() < deadline, f"only {fired} fired"
            await asyncio.sleep(0.05)
        for name, took in fired.items():
            assert timer - 0.02 <= took < timer + 1.0, f"{name} took {took} of running time"
        shutil.rmtree(staging / str(generation))


async def test_a_timer_frozen_for_8_s_fires_after_its_own_3_s(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path
) -> None:
    await _timers(boot, engine, spec, staging, 3, 8.0 / 3)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_timer_frozen_for_30_s_fires_after_its_own_5_s(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path
) -> None:
    await _timers(boot, engine, spec, staging, 5, 30.0)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_twenty_five_generations(boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path) -> None:
    box: Sandbox = await boot()
    await ask(box, BUSY)
    for generation in range(25):
        for extra in range(2):
            await box.capture(staging / f"{generation}-{extra}")
            shutil.rmtree(staging / f"{generation}-{extra}")
        saved = await box.capture(staging / str(generation))
        await box.destroy()
        box = await boot(await restored(engine, spec, saved))
        shutil.rmtree(staging / str(generation))
        assert abs(await ask(box, "time.time()") - time.time()) < 1.0
        await until_rounds(box, await ask(box, "busy.rounds") + 3)
        assert await ask(box, "busy.errors") == []


async def test_forks_differ_in_randomness(boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path) -> None:
    box = await boot()
    await ask(box, "import os, uuid, ssl; mark = 'kept'")
    saved = await box.capture(staging / "one")
    first, second = await asyncio.gather(restored(engine, spec, saved), restored(engine, spec, saved))
    boxes = [box, await boot(first), await boot(second)]
    answers = await asyncio.gather(
        *(
            ask(
                b,
                "(os.urandom(16).hex(), str(uuid.uuid4()), ssl.RAND_bytes(16).hex(), open('/proc/sys/kernel/random/uuid').read() if os.path.exists('/proc/sys/kernel/random/uuid') else os.urandom(8))",
            )
            for b in boxes
        )
    )
    for column in zip(*answers, strict=True):
        assert len(set(column)) == 3, column
    assert [await ask(b, "mark") for b in boxes] == ["kept"] * 3
    # Each goes its own way.
    await ask(boxes[1], "open('/root/mine', 'w').write('1')")
    assert await ask(boxes[2], "os.path.exists('/root/mine')") is False


async def test_sections_are_not_changed_by_restores(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path
) -> None:
    box = await boot()
    await ask(box, TIMERS)
    await ask(box, "arm(3600)")
    saved = await box.capture(staging / "one")
    elsewhere = {name: path.rename(staging / f"moved-{name}") for name, path in saved.sections.items()}
    before = {name: path.read_bytes() for name, path in elsewhere.items()}
    for path in elsewhere.values():
        path.chmod(0o400)
    for _ in range(2):
        other = await boot(await restored(engine, spec, replace(saved, sections=elsewhere)))
        assert await ask(other, "fired") == {}
        await other.destroy()
    assert {name: path.read_bytes() for name, path in elsewhere.items()} == before


async def test_nothing_unread_is_lost_or_doubled_in_the_one_that_runs_on(boot: Boot, staging: Path) -> None:
    box = await boot()
    await ask(box, "import time")
    for n in range(50):
        box.writer.write(f'"{n}"\n'.encode())
    saving = asyncio.ensure_future(box.capture(staging / "one"))
    got = [int((await asyncio.wait_for(box.reader.readline(), 10)).decode()) for _ in range(50)]
    await saving
    assert got == list(range(50))


# ---------------------------------------------------------------- failures of a save


async def test_a_save_without_room_leaves_the_guest_running(boot: Boot, staging: Path) -> None:
    box = await boot()
    await ask(box, "import os; held = os.urandom(40 << 20)")
    small = staging / "small"
    small.mkdir()
    subprocess.run(  # noqa: ASYNC221
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)], check=True
    )
    try:
        with pytest.raises(StorageFull, match="no room"):
            await box.capture(small / "one")
        assert sum(p.stat().st_size for p in (small / "one").iterdir()) == 0, "a failed save keeps its room"
        assert await ask(box, "len(held)") == 40 << 20
    finally:
        subprocess.run(["umount", str(small)], check=True)  # noqa: ASYNC221
    saved = await box.capture(staging / "two")
    assert saved.raw_bytes > 40 << 20
    assert await ask(box, "len(held)") == 40 << 20


@pytest.mark.parametrize("action", ["raise", "enospc"])
@pytest.mark.parametrize("point", ["engine.capture.before", "engine.capture.after"])
async def test_a_save_that_fails_at_any_step_leaves_the_guest_running(
    boot: Boot, staging: Path, point: str, action: str
) -> None:
    box = await boot()
    faults.configure(f"{point}={action}")
    try:
        with pytest.raises(RethawError):
            await box.capture(staging / "one")
    finally:
        faults.configure("")
    assert await ask(box, "1 + 1") == 2
    await box.capture(staging / "two")


async def test_a_save_into_a_used_directory_is_refused(boot: Boot, staging: Path) -> None:
    box = await boot()
    (staging / "file").write_text("x")
    with pytest.raises(EngineError, match="not empty"):
        await box.capture(staging)
    assert (staging / "file").read_text() == "x"
    assert await ask(box, "1 + 1") == 2


async def test_saving_a_guest_that_uses_most_of_its_memory(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path
) -> None:
    """Pages written to memory-backed storage are charged to who writes them: the sandbox."""
    box = await boot()
    await ask(box, "import os; held = os.urandom(190 << 20)")
    first = await box.capture(staging / "one")
    second = await box.capture(staging / "two")
    assert first.raw_bytes > 190 * MIB
    shutil.rmtree(staging / "one")
    other = await boot(await restored(engine, spec, second))
    assert await ask(other, "len(held)") == 190 << 20
    assert await ask(box, "len(held)") == 190 << 20
    most = {"gvisor": 330, "qemu": 530}[engine.name]  # all of a machine, and QEMU itself
    assert 190 * MIB < await box.memory() < most * MIB
    # The room is taken back once the files are gone.
    shutil.rmtree(staging / "two")
    await asyncio.sleep(1.0)
    box.writer.write(b'"more = os.urandom(200 << 20)"\n')
    assert (await asyncio.wait_for(box.wait(), 30)).oom


# ---------------------------------------------------------------- refusals


async def test_a_build_that_is_not_here_is_refused_by_name_before_anything_is_read(
    engine: Engine, spec: SandboxSpec, tmp_path: Path
) -> None:
    build = await engine.build()
    nothing = {name: tmp_path / name for name in ("checkpoint.img", "pages_meta.img", "pages.img")}
    with pytest.raises(EngineMismatch, match="f" * 64):
        await engine.restore(spec, nothing, build="f" * 64, cpu="", clock={})
    with pytest.raises(EngineMismatch, match="CPU"):
        await engine.restore(spec, nothing, build=build, cpu="0" * 64, clock={})


async def test_damaged_and_missing_sections_are_errors(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path
) -> None:
    box = await boot()
    saved = await box.capture(staging / "one")
    name = next(iter(saved.sections))
    saved.sections[name].write_bytes(b"\0" * 1000)
    with pytest.raises(EngineError):
        await restored(engine, spec, saved)
    saved.sections[name].unlink()
    with pytest.raises(EngineError, match=name):
        await restored(engine, spec, saved)


async def test_a_program_that_is_not_in_the_image(engine: Engine, spec: SandboxSpec) -> None:
    with pytest.raises(EngineError, match="nothing-like-that"):
        await engine.boot(replace(spec, argv=("/nothing-like-that",)))


async def test_too_little_memory_to_start_is_named(engine: Engine, spec: SandboxSpec) -> None:
    with pytest.raises(EngineError, match="within 2 MiB"):
        await engine.boot(replace(spec, memory_bytes=2 * MIB))


async def test_a_root_filesystem_that_is_not_there(engine: Engine, spec: SandboxSpec, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        await engine.boot(replace(spec, rootfs=tmp_path / "nowhere"))


# ---------------------------------------------------------------- limits


async def test_out_of_memory_ends_the_sandbox_and_names_the_limit(boot: Boot) -> None:
    box = await boot()
    box.writer.write(b'"x = bytearray(1 << 30)"\n')
    end = await asyncio.wait_for(box.wait(), 30)
    assert end.oom
    assert "256 MiB" in end.detail


async def test_a_fork_bomb_meets_its_limit(boot: Boot, spec: SandboxSpec) -> None:
    box = await boot(with_spec=replace(spec, memory_bytes=1024 * MIB, pids=50))
    bomb = """
import os, subprocess, time
def bomb():
    for n in range(500):
        try:
            if os.fork() == 0:
                for fd in (0, 1, 2): os.close(fd)
                time.sleep(1000)
        except OSError as error:
            return n, error.errno
    return n, 0
"""
    await ask(box, bomb)
    # by a program, which has less rights than PID 1
    await ask(box, f"source = {bomb + 'print(bomb())'!r}")
    said = await ask(box, "subprocess.run(['python3', '-c', source], stdout=subprocess.PIPE, text=True).stdout", 60)
    forks, errno = ast.literal_eval(said)
    assert errno == 11
    assert 40 <= forks < 50
    assert await ask(box, "1 + 1") == 2


async def test_a_fork_bomb_over_many_users_does_not_hurt_the_host(boot: Boot, spec: SandboxSpec) -> None:
    box = await boot(with_spec=replace(spec, memory_bytes=1024 * MIB, pids=30))
    bomb = """
import os, time
def spread():
    for user in range(1000, 1040):
        if os.fork() == 0:
            os.setuid(user)
            for n in range(60):
                try:
                    if os.fork() == 0: time.sleep(1000)
                except OSError: pass
            time.sleep(1000)
"""
    await ask(box, bomb)
    box.writer.write(b'"spread()"\n')
    peak = 0
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        peak = max(peak, _descendants(box.pid))
    assert peak <= 3 * 30 + 256


def _descendants(pid: int) -> int:
    """Threads of a process and of everything below it."""
    children: dict[int, list[int]] = {}
    threads: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            threads[int(entry.name)] = int(fields[17])
    total, stack = 0, [pid]
    while stack:
        one = stack.pop()
        total += threads.get(one, 0)
        stack.extend(children.get(one, []))
    return total


# ---------------------------------------------------------------- the end


async def test_an_exit_is_noticed_with_its_code_and_last_words(boot: Boot) -> None:
    box = await boot()
    box.writer.write(b"\"import os, sys; sys.stderr.write('last words'); sys.stderr.flush(); os._exit(7)\"\n")
    started = time.monotonic()
    end = await asyncio.wait_for(box.wait(), 10)
    assert time.monotonic() - started < 2
    assert end.code in (7, None), "None only on kernels that forget it"
    assert not end.oom
    assert "last words" in end.detail
    with pytest.raises(EngineError, match="cannot be saved"):
        await box.capture(Path("/dev/shm/never"))


async def test_a_kill_from_outside_is_noticed_at_once(boot: Boot) -> None:
    box = await boot()
    await ask(box, "1")
    os.kill(box.pid, signal.SIGKILL)
    started = time.monotonic()
    end = await asyncio.wait_for(box.wait(), 10)
    assert time.monotonic() - started < 1
    assert not end.oom
    assert await asyncio.wait_for(box.reader.read(), 5) == b""


async def test_destroy_is_quick_and_leaves_nothing(boot: Boot, data_dir: Path) -> None:
    box = await boot()
    await ask(box, "import subprocess; p = subprocess.Popen(['sleep', '1000'])")
    started = time.monotonic()
    await box.destroy()
    assert time.monotonic() - started < 0.5
    await box.destroy()
    assert not Path(f"/proc/{box.pid}").exists() or _state(box.pid) == "Z"
    await until(lambda: not _traces(box.id, data_dir))


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _traces(id: str, data: Path) -> list[str]:
    """Processes, files and cgroups that carry a sandbox's id."""
    found = [str(p) for p in data.rglob(f"*{id}*")] if data.exists() else []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if id.encode() in (entry / "cmdline").read_bytes():
                    found.append(str(entry))
            except OSError:
                continue
    for base in Path("/sys/fs/cgroup").glob("**/rethaw"):
        found += [str(p) for p in base.glob(f"*/{id}")]
    return found


# ---------------------------------------------------------------- created ahead, orphans, probe


async def test_sandboxes_created_ahead_are_used_refilled_and_discarded(
    boot: Boot, engine: Engine, spec: SandboxSpec, staging: Path, data_dir: Path
) -> None:
    ahead: Callable[[SandboxSpec], int] = getattr(engine, "ahead")  # noqa: B009
    await engine.prepare(spec, 2)
    await until(lambda: ahead(spec) == 2, 20)
    box = await boot(await engine.boot(spec))  # not from a capture, which would take one
    assert ahead(spec) == (1 if engine.name == "gvisor" else 2), "a microVM created ahead waits for a snapshot"
    assert await ask(box, "1 + 1") == 2
    await ask(box, "mark = 41")
    saved = await box.capture(staging / "one")
    other = await boot(await restored(engine, spec, saved))
    assert await ask(other, "mark + 1") == 42
    await until(lambda: ahead(spec) == 2, 20)
    await other.destroy()  # clones of one that lives would share its memory instead
    # A dead one is not handed out.
    for pid in _created(data_dir, {box.id, other.id}):
        os.kill(pid, signal.SIGKILL)
    third = await boot(await restored(engine, spec, saved))
    assert await ask(third, "mark + 2") == 43
    await engine.prepare(spec, 0)
    await until(lambda: not _created(data_dir, {box.id, other.id, third.id}))


def _created(data: Path, but: set[str]) -> list[int]:
    """pids of sandboxes of this data directory."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if argv[0].endswith(("sandbox", "qemu-system-x86_64")) and any(str(data) in a for a in argv):
                if any(name in argument for name in but for argument in argv):
                    continue
                found.append(int(entry.name))
    return found


async def test_orphans_of_a_dead_node_process_are_removed(
    boot: Boot, engine: Engine, spec: SandboxSpec, data_dir: Path
) -> None:
    mine = await boot()
    program = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from engine_fixtures import ENGINES, GUEST
from rethaw.engines.base import SandboxSpec
async def main():
    engine = ENGINES[sys.argv[4]](Path(sys.argv[1]))
    spec = SandboxSpec("test", Path(sys.argv[2]), 128 << 20, 64, ("/usr/bin/python3", "-u", "-c", "import time; time.sleep(1000)"))
    box = await engine.boot(spec)
    await engine.prepare(spec, 1)
    while hasattr(engine, "ahead") and not engine.ahead(spec): await asyncio.sleep(0.02)
    print(box.id, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    here = str(Path(__file__).parent)
    node = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", program, str(data_dir), str(spec.rootfs), here, engine.name],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert node.stdout is not None
        lost = (await asyncio.to_thread(node.stdout.readline)).strip()
        assert _traces(lost, data_dir)
        assert await engine.sweep_orphans() == 0, "the other process is still alive"
        assert _traces(lost, data_dir)
    finally:
        node.kill()
        node.wait()
        if node.stdout:
            node.stdout.close()
    count = 2 if hasattr(engine, "ahead") else 1
    assert len(_created(data_dir, {mine.id})) == count
    assert await engine.sweep_orphans() == count
    await until(lambda: not _created(data_dir, {mine.id}))
    assert not _traces(lost, data_dir)
    assert await ask(mine, "1 + 1") == 2
    assert await engine.sweep_orphans() == 0


async def test_the_probe_takes_a_guest_through_everything(engine: Engine, data_dir: Path) -> None:
    report = await engine.probe(60)
    assert report.ok, report
    assert report.boot_ms and report.save_ms and report.restore_ms
    assert report.notes["clock_frozen"] is True
    await until(lambda: not _created(data_dir, set()))


async def test_many_at_once(boot: Boot, engine: Engine) -> None:
    boxes = await asyncio.gather(*(boot() for _ in range(4)))
    assert [await ask(b, f"{n} * 2") for n, b in enumerate(boxes)] == [0, 2, 4, 6]
    assert len({b.id for b in boxes}) == 4
