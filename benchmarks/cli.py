"""How long the command line takes to answer: `rethaw --help`, `rethaw ls` of a server with sessions, and what Python alone takes.

Goals on an idle machine: `help_ms_p50` at most 150, `ls_ms_p50` at most 250. Each command is a process of its own, and all of
them take turns, so that a busy machine is the same for all. `_cpu_ms_p50` is user and system time, `_ratio` the CPU time in
those of `python -c pass`.

sudo .venv/bin/python -m benchmarks.cli [--runs 20] [--sessions 50]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rethaw.testing.server import RunningServer

GOALS_MS = {"help": 150.0, "ls": 250.0}


def once(command: list[str], env: dict[str, str], cwd: Path) -> tuple[float, float]:
    """Wall and CPU milliseconds. Raises when it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=env, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall * 1000, cpu * 1000


def measure(server: RunningServer, runs: int) -> dict[str, object]:
    """Medians of `runs` of each, after one that is not counted."""
    program = Path(sys.executable).parent / "rethaw"
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "help": [str(program), "--help"],
        "ls": [str(program), "ls"],
        "ls_help": [str(program), "ls", "--help"],
    }
    wall: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            found = once(command, server.env, server.root)
            if run:
                wall[name].append(found[0])
                cpu[name].append(found[1])
    base = statistics.median(cpu["python"])
    out: dict[str, object] = {}
    for name in commands:
        out[f"{name}_ms_p50"] = round(statistics.median(wall[name]), 1)
        out[f"{name}_ms_min"] = round(min(wall[name]), 1)
        out[f"{name}_cpu_ms_p50"] = round(statistics.median(cpu[name]), 1)
        out[f"{name}_ratio"] = round(statistics.median(cpu[name]) / base, 1)
    out["goals_met"] = all(statistics.median(wall[name]) <= goal for name, goal in GOALS_MS.items())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--sessions", type=int, default=50, help="that `ls` lists; they wait in a paused queue")
    given = parser.parse_args()
    with RunningServer() as server:
        server.cli("queue", "set", "later", "--limit", "1")
        server.cli("queue", "pause", "later")
        for n in range(given.sessions):
            agent = {"name": f"agent-{n % 5}", "command": ["true"]}
            body = {"agent": agent, "args": {}, "options": {"queue": "later"}}
            server.request("POST", "/v1/sessions", body)
        load = os.getloadavg()[0]
        result = {"benchmark": "cli", "runs": given.runs, "sessions": given.sessions, "load_before": round(load, 2)}
        print(json.dumps({**result, **measure(server, given.runs)}))


if __name__ == "__main__":
    main()
