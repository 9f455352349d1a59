"""How long does an answer take? `python -m benchmarks.sdk --json`, as root; needs runsc.

A message is sent with the SDK to an agent that echoes it (`for m in ctx.messages(): ctx.send(m.payload)`, no model), until the
echo is in the client's hands, one at a time, half a second apart: a snapshot that a message asked for is over when the next one
comes.

`running_ms`: to an agent with `durability="relaxed"`, whose messages wait for no snapshot. `live_ms`: to one with the default
durability, until the echo is seen as an event of the session's stream, before it is safe from a crash. `published_ms`: until it is in
that one's outbox, safe. `frozen_ms`: to the relaxed agent while it is suspended. `raw_ms`, in the same run: a message through the
same server's HTTP and PostgreSQL and no agent, which is a POST to the inbox and the read of it that follows.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import threading
import time
from typing import Any

from rethaw import Client, Session
from rethaw.model.enums import Durability, State
from rethaw.model.types import AgentSpec
from rethaw.testing import processes
from rethaw.testing.chaos.run import code_archive
from rethaw.testing.server import RunningServer

APART_S = 0.5
AGENT = """
def echo(ctx):
    for message in ctx.messages():
        ctx.send(message.payload)
"""


def started(client: Client, code: str, durability: Durability, engine: Any, idle: float | None) -> Session[Any]:
    spec = AgentSpec(
        name="echo", entry="agent.py::echo", code=code, durability=durability, engine=engine, idle_suspend_s=idle
    )
    session = client.sessions.start(spec)
    echoed(session, 0)
    return session


def spaced(session: Session[Any], count: int) -> list[float]:
    """`echoed` of 1 to `count`, half a second apart."""
    times: list[float] = []
    for number in range(1, count + 1):
        time.sleep(APART_S)
        times.append(echoed(session, number))
    return times


def echoed(session: Session[Any], number: int) -> float:
    """Milliseconds from sending `number` until its echo is in the outbox."""
    begun = time.perf_counter()
    session.send(number)
    while True:
        found = session.outbox(after=number, wait="60s")
        if found and found[-1].payload == number:
            return (time.perf_counter() - begun) * 1000


def seen_live(session: Session[Any], first: int, count: int) -> list[float]:
    """Milliseconds from sending each number until its echo is an event of the stream."""
    seen: queue.Queue[tuple[Any, float]] = queue.Queue()

    def follow() -> None:
        for event in session.events(after=session.refresh().last_seq, follow=True, types=["message.sent"]):
            seen.put((json.loads(event.body or b"null"), time.perf_counter()))
            if seen.qsize() and event.body == str(first + count).encode():
                return

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    session.send(first)
    seen.get(timeout=60)  # the stream is open
    times: list[float] = []
    for number in range(first + 1, first + 1 + count):
        time.sleep(APART_S)
        begun = time.perf_counter()
        session.send(number)
        while (found := seen.get(timeout=60))[0] != number:
            pass
        times.append((found[1] - begun) * 1000)
    reader.join(10)
    return times


def raw(session: Session[Any], count: int) -> list[float]:
    """Milliseconds of a message to a session that does not run, and of reading the inbox."""
    times: list[float] = []
    for number in range(count):
        begun = time.perf_counter()
        session.send(number)
        session.client.sessions.inbox(session.id)
        times.append((time.perf_counter() - begun) * 1000)
    return times


def suspended(session: Session[Any]) -> None:
    processes.wait_until(lambda: session.refresh().state is State.SUSPENDED, 60, "the agent to be suspended")
    time.sleep(1.0)  # a sandbox created ahead is filled again in the background, as it would be in life


def measure(messages: int, wakes: int, engine: str) -> dict[str, Any]:
    with RunningServer() as server, Client(server.url, server.token) as client:
        code = client.blobs.put(code_archive(agent=AGENT.encode()))
        relaxed = started(client, code, Durability.RELAXED, engine, None)
        running = spaced(relaxed, messages)
        relaxed.cancel(now=True)
        safe = started(client, code, Durability.LOCAL, engine, None)
        published = spaced(safe, messages)
        live = seen_live(safe, messages + 1, messages)
        safe.cancel(now=True)
        sleeper = started(client, code, Durability.RELAXED, engine, 0.2)
        frozen: list[float] = []
        for n in range(1, wakes + 1):
            suspended(sleeper)
            frozen.append(echoed(sleeper, n))
        suspended(sleeper)
        sleeper.suspend()
        plain = raw(sleeper, messages)
    return {
        "engine": engine,
        "running_ms_p50": round(statistics.median(running), 1),
        "live_ms_p50": round(statistics.median(live), 1),
        "published_ms_p50": round(statistics.median(published), 1),
        "frozen_ms_p50": round(statistics.median(frozen), 1),
        "raw_ms_p50": round(statistics.median(plain), 1),
        "running_over_raw": round(statistics.median(running) / statistics.median(plain), 2),
        "messages": len(running),
        "wakes": len(frozen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdk", description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--messages", type=int, default=40)
    parser.add_argument("--wakes", type=int, default=10, help="messages to the suspended agent")
    parser.add_argument("--engine", choices=("gvisor", "qemu"), default="gvisor")
    args = parser.parse_args()
    numbers = measure(args.messages, args.wakes, args.engine)
    if not args.json:
        for name, value in numbers.items():
            sys.stdout.write(f"{name:>22} {value}\n")
    sys.stdout.write(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
