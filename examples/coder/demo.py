"""The demo: a coding agent whose sandbox, server and database are killed on the way, and who finishes its work.

`make demo`, as root. With MODEL=openai:NAME or MODEL=anthropic:NAME and the provider's key in the environment a real
model works; else a scripted one, at no cost. Exit status 0 only if the check at the end holds; the last line is JSON.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rethaw.model.durations import human
from rethaw.model.errors import RethawError
from rethaw.testing import processes
from rethaw.testing.server import RunningServer

HERE = Path(__file__).parent
AGENT = "examples/coder/agent.py"
GOAL = "Write a tiny HTTP server that counts its requests in memory, with a test. Run both and show me."
MODEL = os.environ.get("MODEL", "")
out = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("coder_script", HERE / "script.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step(number: int, text: str) -> None:
    out.print(f"\n[bold]{number}. {text}[/bold]")


def say(text: str) -> None:
    out.print(f"   {text}", soft_wrap=True)


TOLD = {
    "exchange.adopted": "asked again, given the answer to the first",
    "exchange.served": "its answer came from the log, not from the model",
    "exchange.reissued": "cut off by the crash, called once more",
    "exchange.torn": "cut off by the crash in the middle of its answer",
    "exchange.orphaned": "not needed any more: the agent took another path",
}


class Demo:
    """One run. `close` leaves nothing behind, at whatever point it comes."""

    def __init__(self) -> None:
        self.scripted = not MODEL
        self.script = load_script()
        self.work = Path(tempfile.mkdtemp(prefix="rethaw-demo-"))
        self.provider: subprocess.Popen[str] | None = None
        self.server: RunningServer | None = None
        self.session = ""
        self.seen = 0  # newest event whose output was shown
        self.shown = ""  # what the agent wrote
        self.inside = False  # a line of the agent's that has not ended
        self.told = False  # that an image is being made
        self.started = time.monotonic()

    # ------------------------------------------------------------ parts

    def start_provider(self) -> dict[str, Any]:
        """The scripted model, as a process of its own; what rethaw.toml says about it."""
        command = [sys.executable, "-m", "rethaw.testing.provider", "--script", str(HERE / "script.py")]
        command += ["--journal", str(self.work / "calls.jsonl")]
        self.provider = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.provider.stdout is not None
        url = json.loads(self.provider.stdout.readline())["url"]
        return {"openai": {"base_url": url, "key": "none", "auth": "bearer", "format": "openai"}}

    def start_server(self) -> RunningServer:
        providers = self.start_provider() if self.scripted else {}
        # Images are kept from run to run: they are the same each time and take a minute to build.
        images = Path(os.environ.get("RETHAW_TEST_IMAGES") or HERE.parent.parent / ".rethaw" / "images")
        self.server = RunningServer(providers=providers, images=images)
        return self.server.start()

    def rethaw(self, *args: str, timeout_s: float = 600.0) -> str:
        """A `rethaw` command, shown as a reader would type it; its standard output."""
        assert self.server is not None
        shown = " ".join(f"'{a}'" if " " in a or "{" in a else a for a in args if a != "--json")
        if self.session:
            shown = shown.replace(self.session, self.session[:8])
        out.print(f"   $ rethaw {shown}", markup=False, style="dim", soft_wrap=True)
        return self.server.cli(*args, timeout_s=timeout_s, cwd=HERE.parent.parent).stdout

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """Events of the line that a reader sees."""
        assert self.server is not None
        path = f"/v1/sessions/{self.session}/events?after={after}&limit=1000"
        found: list[dict[str, Any]] = self.server.request("GET", path)["events"]
        return found

    def view(self) -> dict[str, Any]:
        assert self.server is not None
        found: dict[str, Any] = self.server.request("GET", f"/v1/sessions/{self.session}")
        return found

    def show_output(self) -> None:
        """What the agent wrote since the last look."""
        for event in self.events(self.seen):
            self.seen = max(self.seen, event["seq"])
            if event["type"] == "output":
                text = base64.urlsafe_b64decode(event["body"]).decode(errors="replace")
                self.shown += text
                for part in text.splitlines(keepends=True):
                    fresh = "" if self.inside else "   [cyan]|[/cyan] "
                    out.print(fresh, end="")
                    out.print(part.rstrip("\n"), end="", markup=False, style="cyan", soft_wrap=True)
                    self.inside = not part.endswith("\n")
                    if not self.inside:
                        out.print()

    def end_line(self) -> None:
        if self.inside:
            out.print()
            self.inside = False

    def until(self, what: str, condition: Callable[[], Any], timeout_s: float = 300.0) -> Any:
        """Show the agent's output until `condition()` holds; its value."""
        begun = time.monotonic()
        end = begun + (timeout_s if self.scripted else 1800)
        while time.monotonic() < end:
            self.show_output()
            if value := condition():
                self.end_line()
                return value
            state = self.view()
            if state["state"] in ("created", "queued", "starting") and not self.told and time.monotonic() > begun + 3:
                self.told = True
                say("making the agent's image: Debian with python3, git and the model's client (once, a minute)")
            if state["state"] in ("failed", "cancelled"):
                raise RethawError(f"the session {state['state']} ({state['reason']}): {state['detail']}")
            time.sleep(0.05)
        raise RethawError(f"waited for: {what}; it did not come (session {self.session})")

    # ------------------------------------------------------------ the five steps

    def run(self) -> bool:
        out.print("[bold]Rethaw: an agent that survives anything[/bold]")
        say(f"model: {MODEL or 'scripted (set MODEL=openai:… or anthropic:… and a key for a real one)'}")
        t0 = time.monotonic()
        server = self.start_server()
        say(f"server and PostgreSQL are up after {human(time.monotonic() - t0)}")
        answer = json.loads(self.rethaw("run", "-d", f"{AGENT}::coder", "--goal", GOAL, "--json"))
        self.session = answer["id"]

        self.kill_sandbox(server)
        self.suspended(server)
        self.kill_everything(server)
        self.approve()
        return self.report(server)

    def kill_sandbox(self, server: RunningServer) -> None:
        def in_the_middle() -> bool:
            """The dev server runs, and an answer of the model is on its way to the agent."""
            events = self.events()
            asked = [e["data"]["exchange"] for e in events if e["type"] == "exchange.requested"]
            done = {e["data"]["exchange"] for e in events if e["type"] in ("exchange.completed", "exchange.failed")}
            released = {e["data"]["exchange"] for e in events if e["type"] == "exchange.released"}
            if self.scripted:
                return "somebody" in self.shown
            return "[start_server]" in self.shown and bool(asked) and asked[-1] in released - done

        step(1, "Kill the sandbox in the middle of a turn")
        self.until("an answer of the model after the dev server's start", in_the_middle)
        pids = [box.pid for box in server.sandboxes()]
        self.rethaw("crash", self.session, "sandbox")
        restored = self.until("the restore", lambda: self.latest("snapshot.restored"))
        gone = all(not processes.alive(p) for p in pids)
        say(
            f"SIGKILL to sandbox {', '.join(map(str, pids))} ({'gone' if gone else 'NOT GONE'}); it goes on from its last "
            f"model call, {restored['data'].get('resume_ms', 0):.0f} ms for the restore"
        )

    def suspended(self, server: RunningServer) -> None:
        step(2, "A person must approve: the agent is suspended, nothing of it runs")
        self.until("the suspension", lambda: self.view()["state"] == "suspended")
        processes.wait_until(lambda: not server.sandboxes(), 20, "the end of the sandbox")
        stored = self.latest("snapshot.created")["data"]
        say(f"no process of it is left; its last snapshot takes {stored['stored_bytes'] / 2**20:.1f} MiB on disk")
        for line in self.rethaw("why", self.session).splitlines():
            out.print(f"     {line}", markup=False, soft_wrap=True)

    def kill_everything(self, server: RunningServer) -> None:
        step(3, "Kill the server and its PostgreSQL, start them again")
        postmaster = server.postgres_pid()
        victims = [server.pid, *processes.descendants(postmaster)]
        for pid in victims:
            processes.kill(pid)
        server.kill9()
        processes.wait_until(lambda: not any(processes.alive(p) for p in victims), 20, "their end")
        say(f"SIGKILL to server {victims[0]} and to PostgreSQL {postmaster} with its {len(victims) - 2} processes")
        t0 = time.monotonic()
        server.restart()
        say(f"up again after {human(time.monotonic() - t0)}; the session is {self.view()['state']}")

    def approve(self) -> None:
        step(4, "Approve: the agent resumes, its dev server still has its count")
        approved = 0

        def finished() -> bool:
            nonlocal approved
            asked = [e for e in self.events() if e["type"] == "wait.opened" and e["data"].get("name") == "approval"]
            if len(asked) > approved:
                approved = len(asked)
                self.end_line()
                self.rethaw("signal", self.session, "approval", '{"approved": true}')
            return bool(self.view()["state"] == "completed")

        self.until("the agent's answer", finished)

    def latest(self, kind: str) -> Any:
        return next((e for e in reversed(self.events()) if e["type"] == kind), None)

    # ------------------------------------------------------------ the account

    def report(self, server: RunningServer) -> bool:
        step(5, "What happened")
        lines = self.rethaw("events", self.session, "--json", "--all-lines").splitlines()
        events: list[dict[str, Any]] = [json.loads(line) for line in lines if line.startswith("{")]
        out.print(timeline(events))

        def of(kind: str) -> list[dict[str, Any]]:
            return [e["data"] for e in events if e["type"] == kind]

        upstream = len(of("exchange.upstream"))
        made = int(count(self.work / "calls.jsonl")) if self.scripted else upstream
        on_path = {
            e["data"]["exchange"]
            for e in events
            if e["type"] in ("exchange.requested", "exchange.adopted") and not e["superseded"]
        }
        needed = self.script.TURNS if self.scripted else len(on_path)
        gapless = [e["seq"] for e in events] == list(range(1, len(events) + 1))
        emitted = [e for e in events if e["type"] == "emitted" and e["data"].get("name") == "files"]
        files: dict[str, str] = json.loads(base64.urlsafe_b64decode(emitted[-1]["body"]))["sha256"] if emitted else {}
        as_expected = files == self.script.SHA256 if self.scripted else bool(files)
        answer = server.request("GET", f"/v1/sessions/{self.session}/result")["result"]
        kept_count = answer.startswith("I made a server") if self.scripted else True
        snapshots = of("snapshot.created")
        restores = [r.get("resume_ms") for r in of("snapshot.restored")]
        ok = (
            made == needed == len(on_path) == upstream and gapless and as_expected and kept_count and len(restores) >= 2
        )

        def p50(key: str) -> float:
            return round(statistics.median(s[key] for s in snapshots), 1)

        say(f"model calls made {made}, needed {needed}: {verdict(made == needed == upstream)}")
        say(f"{len(events)} events, gapless: {verdict(gapless)}")
        say(f"files as expected ({', '.join(sorted(files)) or 'none'}): {verdict(as_expected)}")
        say(f"the dev server kept its count: {verdict(kept_count)}")
        say(f"agent: {answer}")
        numbers = {
            "ok": ok,
            "model": MODEL or "scripted",
            "model_calls_made": made,
            "model_calls_needed": needed,
            "events": len(events),
            "gapless": gapless,
            "files_as_expected": as_expected,
            "dev_server_kept_count": kept_count,
            "snapshots": len(snapshots),
            "paused_ms_p50": p50("paused_ms"),
            "durable_ms_p50": p50("durable_ms"),
            "stored_bytes": sum(s["stored_bytes"] for s in snapshots),
            "restores": len(restores),
            "resume_ms": restores,
            "seconds": round(time.monotonic() - self.started, 1),
        }
        self.close()
        out.file.write(json.dumps(numbers) + "\n")
        out.file.flush()
        return ok

    def close(self) -> None:
        """End every process and remove every file of this run."""
        if self.server is not None:
            self.server.close()
        if self.provider is not None:
            self.provider.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.provider.wait(10)
            self.provider.kill()
        shutil.rmtree(self.work, ignore_errors=True)


def verdict(holds: bool) -> str:
    return "[green]holds[/green]" if holds else "[red]DOES NOT HOLD[/red]"


def count(journal: Path) -> int:
    """Calls that the scripted provider received."""
    return sum(json.loads(line)["what"] == "call" for line in journal.read_text().splitlines())


def timeline(events: list[dict[str, Any]]) -> Table:
    """Exchanges, snapshots, restores and states, one row each."""
    table = Table("at", "seq", "what", "", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    start = parse_time(events[0]["at"])
    number = 0
    names: dict[str, int] = {}
    for e in events:
        kind, data = e["type"], e["data"]
        text = ""
        if kind == "exchange.requested":
            number += 1
            names[data["exchange"]] = number
        call = f"model call {names.get(data.get('exchange', ''), 0)}"
        if kind == "exchange.completed":
            tokens = f"{data.get('input_tokens')} tokens in, {data.get('output_tokens')} out"
            row = (call, tokens if data.get("status") == 200 else f"status {data.get('status')}")
        elif kind in TOLD:
            row = (call, f"[yellow]{TOLD[kind]}[/yellow]")
        elif kind == "snapshot.created":
            text = f"paused {data['paused_ms']:.0f} ms, durable after {data['durable_ms']:.0f} ms"
            row = (f"snapshot ({data['why']})", f"{text}, {data['stored_bytes'] / 2**20:.1f} MiB stored")
        elif kind == "snapshot.restored":
            row = ("[green]restored[/green]", f"in {data.get('resume_ms', 0):.0f} ms")
        elif kind == "session.crashed":
            row = ("[red]crash[/red]", f"{data.get('reason')}: {data.get('detail') or ''}")
        elif kind == "session.state":
            row = (f"[bold]{data['state']}[/bold]", data["reason"] if data.get("reason", "none") != "none" else "")
        elif kind == "signal.received":
            row = ("signal", data.get("name", ""))
        else:
            continue
        style = "dim" if e["superseded"] else None
        table.add_row(f"{parse_time(e['at']) - start:6.2f} s", str(e["seq"]), *row, style=style)
    return table


def parse_time(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    if os.geteuid() != 0:
        out.print("The demo runs sandboxes and must be root: sudo make demo")
        return 2
    signal.signal(signal.SIGTERM, stop)
    demo = Demo()
    try:
        return 0 if demo.run() else 1
    except KeyboardInterrupt:
        out.print("\nStopped.")
        return 130
    except RethawError as error:
        out.print(f"\n[red]{error}[/red]", highlight=False)
        if demo.server is not None:
            out.print(f"The end of the server's log:\n{demo.server.log_tail()}", markup=False, style="dim")
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
        demo.close()


if __name__ == "__main__":
    sys.exit(main())
