"""The chaos harness itself: every check passes a record that is as it should be, and fails one that is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from rethaw.testing.chaos import checks, script
from rethaw.testing.chaos.checks import Record, check, fingerprint
from rethaw.testing.chaos.plan import Plan, fault_points, plan

TURNS = 7  # one of each kind


def good() -> Record:
    """A crash in turn 2: another request for the turn's exchange is taken back, an exchange orphaned, a message that was
    not published went with its line."""
    events: list[dict[str, Any]] = []
    line = 1

    def add(kind: str, body: Any = None, superseded: bool = False, **data: Any) -> int:
        seq = len(events) + 1
        events.append(
            {"seq": seq, "line": line, "attempt": 1, "type": kind, "data": data, "body": body, "superseded": superseded}
        )
        return seq

    def asked(name: str) -> int:
        at = add("exchange.requested", exchange=name)
        add("exchange.upstream", exchange=name)
        add("snapshot.created", seq=at)
        return at

    def answered(name: str) -> None:
        add("exchange.released", exchange=name)
        add("exchange.completed", exchange=name)

    outbox: list[dict[str, Any]] = []
    exchanges: list[str] = []
    for turn in range(TURNS):
        add("emitted", name="turn", body={"turn": turn})
        if turn == 2:
            branch = asked("x2.0")
            add("exchange.adopted", superseded=True, exchange="x2.0")
            add("message.sent", superseded=True, message="lost")
            add("exchange.requested", superseded=True, exchange="orphan")
            add("exchange.upstream", superseded=True, exchange="orphan")
            line = 2
            add("line.opened", branch_seq=branch)
            add("exchange.orphaned", exchange="orphan")
            exchanges.append("orphan")
        kind = script.kind_of(turn)
        if kind == "inbox":
            add("message.consumed", number=1)
        for b in range(3 if kind == "parallel" else 1):
            if turn != 2:
                asked(f"x{turn}.{b}")
            answered(f"x{turn}.{b}")
            exchanges.append(f"x{turn}.{b}")
        for _ in range({"plain": 1, "inbox": 1, "parallel": 2}.get(kind, 0)):
            n = len(outbox) + 1
            add("message.sent", message=f"m{n}")
            add("message.published", message=f"m{n}")
            outbox.append({"id": f"m{n}", "number": n, "payload": {"n": n}})
    add("session.result")
    return Record(
        plan=Plan(4, TURNS),
        state="completed",
        reason="none",
        exit_code=0,
        result=script.expected(TURNS),
        events=events,
        requests={x: f"sha {x}" for x in exchanges},
        calls=[f"sha {x}" for x in exchanges],
        outbox=outbox,
        observed={e["seq"]: fingerprint(e) for e in events[:9]},
        outbox_seen=[[], ["m1"], ["m1", "m2"]],
    )


def of(record: Record, kind: str, **data: Any) -> dict[str, Any]:
    return next(e for e in record.events if e["type"] == kind and all(e["data"].get(k) == v for k, v in data.items()))


def test_chaos_checks_pass_a_good_record() -> None:
    assert check(good()) == []


def swap(items: list[Any]) -> None:
    items[0], items[1] = items[1], items[0]


def again(r: Record, kind: str, **data: Any) -> None:
    """One more such event, at the end."""
    last = r.events[-1]
    r.events.append({**last, "seq": last["seq"] + 1, "type": kind, "data": data})


BREAKS: list[tuple[str, Callable[[Record], object]]] = [
    ("gapless", lambda r: r.events.pop(5)),
    ("gapless", lambda r: r.events.append(r.events[-1])),
    ("append_only", lambda r: r.events[3]["data"].update(x=1)),
    ("append_only", lambda r: r.observed.update({10_000: "{}"})),
    ("one_writer", lambda r: r.events[-1].update(line=1)),
    ("one_writer", lambda r: r.events[2].update(attempt=2)),
    ("calls_explained", lambda r: r.calls.append("sha of nothing")),
    ("calls_explained", lambda r: r.calls.append(r.calls[0])),
    ("calls_explained", lambda r: of(r, "exchange.upstream").update(type="exchange.held")),
    ("paid_once", lambda r: again(r, "exchange.upstream", exchange="x0.0")),
    ("paid_once", lambda r: again(r, "exchange.reissued", exchange="x0.0")),
    ("paid_once", lambda r: r.requests.update({"x1.1": "sha x1.0"})),
    ("orphans", lambda r: again(r, "exchange.orphaned", exchange="x3.0")),
    ("orphans", lambda r: of(r, "line.opened").update(type="emitted", data={})),
    ("calls_counted", lambda r: r.calls.__delitem__(slice(2))),
    ("calls_counted", lambda r: r.calls.extend(["a", "b"])),
    ("released_after_snapshot", lambda r: of(r, "snapshot.created").update(type="snapshot.failed")),
    ("released_after_snapshot", lambda r: of(r, "line.opened")["data"].update(branch_seq=1)),
    ("inbox_once", lambda r: again(r, "message.consumed", number=1)),
    ("inbox_once", lambda r: of(r, "message.consumed").update(superseded=True)),
    ("outbox_once", lambda r: r.outbox.pop(1)),
    ("outbox_once", lambda r: swap(r.outbox)),
    ("outbox_once", lambda r: r.outbox_seen.append(["m1", "lost"])),
    ("outbox_once", lambda r: again(r, "message.published", message="m1")),
    ("outbox_once", lambda r: again(r, "message.published", message="lost")),
    ("outbox_once", lambda r: of(r, "message.sent", message="m2").update(superseded=True)),
    ("outcome", lambda r: setattr(r, "state", "failed")),
    ("outcome", lambda r: r.result["inbox"].append(9)),
    ("outcome", lambda r: setattr(r, "plan", Plan(4, TURNS, die_at=3))),
    ("turns_in_order", lambda r: of(r, "emitted").update(superseded=True)),
    ("nothing_left", lambda r: r.leftovers.append("runsc-sandbox")),
]


@pytest.mark.parametrize(("name", "break_it"), BREAKS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BREAKS)])
def test_chaos_checks_see_what_is_broken(name: str, break_it: Callable[[Record], object]) -> None:
    record = copy.deepcopy(good())
    break_it(record)
    assert name in {text.split(":")[0] for text in check(record)}


def test_chaos_every_check_is_tested() -> None:
    assert {c.__name__ for c in checks.CHECKS} == {name for name, _ in BREAKS}


def test_chaos_plans_depend_on_the_seed_alone_and_cover_everything() -> None:
    plans = [plan(seed) for seed in range(200)]
    assert plans == [plan(seed) for seed in range(200)]
    assert not plans[0].hits and not plans[0].fault
    hit = {h.target for p in plans for h in p.hits} | {"agent" for p in plans if p.die_at is not None}
    assert hit == {"agent", "guestd", "sandbox", "server", "postgres", "backend", "everything"}
    faults = {p.fault.partition(":")[0] for p in plans if p.fault}
    assert faults == set(fault_points()), "each named point is hit within 200 seeds"
    assert len(faults) >= 10
