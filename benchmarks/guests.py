"""What does a freeze cost programs that nobody changed? `python -m benchmarks.guests`, as root; needs runsc and, the first time, PyPI.

The examples of docs/guides, each with the model's side that lies beside it, on a server of its own. `--only NAME` takes one, and may be
given again; `--table` prints the rows of docs/guides/index.md, `--write` puts them there.

`pause_ms_p50`: quiesce to thaw, of the snapshots at model calls. `first_stored_mib`: what the first snapshot of the first session
stores. `turn_stored_mib_p50`: what those at later model calls store. All from sessions that nothing disturbs. `resume_ms_p50`: of
sessions that are suspended in the middle of each model call and resumed once its answer is in the log: from the log's first word of
resuming until the program's next output, model call or end is in the log, so that what it does with the answer is in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.freeze import MIB, at

from rethaw.testing import processes
from rethaw.testing.model import ScriptedModel
from rethaw.testing.provider import ProviderRequest, Reply, load_script
from rethaw.testing.reply import answer
from rethaw.testing.server import RunningServer

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "examples/guides"
PAGE = ROOT / "docs/guides/index.md"
THINKS_S = 0.6  # what the model takes for an answer, so that a snapshot is taken in its shadow
_FINAL = ("completed", "failed", "cancelled")
_SIGNS = ("output", "exchange.requested", "attempt.exited", "session.result")


@dataclass(frozen=True)
class Guest:
    """`words`: what follows `rethaw run -d`, in the root of the repository; else `start` gives a session's id. `script`: the model's
    side, a file under examples/guides."""

    script: str
    words: Sequence[str] = ()
    start: Callable[[RunningServer], str] | None = None


def agent(name: str) -> Guest:
    return Guest(f"{name}/script.py", [f"examples/guides/{name}/agent.py"])


def shell(name: str, file: str) -> Guest:
    return Guest(f"{name}/script.py", ["--image", "base", "--", "bash", "-c", (GUIDES / name / file).read_text()])


# Name of the guide: how it is started. In the order of the table.
GUESTS: dict[str, Guest] = {
    "claude-code": agent("claude-code"),
    "codex": agent("codex"),
    "openai-agents": agent("openai-agents"),
    "anthropic": agent("anthropic"),
    "langgraph": agent("langgraph"),
    "smolagents": agent("smolagents"),
    "jupyter": agent("jupyter"),
    "node": agent("node"),
    "chromium": agent("chromium"),
    "shell": shell("shell", "work.sh"),
    "sqlite": agent("sqlite"),
}


class Model(ScriptedModel):
    """Says what `script` says: after a while, or, while `hold` is set, once `let_go` is called for that call."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self._says = script
        self.hold = False
        self.open = threading.Event()
        self.script(self._paced)

    def _paced(self, request: ProviderRequest) -> Any:
        async def reply() -> Reply:
            if not self.hold:
                await asyncio.sleep(THINKS_S)
            while self.hold and not self.open.is_set():  # noqa: ASYNC110 - set by another thread
                await asyncio.sleep(0.01)
            return await answer(self._says, request)

        return reply()


class Bench:
    def __init__(self, server: RunningServer, model: Model, guest: Guest) -> None:
        self.server = server
        self.model = model
        self.guest = guest

    def start(self) -> str:
        if self.guest.start is not None:
            return self.guest.start(self.server)
        done = self.server.cli("run", "-d", "--json", "--idle-suspend", "never", *self.guest.words, cwd=ROOT)
        return str(json.loads(done.stdout)["id"])

    def view(self, session: str) -> dict[str, Any]:
        found: dict[str, Any] = self.server.request("GET", f"/v1/sessions/{session}")
        if found["state"] in ("failed", "cancelled"):
            raise RuntimeError(f"{found['state']}: {found['reason']} {found['detail']}\n{self.server.log_tail()}")
        return found

    def alone(self) -> list[dict[str, Any]]:
        """Events of a session that nothing disturbs."""
        self.model.hold = False
        session = self.start()
        processes.wait_until(lambda: _slowly(self.view(session)["state"] in _FINAL), 600, "the end of the session")
        return self.server.events(session)

    def frozen(self) -> list[dict[str, Any]]:
        """Events of a session that is suspended in the middle of every model call."""
        self.model.hold = True
        self.model.open.clear()
        session, calls = self.start(), 0
        while True:
            processes.wait_until(lambda n=calls: self._asks_or_ended(session, n), 600, "a model call")
            if self.view(session)["state"] in _FINAL:
                return self.server.events(session)
            self.server.request("POST", f"/v1/sessions/{session}/suspend", {})
            processes.wait_until(lambda: _slowly(self.view(session)["state"] == "suspended"), 60, "the suspension")
            self.model.open.set()
            processes.wait_until(lambda: _slowly(not self._open(session)), 60, "the answer in the log")
            time.sleep(0.5)  # the sandbox created ahead is filled again in the background, as it would be in life
            calls = len(self._of(session, "exchange.requested"))
            self.model.open.clear()
            self.server.request("POST", f"/v1/sessions/{session}/resume", {})

    def _of(self, session: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.server.events(session) if e["type"] == kind]

    def _open(self, session: str) -> set[str]:
        ended = {e["data"]["exchange"] for k in ("completed", "failed") for e in self._of(session, f"exchange.{k}")}
        return {e["data"]["exchange"] for e in self._of(session, "exchange.requested")} - ended

    def _asks_or_ended(self, session: str, calls: int) -> bool:
        """A further call is open, and its snapshot is there."""
        events = self.server.events(session)
        asked = [e["seq"] for e in events if e["type"] == "exchange.requested"]
        saved = [e["seq"] for e in events if e["type"] == "snapshot.created"]
        ready = len(asked) > calls and bool(saved) and saved[-1] > asked[-1]
        return _slowly(ready or self.view(session)["state"] in _FINAL)


def _slowly(found: bool) -> bool:
    if not found:
        time.sleep(0.2)  # asking takes the CPU that is measured
    return found


def resumes_of(events: list[dict[str, Any]]) -> list[float]:
    """Milliseconds from each `resuming` to the program's next sign of life."""
    found: list[float] = []
    since: float | None = None
    for event in events:
        if event["type"] == "session.state" and event["data"]["state"] == "resuming":
            since = at(event)
        elif since is not None and event["type"] in _SIGNS:
            found.append(at(event) - since)
            since = None
    return found


def measure(guest: Guest, runs: int) -> dict[str, Any]:
    """`runs` sessions that nothing disturbs, and as many that are frozen in every call."""
    model = Model(load_script(str(GUIDES / guest.script)))
    try:
        with RunningServer(providers=model.settings()) as server:
            bench = Bench(server, model, guest)
            alone = [bench.alone() for _ in range(runs)]
            frozen = [bench.frozen() for _ in range(runs)]
    finally:
        model.close()
    saved = [
        [e["data"] for e in one if e["type"] == "snapshot.created" and e["data"]["why"] == "exchange"] for one in alone
    ]
    resumed = [ms for one in frozen for ms in resumes_of(one)]
    return {
        "pause_ms_p50": _p50([s["paused_ms"] for one in saved for s in one]),
        "first_stored_mib": round(saved[0][0]["stored_bytes"] / MIB, 2),
        "turn_stored_mib_p50": round(statistics.median([s["stored_bytes"] for one in saved for s in one[1:]]) / MIB, 2),
        "resume_ms_p50": _p50(resumed),
        "calls": len(saved[0]),
        "resumes": len(resumed),
    }


def _p50(values: list[float]) -> float:
    return round(statistics.median(values), 1)


# ---------------------------------------------------------------- the table


def rows(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of the table in docs/guides/index.md."""
    return [
        f"| [{name}]({name}.md) | {n['pause_ms_p50']:.0f} | {n['first_stored_mib']:.1f} | "
        f"{n['turn_stored_mib_p50']:.1f} | {n['resume_ms_p50']:.0f} |"
        for name, n in found.items()
    ]


def written(page: str, found: dict[str, dict[str, Any]]) -> str:
    """`page` with the rows of `found` in place of theirs, those of other programs as they are."""
    for name, line in zip(found, rows(found), strict=True):
        pattern = re.compile(rf"^\| \[{re.escape(name)}\]\({re.escape(name)}\.md\) \|.*$", re.MULTILINE)
        if not pattern.search(page):
            raise ValueError(f"docs/guides/index.md has no row for {name!r}")
        page = pattern.sub(lambda _, line=line: line, page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guests", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(GUESTS), help="may be given again")
    parser.add_argument("--runs", type=int, default=3, help="sessions of each kind")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--table", action="store_true", help="the rows of the table in place of JSON")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/guides/index.md as well")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name in args.only or GUESTS:
        if not args.json:
            print(f"{name}...", file=sys.stderr, flush=True)
        found[name] = measure(GUESTS[name], args.runs)
    if args.write:
        PAGE.write_text(written(PAGE.read_text(), found))
    sys.stdout.write("\n".join(rows(found)) + "\n" if args.table else json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
