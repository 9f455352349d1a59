"""Real programs, frozen and killed in the middle of their model calls: each runs twice, once left alone and once disturbed, and
both must come to the same end, having asked the model the same, nothing twice.

    def test_mine(home: House) -> None:
        compare(home, guide("mine"))  # examples/guides/mine/agent.py with the model of examples/guides/mine/script.py
        compare(home, Program("other", start=cli("--image", "base", "--", "other"), script=by_turn([...])))
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any, Literal

from e2e_fixtures import House, Session, body, gapless, pretty

from rethaw.testing.provider import ProviderRequest, Reply, load_script
from rethaw.testing.reply import Script, answer

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "examples/guides"
BEGIN_S = 600.0  # until a program's first call: its image may have to be built
# Names that the provider makes up for each answer anew; equal ones stay equal.
IDS = r"\b(?:chatcmpl-|call_|toolu_|fc_|msg_|resp_|req_)[0-9a-f]{24}(?:\d\d)?(?![0-9a-f])"

Start = Callable[[House], Session]
Do = Literal["freeze", "kill", "server"]


@dataclass(frozen=True)
class Stop:
    """A model call in whose middle something happens.

    `at`: its number in this run from 1, or what says of a request that it is the one.
    `do`, one after the other while the call is open:
      "freeze": suspended (its sandbox is gone), then resumed;
      "kill":   SIGKILL to its sandbox, it comes back by itself;
      "server": suspended, SIGKILL to the server, which is started again, then resumed.
    `stream`: the provider has given the first piece of its answer (when the request asks for a stream), else nothing of it.
    `away`: the answer is there whole before the (last) thaw; else it goes on when the program is back.
    `at_once`: do not even wait for the snapshot that the call begins."""

    at: int | Callable[[ProviderRequest], bool]
    do: tuple[Do, ...] = ("freeze",)
    stream: bool = False
    away: bool = False
    at_once: bool = False


STOPS = (
    Stop(1, ("freeze",), away=True),
    Stop(2, ("kill",), stream=True),
    Stop(3, ("freeze",), stream=True),
)


@dataclass(frozen=True)
class Program:
    """`script` must be a function of the conversation only (see `by_turn`). `ids`: further patterns of names that differ from
    run to run by right, equal ones staying equal. `vary`: patterns of text that may differ in any way (times, paths of
    temporary files). `ordered`: False when calls go out in parallel. `stdout`: False when what it prints is not compared."""

    name: str
    start: Start
    script: Script
    ids: Sequence[str] = ()
    vary: Sequence[str] = ()
    ordered: bool = True
    stdout: bool = True
    check: Callable[[Outcome], None] = field(default=lambda _: None)
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended, names normalised. `requests`: (path, body) of each model call, as the provider got them."""

    result: Any
    stdout: str
    outbox: list[Any]
    emitted: list[Any]
    requests: list[tuple[str, Any]]
    session: Session = field(compare=False)


# ---------------------------------------------------------------- how programs are started


def cli(*words: str) -> Start:
    """`rethaw run -d WORDS`, in the root of the repository. No program is suspended but by its test."""

    def start(home: House) -> Session:
        said = home.server.cli("run", "-d", "--json", "--idle-suspend", "never", *words, cwd=ROOT).stdout
        return Session(home, json.loads(said))

    return start


def guide(name: str, *, start: Start | None = None, **more: Any) -> Program:
    """The example of a guide, with the model's side that lies beside it."""
    script = load_script(str(GUIDES / name / "script.py"))
    return Program(name, start or cli(f"examples/guides/{name}/agent.py"), script, **more)


# ---------------------------------------------------------------- runs


class _Held:
    """The provider's side of the stops: calls that one of them names are held until its gate is open."""

    def __init__(self, home: House, script: Script, stops: Sequence[Stop]) -> None:
        self._script = script
        self._stops = list(stops)
        self._arrived = {id(stop): threading.Event() for stop in stops}
        self._gates = {id(stop): threading.Event() for stop in stops}
        self._streaming: set[int] = set()
        self._before = len(home.provider.inner.calls)
        self._home = home
        home.provider.answer = self._answer  # type: ignore[assignment]

    @property
    def calls(self) -> list[Any]:
        return [c for c in self._home.provider.inner.calls[self._before :] if c.api != "other"]

    def arrived(self, stop: Stop) -> bool:
        return self._arrived[id(stop)].is_set()

    def streams(self, stop: Stop) -> bool:
        """The first piece of its answer is out."""
        return id(stop) in self._streaming

    def open(self, stop: Stop) -> None:
        self._gates[id(stop)].set()

    def open_all(self) -> None:
        for gate in self._gates.values():
            gate.set()

    async def _answer(self, request: ProviderRequest) -> Reply:
        number = 1 + next(n for n, c in enumerate(self.calls) if c.n == request.n)
        reply = await answer(self._script, request)
        for stop in self._stops:
            named = stop.at == number if isinstance(stop.at, int) else stop.at(request)
            if not named or self.arrived(stop):
                continue
            gate = self._gates[id(stop)]
            if stop.stream and request.stream:
                self._streaming.add(id(stop))
            self._arrived[id(stop)].set()
            if stop.stream and request.stream:
                return reply.with_(hold=gate.is_set)
            while not gate.is_set():  # noqa: ASYNC110 - opened by another thread
                await asyncio.sleep(0.02)
        return reply


def run(home: House, program: Program, stops: Sequence[Stop] = ()) -> Outcome:
    """One run of `program`, disturbed at `stops`, which come in this order."""
    held = _Held(home, program.script, stops)
    try:
        session = program.start(home)
        for number, stop in enumerate(stops):
            limit_s = BEGIN_S if number == 0 else program.timeout_s
            what = f"{program.name}: the call of stop {number + 1}"
            session.until(what, lambda s, stop=stop: _running(s) and held.arrived(stop), limit_s)
            _disturb(home, session, stop, held)
        result = session.result(timeout_s=program.timeout_s if stops else BEGIN_S)
    finally:
        held.open_all()
        home.provider.reset()
    return _outcome(session, program, result, held.calls)


def _running(session: Session) -> bool:
    """Raises when it ended before."""
    view = session.view
    assert view["state"] not in ("completed", "failed", "cancelled"), (
        f"ended too early: {view}\n{session.output('stderr')}"
    )
    return True


def _disturb(home: House, session: Session, stop: Stop, held: _Held) -> None:
    if not stop.at_once:
        session.until("the snapshot of the call", lambda s: _saved(s, streams=held.streams(stop)))
    for number, what in enumerate(stop.do, start=1):
        thaws = len(session.events("snapshot.restored", all_lines=True))
        away = stop.away and number == len(stop.do)
        if what == "kill":
            crashes = session.view["crashes"]
            if away:
                held.open(stop)
                session.until("the answer in the log", _answered)
            session.crash()
            session.until("the crash", lambda s, n=crashes: s.view["crashes"] > n)
        else:
            session.post("suspend")
            session.until_state("suspended")
            if away:
                held.open(stop)
                session.until("the answer in the log", _answered)
            if what == "server":
                home.server.kill9()
                home.server.restart()
            session.post("resume")
        session.until("the thaw", lambda s, n=thaws: len(s.events("snapshot.restored", all_lines=True)) > n)
    held.open(stop)


def _saved(session: Session, *, streams: bool) -> bool:
    """The newest call's snapshot is durable; of a stream, the first piece has also been let go to the program."""
    events = session.events()
    asked = [e for e in events if e["type"] == "exchange.requested"]
    if not asked:
        return False
    later = [e for e in events if e["seq"] > asked[-1]["seq"]]
    released = any(e["type"] == "exchange.released" for e in later)
    return any(e["type"] == "snapshot.created" for e in later) and (released or not streams)


def _answered(session: Session) -> bool:
    asked = [e["data"]["exchange"] for e in session.events("exchange.requested")]
    done = {e["data"]["exchange"] for e in session.events("exchange.completed", all_lines=True)}
    return bool(asked) and asked[-1] in done


# ---------------------------------------------------------------- how they ended


def _outcome(session: Session, program: Program, result: Any, calls: list[Any]) -> Outcome:
    names: dict[str, str] = {}
    pattern = re.compile("|".join([IDS, *program.ids]))

    def named(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f"<name {len(names) + 1}>")

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            text = pattern.sub(named, value)
            for vary in program.vary:
                text = re.sub(vary, "<varies>", text)
            return text
        if isinstance(value, dict):
            return {plain(k): plain(v) for k, v in sorted(value.items())}  # some clients write them in random order
        return [plain(v) for v in value] if isinstance(value, list) else value

    requests = [(c.path, plain(c.json)) for c in calls]
    if not program.ordered:
        requests.sort(key=lambda r: json.dumps(r, sort_keys=True))
    emitted = [[e["data"].get("name"), plain(json.loads(body(e) or b"null"))] for e in session.events("emitted")]
    stdout = plain(session.output()) if program.stdout else ""
    for call in calls:  # no client asked again
        assert call.headers.get("x-stainless-retry-count", "0") == "0", (call.path, call.headers)
    return Outcome(plain(result), stdout, plain(session.outbox()), emitted, requests, session)


def compare(home: House, program: Program, stops: Sequence[Stop] = STOPS) -> tuple[Outcome, Outcome]:
    """Run it undisturbed and disturbed; both must end the same, and nothing may have been paid for twice."""
    alone = run(home, program)
    assert not alone.session.events("snapshot.restored", all_lines=True)
    program.check(alone)
    disturbed = run(home, program, stops)
    session = disturbed.session
    events = session.events(all_lines=True)
    thaws = sum(len(stop.do) for stop in stops)
    kinds = [e["type"] for e in events]
    assert kinds.count("snapshot.restored") == thaws, (thaws, kinds)
    assert session.view["crashes"] == sum(stop.do.count("kill") for stop in stops)
    _same("requests", _shown(alone.requests), _shown(disturbed.requests))
    _same("result", pretty(alone.result), pretty(disturbed.result))
    _same("stdout", alone.stdout, disturbed.stdout)
    _same("outbox", pretty(alone.outbox), pretty(disturbed.outbox))
    _same("emitted", pretty(alone.emitted), pretty(disturbed.emitted))
    program.check(disturbed)
    for unwanted in (
        "exchange.reissued",
        "exchange.torn",
        "exchange.orphaned",
        "session.diverged",
        "snapshot.unusable",
    ):
        assert unwanted not in kinds, [e for e in events if e["type"] == unwanted]
    assert kinds.count("exchange.upstream") == len(disturbed.requests), kinds
    gapless(events)
    return alone, disturbed


def _same(what: str, alone: str, disturbed: str) -> None:
    lines = unified_diff(alone.splitlines(), disturbed.splitlines(), "left alone", "disturbed", lineterm="")
    assert alone == disturbed, f"{what} differ\n" + "\n".join(lines)


def _shown(requests: list[tuple[str, Any]]) -> str:
    """One line a value, so that a difference is seen."""
    return "\n\n".join(
        f"{n}. {path}\n{json.dumps(sent, indent=1, sort_keys=True)}" for n, (path, sent) in enumerate(requests, 1)
    )
