"""From key to echo: `python -m benchmarks.terminal --json`, as root; needs runsc.

`rethaw attach` in a real terminal to a shell in a session, joined to a real server: `echo_ms`, from a key written into this
terminal until its echo can be read there. It passes the command, a WebSocket, the server, the channel into the sandbox, the
terminal there, and all the way back. Keys come one at a time, `--pause` seconds apart, as from a person.

`raw_echo_ms`: the same keys in a pseudo-terminal of this machine with `sh` in it, in turns in the same run; `echo_over_raw`
is the ratio of the medians. `woken_ms`: from a key for a suspended session until its echo, `attach_ms`: from the start of
`rethaw attach` until the screen is drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from rethaw.testing import processes
from rethaw.testing.server import RunningServer

_LONGEST_S = 60.0


class Keys:
    """A program in a terminal."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.started = time.perf_counter()
        self.fd, slave = pty.openpty()
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        os.close(slave)

    def until(self, seen: bytes) -> float:
        """Milliseconds until the output has `seen`."""
        began, got = time.perf_counter(), b""
        while seen not in got:
            if not select.select([self.fd], [], [], _LONGEST_S)[0]:
                raise RuntimeError(f"{seen!r} did not come within {_LONGEST_S:g} s, but {got[-200:]!r}")
            got += os.read(self.fd, 65536)
        return (time.perf_counter() - began) * 1000

    def echo(self, key: bytes) -> float:
        """Milliseconds from `key` to its echo."""
        os.write(self.fd, key)
        return self.until(key)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self.fd)


@contextlib.contextmanager
def keys(command: list[str], env: dict[str, str]) -> Iterator[Keys]:
    made = Keys(command, env)
    try:
        yield made
    finally:
        made.close()


def attach(server: RunningServer, session: str) -> list[str]:
    return [sys.executable, "-m", "rethaw.cli.main", "attach", session]


def quantile(times: list[float], part: float) -> float:
    return round(sorted(times)[min(len(times) - 1, int(len(times) * part))], 2)


def measure(rounds: int, pause_s: float, wakes: int, engine: str) -> dict[str, Any]:
    with RunningServer() as server:
        command = ("run", "-dit", "--image", "base", "--engine", engine, "-e", "PS1=$ ", "--", "sh")
        session = server.cli(*command).stdout.strip()
        env = {**server.env, "TERM": "xterm-256color", "PS1": "$ "}
        through, raw, woken, drawn = [], [], [], []
        with keys(attach(server, session), env) as here, keys(["sh"], env) as plain:
            here.until(b"$")
            plain.until(b"$ ")
            for number in range(rounds):
                key = b"abcdefgh"[number % 8 : number % 8 + 1]
                time.sleep(pause_s)
                through.append(here.echo(key))
                raw.append(plain.echo(key))
                if number % 60 == 59:  # short of what a line may have
                    for one in (here, plain):
                        os.write(one.fd, b"\n")
                        one.until(b"$ ")
            for _ in range(wakes):
                server.request("POST", f"/v1/sessions/{session}/suspend", {})
                processes.wait_until(lambda: state(server, session) == "suspended", 60, "the suspension")
                time.sleep(0.5)
                woken.append(here.echo(b"w"))
        for _ in range(wakes):
            with keys(attach(server, session), env) as again:
                again.until(b"$")
                drawn.append((time.perf_counter() - again.started) * 1000)
        server.request("POST", f"/v1/sessions/{session}/cancel", {"now": True})
    p50 = statistics.median(through)
    return {
        "engine": engine,
        "echo_ms_p50": round(p50, 2),
        "echo_ms_p99": quantile(through, 0.99),
        "raw_echo_ms_p50": round(statistics.median(raw), 3),
        "raw_echo_ms_p99": quantile(raw, 0.99),
        "echo_over_raw": round(p50 / statistics.median(raw), 1),
        "woken_ms_p50": round(statistics.median(woken), 1),
        "attach_ms_p50": round(statistics.median(drawn), 1),
        "keys": rounds,
    }


def state(server: RunningServer, session: str) -> str:
    return str(server.request("GET", f"/v1/sessions/{session}")["state"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.terminal", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--rounds", type=int, default=500, help="keys")
    parser.add_argument("--pause", type=float, default=0.03, help="seconds between keys")
    parser.add_argument("--wakes", type=int, default=5)
    parser.add_argument("--engine", choices=("gvisor", "qemu"), default="gvisor")
    args = parser.parse_args()
    numbers = measure(args.rounds, args.pause, args.wakes, args.engine)
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>22} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
