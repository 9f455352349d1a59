"""How long until an agent works? `python -m benchmarks.start --json`, as root; needs runsc and, the first time, PyPI.

An agent that imports `openai-agents`, from the request that starts its session until its first output is durable in the log:
`cold_ms` boots its image (built before) and imports everything; `template_ms` begins in the agent's own template, where that is
done already (`template="auto"`). `host_ms`: `python agent.py` with the same imports on the host, from a virtual environment with
the same interpreter version, until its first output. All in turns in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.fork import one_answer

from rethaw.testing import processes
from rethaw.testing.chaos.run import code_archive
from rethaw.testing.server import RunningServer, image_cache

PACKAGE = "openai-agents"
AGENT = """
import agents

def bench(ctx):
    print("ready", agents.__name__, flush=True)
"""
PLAIN = "import agents; print('ready', agents.__name__, flush=True)\n"


def host_python() -> Path:
    """The interpreter of a virtual environment with the package, made once."""
    place = image_cache() / "bench-start-venv"
    python = place / "bin/python"
    if not (place / "done").exists():
        subprocess.run(["/usr/bin/python3", "-m", "venv", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
        (place / "done").touch()
    return python


def on_host(python: Path, program: Path) -> float:
    """Milliseconds from the start of the process to its first line."""
    started = time.perf_counter()
    with subprocess.Popen([python, program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = (time.perf_counter() - started) * 1000
    if not line.startswith(b"ready"):
        raise RuntimeError(f"{program} said {line!r}")
    return took


def one(server: RunningServer, agent: dict[str, Any]) -> float:
    """Milliseconds from the request to the first output of a session."""
    started = time.time() * 1000
    session = server.request("POST", "/v1/sessions", {"agent": agent, "args": {}}, timeout_s=120)["id"]
    # Asking while it starts would take the CPU that is measured.
    server.request("GET", f"/v1/sessions/{session}/result?wait_s=120", timeout_s=150)
    answered = one_answer(server, session)
    if answered is None:
        view = server.request("GET", f"/v1/sessions/{session}")
        raise RuntimeError(f"no output: {view['state']} {view['detail']}\n{server.log_tail()}")
    return answered - started


def templates_ready(server: RunningServer) -> bool:
    found = server.request("GET", "/v1/templates")["templates"]
    return bool(found) and all(t["snapshot"] is not None for t in found)


def measure(rounds: int, engine: str) -> dict[str, Any]:
    python = host_python()
    with RunningServer() as server:
        digest = server.request("POST", "/v1/blobs", code_archive(agent=AGENT.encode()))["digest"]
        cold: dict[str, Any] = {
            "name": "start", "entry": "agent.py::bench", "code": digest, "image": {"pip": [PACKAGE]}, "engine": engine,
        }  # fmt: skip
        warm = {**cold, "template": "auto"}
        program = server.root / "agent.py"
        program.write_text(PLAIN)
        one(server, cold)  # builds the image
        one(server, warm)  # makes the template
        processes.wait_until(lambda: templates_ready(server), 120, "the template to be ready")
        on_host(python, program)
        times: dict[str, list[float]] = {"cold": [], "template": [], "host": []}
        for _ in range(rounds):
            time.sleep(1.0)  # a sandbox created ahead is filled again in the background, as it would be in life
            times["template"].append(one(server, warm))
            time.sleep(1.0)
            times["cold"].append(one(server, cold))
            times["host"].append(on_host(python, program))
    p50 = {name: round(statistics.median(found), 1) for name, found in times.items()}
    return {
        "engine": engine,
        **{f"{name}_ms_p50": value for name, value in p50.items()},
        "template_over_host": round(p50["template"] / p50["host"], 3),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engine", choices=("gvisor", "qemu"), default="gvisor")
    args = parser.parse_args()
    numbers = measure(args.rounds, args.engine)
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>22} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
