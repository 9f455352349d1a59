"""What do forks cost? `python -m benchmarks.fork --json`, as root; needs runsc.

An agent of about 50 MiB (Python with the `openai` client loaded) has made a model call and waits for a signal. It is forked
100 times with one request, each fork is signalled and answers once: `wall_s`, from the request until the last answer is
durable in the log. `fork_ms`: one fork at a time, from its request until its answer. `stored_kib_per_fork`: what a first
snapshot of a fork adds to the store once it has answered. `raw_clones_per_s`: plain `runsc create` and `runsc restore` of
the same program up to its answer, two at a time, in the same run; `clones_per_s` is forks by `wall_s`.

`--engine qemu` forks microVMs (say `--forks 10`: each takes a second or two of CPU without KVM). In place of the raw clones it
measures memory, as the kernel shares it out among processes (Pss): `cold_mib` of the machine that was booted,
`clone_mib` of a clone, all together by their number, and `clone_over_cold`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from benchmarks.freeze import answer, at, by_hand

from rethaw.testing import processes
from rethaw.testing.chaos.run import code_archive
from rethaw.testing.provider import ScriptedProvider
from rethaw.testing.server import RunningServer, image_cache

AGENT = """
import openai

def bench(ctx):
    client = openai.OpenAI()
    client.chat.completions.create(model="bench", messages=[{"role": "user", "content": "begin"}])
    number = ctx.wait("go").payload
    print("answer", number, flush=True)
    ctx.wait("stay")
"""


def one_answer(server: RunningServer, session: str) -> float | None:
    """When the session's answer was durable, in milliseconds since 1970."""
    for event in server.events(session):
        if event["type"] == "output":
            return at(event)
    return None


def forked(server: RunningServer, parent: str, count: int) -> list[str]:
    made = server.request("POST", f"/v1/sessions/{parent}/fork", {"n": count}, timeout_s=120)
    return [view["id"] for view in made["sessions"]]


def signal(server: RunningServer, session: str, number: int) -> None:
    server.request("POST", f"/v1/sessions/{session}/signals/go", {"payload": number})


def answers(server: RunningServer, sessions: list[str], timeout_s: float, every_s: float = 0.02) -> list[float]:
    """When each answered, by the log's clock. Asking takes the CPU that is measured."""
    found: dict[str, float] = {}

    def all_there() -> bool:
        for session in sessions:
            if session not in found and (when := one_answer(server, session)) is not None:
                found[session] = when
            elif session not in found:
                time.sleep(every_s)
                return False
        return True

    processes.wait_until(all_there, timeout_s, "the answers of all forks")
    return [found[session] for session in sessions]


def raw_clones_per_s(server: RunningServer, image: str, count: int) -> float:
    with by_hand((image_cache() / image / "rootfs").resolve()) as hand:
        say, hear = hand.begin("run", "bench-0", "-detach")
        hear.readline()
        say.write("0\n")
        hear.readline()
        saved = hand.work / "image"
        saved.mkdir()
        flags = ("-compression=none", "-exclude-committed-zero-pages", "-leave-running", f"-image-path={saved}")
        hand.runsc("checkpoint", *flags, "bench-0")

        def clone(n: int) -> tuple[IO[str], IO[str]]:
            say, hear = hand.begin("create", f"clone-{n:03d}")
            hand.runsc("restore", "-detach", f"-bundle={hand.bundle}", f"-image-path={saved}", f"clone-{n:03d}")
            say.write("hello\n")
            hear.readline()
            return say, hear  # a program whose pipes close ends

        started = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            ends = list(pool.map(clone, range(count)))
        wall = time.perf_counter() - started
        shutil.rmtree(saved)
        ends.clear()
    return count / wall


def memory_mib(server: RunningServer) -> list[float]:
    """Of each running sandbox of `server`, in MiB; what several map is shared out among them."""
    found: list[float] = []
    for box in server.sandboxes():
        line = next(x for x in Path(f"/proc/{box.pid}/smaps_rollup").read_text().splitlines() if x.startswith("Pss:"))
        found.append(int(line.split()[1]) / 1024)
    return found


def work(server: RunningServer, forks: int, single: int, engine: str) -> dict[str, Any]:
    digest = server.request("POST", "/v1/blobs", code_archive(agent=AGENT.encode()))["digest"]
    agent = {
        "name": "fork", "entry": "agent.py::bench", "code": digest, "idle_suspend_s": 600.0, "image": {"pip": ["openai"]},
        "memory_bytes": 256 << 20, "engine": engine,
    }  # fmt: skip
    parent = server.request("POST", "/v1/sessions", {"agent": agent, "args": {}})["id"]

    def suspended() -> bool:
        return server.request("GET", f"/v1/sessions/{parent}")["state"] == "suspended"

    def waiting() -> bool:
        return server.request("GET", f"/v1/sessions/{parent}")["state"] == "waiting"

    processes.wait_until(waiting, 300, "the agent to wait")
    cold = memory_mib(server)
    server.request("POST", f"/v1/sessions/{parent}/suspend", {})
    processes.wait_until(suspended, 60, "the agent to be suspended")
    times: list[float] = []
    for n in range(single):
        started = time.time() * 1000
        (fork,) = forked(server, parent, 1)
        signal(server, fork, n)
        times.append(answers(server, [fork], 60)[0] - started)
        server.request("POST", f"/v1/sessions/{fork}/cancel", {"now": True})
    started = time.time() * 1000
    made = forked(server, parent, forks)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: signal(server, item[1], item[0]), enumerate(made)))
    wall = (max(answers(server, made, 300, every_s=0.5)) - started) / 1000
    clones = memory_mib(server)
    stored: list[float] = []
    for fork in made[:20]:
        server.request("POST", f"/v1/sessions/{fork}/snapshots", {}, timeout_s=60)
        own = [s for s in server.request("GET", f"/v1/sessions/{fork}/snapshots")["snapshots"] if s["session"] == fork]
        stored.append(own[0]["stored_bytes"] / 1024)
    image = server.request("GET", f"/v1/sessions/{parent}/snapshots")["snapshots"][0]["image"]
    for fork in made:
        server.request("POST", f"/v1/sessions/{fork}/cancel", {"now": True})
    more: dict[str, Any]
    if engine == "gvisor":
        raw = raw_clones_per_s(server, image, 20)
        more = {"raw_clones_per_s": round(raw, 2), "clone_ratio": round(forks / wall / raw, 2)}
    else:
        clone = sum(clones) / len(clones)
        more = {"cold_mib": round(cold[0], 1), "clone_mib": round(clone, 1)}
        more["clone_over_cold"] = round(clone / cold[0], 3)
    return {
        "engine": engine,
        "forks": forks,
        "wall_s": round(wall, 2),
        "clones_per_s": round(forks / wall, 2),
        **more,
        "fork_ms_p50": round(statistics.median(times), 1),
        "fork_ms_p95": round(sorted(times)[int(len(times) * 0.95)], 1),
        "stored_kib_per_fork": round(statistics.median(stored), 1),
    }


async def measure(forks: int, single: int, engine: str) -> dict[str, Any]:
    async with ScriptedProvider(answer) as provider:
        settings = {"base_url": provider.url, "key": "k", "auth": "bearer", "format": "openai"}

        def run() -> dict[str, Any]:
            with RunningServer(providers={"openai": settings}) as server:
                return {**work(server, forks, single, engine), "model_calls": provider.count}

        return await asyncio.to_thread(run)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fork", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--forks", type=int, default=100)
    parser.add_argument("--single", type=int, default=20, help="forks one at a time")
    parser.add_argument("--engine", choices=("gvisor", "qemu"), default="gvisor")
    args = parser.parse_args()
    numbers = asyncio.run(measure(args.forks, args.single, args.engine))
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>22} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
