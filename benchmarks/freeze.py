"""What does a freeze cost? `python -m benchmarks.freeze --json`, as root; needs runsc.

An agent of about 50 MiB, which is Python with the `openai` client loaded, makes model calls in a real server; the same program, without
Rethaw, is saved and restored by hand with `runsc` in the same run, from the same root filesystem.

`pause_ms`: quiesce to thaw, from the log. `raw_pause_ms`: one `runsc checkpoint -leave-running` call. `durable_ms`:
from the start of the pause until the snapshot's row is committed. `resume_ms`: from the log's first word of resuming
until the agent's first output is durable in the log. `raw_resume_ms`: `runsc restore` into a sandbox created beforehand,
until the program's first answer on its pipe. Sizes as stored, in MiB; `second_session_first_stored_mib`: of the first
snapshot of another session of the same agent.

`--heap 1024 --change 10` gives both programs a heap of so many MiB, of which the agent writes the second number anew each
turn; `changed_compressed_mib` is what those bytes take with zstd alone, in frames of 64 KiB, and `stored_ratio` what a turn
stores by that. `raw_pause_ms` is then what the engine's own full dump of the heap costs.

`--engine qemu`: the same in microVMs. Raw is then the engine alone, without session, log or store. A guest that was booted
has all of its memory copied at each save; `later_pause_ms`: of saves in a life that began with a restore, where only what was
written since is (here: the suspends but the first). `boot_ms`: from a cold boot to the raw program's first word.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from backports import zstd

from rethaw.engines.base import SandboxSpec
from rethaw.engines.gvisor import spec as oci
from rethaw.engines.microvm.engine import QemuEngine
from rethaw.engines.microvm.sandbox import QemuSandbox
from rethaw.testing import processes
from rethaw.testing.chaos.run import code_archive
from rethaw.testing.provider import ProviderRequest, Reply, ScriptedProvider
from rethaw.testing.server import RunningServer, image_cache

MIB = 1 << 20
LOAD = """
import json, os, random, sys
import openai
def content(seed, mib):
    return bytearray(random.Random(seed).randbytes(mib << 19).hex().encode())
def fill(mib):
    return [content(n, 1) for n in range(mib)]
def rss():
    return int([l for l in open("/proc/self/status") if l.startswith("VmRSS")][0].split()[1]) / 1024
"""
AGENT = (
    LOAD
    + """
def bench(ctx, turns, resumes, mib, change):
    heap = fill(mib)
    client = openai.OpenAI()
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": "turn %d: what next?" % turn})
        answer = client.chat.completions.create(model="bench", messages=messages)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        for n in range(change):
            heap[(turn * change + n) % mib][:] = content(10_000 + turn * change + n, 1)
    print("rss", rss(), flush=True)
    for n in range(resumes):
        ctx.wait("go-%d" % n)
        print("awake", n, flush=True)
    return rss()
"""
)
RAW = (
    LOAD
    + """
heap = fill(HEAP_MIB)
client = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:9/v1")
print("ready", flush=True)
for line in sys.stdin:
    print("awake", line.strip(), flush=True)
"""
)


def answer(request: ProviderRequest) -> Reply:
    return Reply("thinking about it, " * 20, first_byte_s=0.6)


# ---------------------------------------------------------------- by hand


class ByHand:
    """The same program under plain runsc."""

    def __init__(self, rootfs: Path, work: Path, heap: int = 0) -> None:
        self.work = work
        program = RAW.replace("HEAP_MIB", str(heap))
        argv = ("/usr/bin/python3", "-c", program)
        spec = SandboxSpec("bench", rootfs, (512 + heap) * MIB, 512, argv, (("PATH", "/usr/bin"),))
        self.bundle = oci.write_bundle(spec, work / "bundle", None)
        self.base = [
            shutil.which("runsc") or "runsc", "--root", str(work / "run"), "--platform=systrap", "--network=none",
            "--overlay2=root:memory", "--ignore-cgroups",
        ]  # fmt: skip
        self.made: list[str] = []

    def runsc(self, *args: str) -> float:
        started = time.perf_counter()
        subprocess.run([*self.base, *args], check=True, capture_output=True)
        return (time.perf_counter() - started) * 1000

    def begin(self, verb: str, name: str, *more: str) -> tuple[IO[str], IO[str]]:
        guest_in, our_in = os.pipe()
        our_out, guest_out = os.pipe()
        with (self.work / "err").open("ab") as err:
            command = [*self.base, verb, *more, f"-bundle={self.bundle}", name]
            done = subprocess.run(command, check=False, stdin=guest_in, stdout=guest_out, stderr=err)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {(self.work / 'err').read_text()[-600:]}")
        self.made.append(name)
        os.close(guest_in)
        os.close(guest_out)
        return os.fdopen(our_in, "w", buffering=1), os.fdopen(our_out)

    def measure(self, rounds: int) -> tuple[list[float], list[float]]:
        say, hear = self.begin("run", "bench-0", "-detach")
        hear.readline()
        pauses: list[float] = []
        resumes: list[float] = []
        for n in range(rounds):
            say.write(f"{n}\n")
            hear.readline()
            image = self.work / f"image-{n}"
            image.mkdir()
            flags = ("-compression=none", "-exclude-committed-zero-pages", "-leave-running", f"-image-path={image}")
            pauses.append(self.runsc("checkpoint", *flags, "bench-0"))
            name = f"bench-{n + 1}"
            restored_say, restored_hear = self.begin("create", name)
            started = time.perf_counter()
            self.runsc("restore", "-detach", f"-bundle={self.bundle}", f"-image-path={image}", name)
            restored_say.write("hello\n")
            restored_hear.readline()
            resumes.append((time.perf_counter() - started) * 1000)
            self.remove(name)
            shutil.rmtree(image)
        return pauses, resumes

    def remove(self, name: str) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.runsc("kill", name, "KILL")
        with contextlib.suppress(subprocess.CalledProcessError):
            self.runsc("delete", "-force", name)

    def close(self) -> None:
        for name in self.made:
            self.remove(name)


async def by_engine(rootfs: Path, heap: int, rounds: int) -> dict[str, list[float]]:
    """The same program in microVMs by the engine alone: milliseconds of boots, pauses of a booted and of a restored one, and
    restores."""
    work = Path(tempfile.mkdtemp(prefix="rethaw-bench-", dir="/dev/shm"))
    argv = ("/usr/bin/python3", "-c", RAW.replace("HEAP_MIB", str(heap)))
    spec = SandboxSpec("bench", rootfs, (512 + heap) * MIB, 512, argv, (("PATH", "/usr/bin"),))
    engine = QemuEngine(work / "data", image_cache() / "microvm")
    out: dict[str, list[float]] = {"boot": [], "pause": [], "later": [], "resume": []}

    async def said(box: QemuSandbox, line: str) -> None:
        box.writer.write(line.encode())
        await box.reader.readline()

    try:
        await engine.prepare(spec, 1)
        started = time.perf_counter()
        box = await engine.boot(spec)
        await box.reader.readline()
        out["boot"].append((time.perf_counter() - started) * 1000)
        saved = None
        for n in range(rounds):
            await said(box, f"{n}\n")
            if saved is not None:
                out["later"].append((await box.capture(work / f"later-{n}")).engine_ms)
                await box.destroy()
                shutil.rmtree(work / f"later-{n}")
                box = await engine.boot(spec)
                await box.reader.readline()
            saved = await box.capture(work / f"image-{n}")
            out["pause"].append(saved.engine_ms)
            await box.destroy()
            started = time.perf_counter()
            box = await engine.restore(spec, saved.sections, build=saved.engine_build, cpu=saved.cpu, clock=saved.clock)
            await said(box, "hello\n")
            out["resume"].append((time.perf_counter() - started) * 1000)
            shutil.rmtree(work / f"image-{n}")
        await box.destroy()
    finally:
        await engine.close()
        shutil.rmtree(work, ignore_errors=True)
    return out


@contextlib.contextmanager
def by_hand(rootfs: Path, heap: int = 0) -> Iterator[ByHand]:
    work = Path(tempfile.mkdtemp(prefix="rethaw-bench-", dir="/dev/shm"))
    hand = ByHand(rootfs, work, heap)
    try:
        yield hand
    finally:
        hand.close()
        shutil.rmtree(work, ignore_errors=True)


# ---------------------------------------------------------------- with Rethaw


def at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["at"]).timestamp() * 1000


def resumes_of(events: list[dict[str, Any]]) -> list[float]:
    """Milliseconds from each `resuming` to the next output."""
    found: list[float] = []
    since: float | None = None
    for event in events:
        if event["type"] == "session.state" and event["data"]["state"] == "resuming":
            since = at(event)
        elif event["type"] == "output" and since is not None:
            found.append(at(event) - since)
            since = None
    return found


def changed_compressed(turns: int, change: int) -> float:
    """MiB that what the agent writes in a turn takes with zstd alone, median over turns."""
    names: dict[str, Any] = {}
    exec(LOAD.replace("import openai\n", ""), names)  # the very bytes that the agent writes
    sizes: list[int] = []
    for turn in range(min(turns, 3)):
        data = b"".join(bytes(names["content"](10_000 + turn * change + n, 1)) for n in range(change))
        sizes.append(sum(len(zstd.compress(data[at : at + 65536], 3)) for at in range(0, len(data), 65536)))
    return statistics.median(sizes) / MIB


def run(
    server: RunningServer, turns: int, rounds: int, heap: int = 0, change: int = 0, engine: str = "gvisor"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Path]:
    """Events of the session, events of a second one of the same agent with one turn, root filesystem."""
    digest = server.request("POST", "/v1/blobs", code_archive(agent=AGENT.encode()))["digest"]
    agent: dict[str, Any] = {
        "name": "freeze", "entry": "agent.py::bench", "code": digest, "idle_suspend_s": 0.2, "image": {"pip": ["openai"]},
    }  # fmt: skip
    agent |= {"memory_bytes": (512 + heap) * MIB, "engine": engine}
    start: dict[str, Any] = {"agent": agent, "args": {"turns": turns, "resumes": rounds, "mib": heap, "change": change}}
    session = server.request("POST", "/v1/sessions", start)["id"]

    def state() -> str:
        time.sleep(0.25)  # asking takes the CPU that is measured
        found = server.request("GET", f"/v1/sessions/{session}")
        if found["state"] in ("failed", "cancelled"):
            raise RuntimeError(f"{found['state']}: {found['reason']} {found['detail']}\n{server.log_tail()}")
        return str(found["state"])

    for n in range(rounds):
        processes.wait_until(lambda: state() == "suspended", 300, "the agent to be suspended")
        time.sleep(0.5)  # the sandbox created ahead is filled again in the background, as it would be in life
        server.request("POST", f"/v1/sessions/{session}/signals/go-{n}", {"payload": None})
        processes.wait_until(lambda: state() in ("running", "waiting", "completed"), 60, "the agent to resume")
    server.request("GET", f"/v1/sessions/{session}/result?wait_s=60", timeout_s=90)
    events = server.events(session)
    image = next(s["image"] for s in server.request("GET", f"/v1/sessions/{session}/snapshots")["snapshots"])
    start["args"] |= {"turns": 1, "resumes": 0}
    second = server.request("POST", "/v1/sessions", start)["id"]
    server.request("GET", f"/v1/sessions/{second}/result?wait_s=60", timeout_s=90)
    return events, server.events(second), (image_cache() / image / "rootfs").resolve()


async def measure(turns: int, rounds: int, heap: int = 0, change: int = 0, engine: str = "gvisor") -> dict[str, Any]:
    async with ScriptedProvider(answer) as provider:
        settings = {"base_url": provider.url, "key": "k", "auth": "bearer", "format": "openai"}

        def work() -> dict[str, Any]:
            with RunningServer(providers={"openai": settings}) as server:
                events, second, rootfs = run(server, turns, rounds, heap, change, engine)
            later: dict[str, Any] = {}
            if engine == "gvisor":
                with by_hand(rootfs, heap) as hand:
                    raw_pauses, raw_resumes = hand.measure(max(rounds, 5))
            else:
                raw = asyncio.run(by_engine(rootfs, heap, 5))
                raw_pauses, raw_resumes = raw["pause"], raw["resume"]
                paused = [e["data"]["paused_ms"] for e in events if e["type"] == "snapshot.created"]
                later = {
                    "later_pause_ms_p50": _p50(paused[-rounds + 1 :]),
                    "raw_later_pause_ms_p50": _p50(raw["later"]),
                }
                later["boot_ms"] = _p50(raw["boot"])
            snapshots = [e["data"] for e in events if e["type"] == "snapshot.created"]
            calls = [s for s in snapshots if s["why"] == "exchange"]
            other = next(e["data"] for e in second if e["type"] == "snapshot.created")
            resumes = resumes_of(events)
            rss = float(_output(events).split("rss ")[1].split()[0])
            pause, raw_pause = _p50([s["paused_ms"] for s in calls]), _p50(raw_pauses)
            resume, raw_resume = _p50(resumes), _p50(raw_resumes)
            turn = _p50([s["stored_bytes"] for s in calls[1:]]) / MIB
            more: dict[str, Any] = {}
            if change:
                alone = changed_compressed(turns, change)
                more = {
                    "heap_mib": heap,
                    "changed_mib": change,
                    "changed_compressed_mib": round(alone, 2),
                    "stored_ratio": round(turn / alone, 2),
                }
            return {
                "engine": engine,
                "agent_rss_mib": round(rss, 1),
                "pause_ms_p50": pause,
                "raw_pause_ms_p50": raw_pause,
                "pause_ratio": round(pause / raw_pause, 2),
                "durable_ms_p50": _p50([s["durable_ms"] for s in calls]),
                "resume_ms_p50": resume,
                "raw_resume_ms_p50": raw_resume,
                "resume_ratio": round(resume / raw_resume, 2),
                "first_stored_mib": round(calls[0]["stored_bytes"] / MIB, 2),
                "second_session_first_stored_mib": round(other["stored_bytes"] / MIB, 2),
                "turn_stored_mib_p50": round(turn, 2),
                **later,
                **more,
                "turns": len(calls),
                "resumes": len(resumes),
            }

        return await asyncio.to_thread(work)


def _output(events: list[dict[str, Any]]) -> str:
    import base64

    return b"".join(base64.urlsafe_b64decode(e["body"]) for e in events if e["type"] == "output").decode()


def _p50(values: list[float]) -> float:
    return round(statistics.median(values), 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.freeze", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8, help="suspends and resumes")
    parser.add_argument("--heap", type=int, default=0, help="MiB of heap beside the client library")
    parser.add_argument("--change", type=int, default=0, help="MiB of it written anew each turn")
    parser.add_argument("--engine", choices=("gvisor", "qemu"), default="gvisor")
    args = parser.parse_args()
    numbers = asyncio.run(measure(args.turns, args.rounds, args.heap, args.change, args.engine))
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>22} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
