"""How long until a killed agent goes on, after 10, 100 and 1,000 turns? `python -m benchmarks.recovery --json`, as root.

An agent with an ever longer conversation; at each milestone its sandbox is killed with SIGKILL nine times, a turn
apart, while it waits for a signal and the node has a sandbox created ahead, as it has from a quarter of a second after
the last restore on (kills in quicker succession take the 100 ms more of making one). `recover_ms`: from the kill to the first byte the agent writes in its next life
(median of nine, by turns). `repeated_calls`: calls that reached the provider beyond one for each turn. `flatness`:
`recover_ms` at the last milestone by that at the first. Recovery reads one snapshot and the log's tail, whose lengths
do not grow with the turns, except for the conversation in the agent's own memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

from rethaw.model.errors import Unavailable
from rethaw.testing import processes
from rethaw.testing.chaos.run import code_archive
from rethaw.testing.provider import ProviderRequest, Reply, ScriptedProvider
from rethaw.testing.server import RunningServer

AGENT = b"""
import http.client, json, os, urllib.parse

def ask(messages):
    base = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
    connection = http.client.HTTPConnection(base.hostname, base.port)
    body = json.dumps({"model": "bench", "messages": messages})
    connection.request("POST", base.path + "/chat/completions", body, {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["choices"][0]["message"]

def bench(ctx, turns, stops):
    messages = []
    for turn in range(1, turns + 1):
        messages.append({"role": "user", "content": f"turn {turn}: " + "what next? " * 20})
        messages.append(ask(messages))
        print("turn", turn, flush=True)
        if turn in stops:
            ctx.wait(f"go-{turn}")
    return len(messages)
"""
KILLS = 9


def answer(request: ProviderRequest) -> Reply:
    return Reply("thinking about it, " * 10)


class Bench:
    def __init__(self, server: RunningServer, turns: int, stops: list[int]) -> None:
        self.server = server
        digest = server.request("POST", "/v1/blobs", code_archive(agent=AGENT))["digest"]
        agent = {"name": "recovery", "entry": "agent.py::bench", "code": digest, "idle_suspend_s": None}
        start = {"agent": agent, "args": {"turns": turns, "stops": stops}}
        self.session = server.request("POST", "/v1/sessions", start)["id"]

    def waits(self, turn: int) -> bool:
        """Whether the agent waits for the signal of this turn."""
        why = self.server.request("GET", f"/v1/sessions/{self.session}/why")
        if why["state"] in ("failed", "cancelled"):
            raise Unavailable(
                f"the session {why['state']}: {why['reason']} {why['detail']}", log=self.server.log_tail()
            )
        return any(w["name"] == f"go-{turn}" for w in why["waiting_for"])

    def last_seq(self) -> int:
        found: int = self.server.request("GET", f"/v1/sessions/{self.session}")["last_seq"]
        return found

    def ahead(self) -> bool:
        return any(processes.state_of(b.pid) == "T" for b in processes.gvisor(self.server.data_dir / "run"))

    def kill(self, turn: int) -> float:
        """Milliseconds from the kill to the agent's first output after it."""
        processes.wait_until(lambda: self.waits(turn), 1200, f"turn {turn}")
        processes.wait_until(self.ahead, 30, "a sandbox created ahead")
        (box,) = self.server.sandboxes()
        after = self.last_seq()
        start = time.monotonic()
        processes.kill(box.pid)

        def wrote() -> bool:
            path = f"/v1/sessions/{self.session}/events?after={after}&limit=200&types=output"
            return bool(self.server.request("GET", path)["events"])

        processes.wait_until(wrote, 60, "recovery")
        took = (time.monotonic() - start) * 1000
        processes.wait_until(lambda: self.waits(turn), 60, "the wait after recovery")
        self.server.request("POST", f"/v1/sessions/{self.session}/signals/go-{turn}", {"payload": None})
        return took


async def measure(milestones: list[int]) -> dict[str, Any]:
    stops = [m + k for m in milestones for k in range(KILLS)]
    turns = stops[-1] + 1
    async with ScriptedProvider(answer) as provider:
        settings = {"base_url": provider.url, "key": "k", "auth": "bearer", "format": "openai"}

        def run() -> dict[str, Any]:
            with RunningServer(providers={"openai": settings}) as server:
                bench = Bench(server, turns, stops)
                took = {m: [bench.kill(m + k) for k in range(KILLS)] for m in milestones}
                result = server.request("GET", f"/v1/sessions/{bench.session}/result?wait_s=60", timeout_s=90)
                if result["result"] != 2 * turns:
                    raise Unavailable(f"the agent returned {result}, not {2 * turns}")
            medians = {m: round(statistics.median(t), 1) for m, t in took.items()}
            return {
                "recover_ms": medians,
                "repeated_calls": provider.count - turns,
                "flatness": round(medians[milestones[-1]] / medians[milestones[0]], 2),
            }

        return await asyncio.to_thread(run)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--milestones", default="10,100,1000", help="turns, separated by commas")
    args = parser.parse_args()
    numbers = asyncio.run(measure([int(m) for m in args.milestones.split(",")]))
    if not args.json:
        for turns, ms in numbers["recover_ms"].items():
            sys.stdout.write(f"killed after {turns} turns, it went on after {ms} ms\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
