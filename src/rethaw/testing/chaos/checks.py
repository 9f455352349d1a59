"""Promises 2 to 7, checked on what a run left behind: the log, the provider's calls, the outbox, the result.

Each check takes the `Record` and returns what is wrong, in words; nothing when all is well.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rethaw.testing.chaos import script
from rethaw.testing.chaos.plan import Plan

Event = dict[str, Any]
_PARALLEL = 3  # most exchanges that the agent has open at once


@dataclass
class Record:
    """What a run left. `observed`: the log as it was seen now and then during the run, event by seq. `requests`: sha256
    of each exchange's request body. `calls`: sha256 of each request that the provider received, in order."""

    plan: Plan
    state: str
    reason: str
    exit_code: int | None
    result: Any
    events: list[Event]  # all lines, by seq
    requests: dict[str, str]
    calls: list[str]
    outbox: list[dict[str, Any]]  # {"id", "number", "payload"}
    observed: dict[int, str] = field(default_factory=dict[int, str])
    outbox_seen: list[list[str]] = field(default_factory=list[list[str]])  # ids, at several moments
    server_kills: int = 0
    leftovers: list[str] = field(default_factory=list[str])

    def of(self, *types: str, path: bool = False) -> list[Event]:
        """Events of these types; with `path`, only those on the line a reader sees."""
        return [e for e in self.events if e["type"] in types and not (path and e["superseded"])]


def fingerprint(event: Event) -> str:
    """What may never change about an event (whether it is superseded may)."""
    return json.dumps({k: v for k, v in event.items() if k != "superseded"}, sort_keys=True)


def by_exchange(events: Iterable[Event]) -> dict[str, list[Event]]:
    out: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        out[str(event["data"]["exchange"])].append(event)
    return out


def gapless(r: Record) -> list[str]:
    """Promise 2: seq 1, 2, 3, …"""
    seqs = [e["seq"] for e in r.events]
    if seqs != list(range(1, len(seqs) + 1)):
        wrong = next((i + 1, s) for i, s in enumerate([*seqs, None]) if s != i + 1)
        return [f"the log has gaps: place {wrong[0]} holds seq {wrong[1]}"]
    return []


def append_only(r: Record) -> list[str]:
    """Promise 2: what was once read stays as it was."""
    now = {e["seq"]: fingerprint(e) for e in r.events}
    return [f"event {seq} changed or vanished: {was[:200]}" for seq, was in r.observed.items() if now.get(seq) != was]


def one_writer(r: Record) -> list[str]:
    """Promise 6: once a line was left, nothing is written to it; the same for attempts."""
    out: list[str] = []
    line = attempt = 0
    for e in r.events:
        if e["line"] < line or e["attempt"] < attempt:
            out.append(f"event {e['seq']} ({e['type']}) belongs to line {e['line']}, line {line} was open already")
        line, attempt = max(line, e["line"]), max(attempt, e["attempt"])
    return out


def calls_explained(r: Record) -> list[str]:
    """Promise 2: a request is in the log before its first byte goes upstream."""
    allowed: Counter[str] = Counter()
    for exchange, events in by_exchange(r.of("exchange.upstream")).items():
        allowed[r.requests.get(exchange, f"no request of {exchange}")] += len(events)
    out: list[str] = []
    for sha, count in Counter(r.calls).items():
        if count > allowed[sha]:
            out.append(f"{count} calls with body {sha[:12]} reached the provider, the log explains {allowed[sha]}")
    return out


def paid_once(r: Record) -> list[str]:
    """Promise 3: what was answered is not called again; what a crash of the node cut off, once more and logged."""
    out: list[str] = []
    ends = by_exchange(r.of("exchange.completed"))
    reissues = by_exchange(r.of("exchange.reissued"))
    for exchange, ups in by_exchange(r.of("exchange.upstream")).items():
        again = len(reissues.get(exchange, []))
        if len(ups) > 1 + again:
            out.append(f"{exchange} went upstream {len(ups)} times, the log explains {1 + again}")
        if exchange in ends and any(u["seq"] > ends[exchange][0]["seq"] for u in ups):
            out.append(f"{exchange} went upstream again after its answer was complete")
    total = sum(map(len, reissues.values()))
    if total and not r.plan.server_may_die:
        out.append(f"{total} calls were issued again although the node lived")
    if any(len(again) > r.server_kills for again in reissues.values()):
        out.append(f"a call was issued again more often than the node was killed ({r.server_kills})")
    # The same bytes asked twice and answered twice: the second should have been given the first one's answer.
    lost = {e["data"]["exchange"] for e in r.of("exchange.orphaned", "exchange.torn")}
    answered = Counter(r.requests.get(exchange, exchange) for exchange in ends if exchange not in lost)
    out += [f"{n} exchanges with body {sha[:12]} were answered" for sha, n in answered.items() if n > 1]
    return out


def orphans(r: Record) -> list[str]:
    """Promise 3: only an answer of which no byte was released, at most one per open exchange per crash."""
    out: list[str] = []
    released = {e["data"]["exchange"] for e in r.of("exchange.released")}
    found = by_exchange(r.of("exchange.orphaned"))
    out += [f"{exchange} was orphaned although bytes of it were released" for exchange in found if exchange in released]
    crashes = len(r.of("line.opened"))
    if len(found) > _PARALLEL * crashes:
        out.append(f"{len(found)} orphans after {crashes} crashes")
    return out


def calls_counted(r: Record) -> list[str]:
    """Promises 3 and 4: calls made = calls needed + those that the log explains by crashes."""
    if r.state != "completed":
        return []
    extra = len(r.of("exchange.orphaned", "exchange.torn", "exchange.failed", "exchange.reissued"))
    needed = script.calls_needed(r.plan.turns)
    if not needed <= len(r.calls) <= needed + extra:
        return [f"{len(r.calls)} calls made, {needed} needed and {extra} explained by crashes"]
    return []


def released_after_snapshot(r: Record) -> list[str]:
    """Promise 4: no byte of an answer before a snapshot that holds its request is durable."""
    if r.of("durability.degraded"):
        return []
    asked: dict[str, list[int]] = defaultdict(list)
    best, out = 0, list[str]()
    for e in r.events:
        kind = e["type"]
        if kind in ("exchange.requested", "exchange.adopted"):
            asked[e["data"]["exchange"]].append(e["seq"])
        elif kind == "snapshot.created":
            best = max(best, int(e["data"]["seq"]))
        elif kind == "line.opened":
            branch = int(e["data"]["branch_seq"])
            best = min(best, branch)
            # A crash takes back what was asked after the snapshot: the restored client waits for its first request.
            for seqs in asked.values():
                seqs[:] = [seq for seq in seqs if seq <= branch]
        elif kind == "exchange.released":
            exchange = e["data"]["exchange"]
            seqs = asked[exchange]
            if not seqs:
                out.append(f"{exchange} was released at {e['seq']} though nobody on that line asked for it")
            elif seqs[-1] > best:
                out.append(f"{exchange} was released at {e['seq']}, the newest snapshot holds {best}")
    return out


def inbox_once(r: Record) -> list[str]:
    """Promise 5: each inbox message is consumed once on the line that a reader sees."""
    numbers = [e["data"]["number"] for e in r.of("message.consumed", path=True)]
    out: list[str] = []
    if numbers != sorted(set(numbers)):
        out.append(f"inbox messages were consumed in the order {numbers}")
    if r.state == "completed" and numbers != list(range(1, len(script.messages_needed(r.plan.turns)) + 1)):
        out.append(f"consumed {numbers}, sent {len(script.messages_needed(r.plan.turns))}")
    return out


def outbox_once(r: Record) -> list[str]:
    """Promise 5: each outbox message is published exactly once, in order, and never taken back."""
    out: list[str] = []
    numbers = [m["number"] for m in r.outbox]
    if numbers != list(range(1, len(numbers) + 1)):
        out.append(f"the outbox has numbers {numbers}")
    counts = [m["payload"]["n"] for m in r.outbox]
    if counts != list(range(1, len(counts) + 1)):
        out.append(f"the agent's own count in the outbox: {counts}")
    ids = [m["id"] for m in r.outbox]
    for seen in r.outbox_seen:
        if seen != ids[: len(seen)]:
            out.append(f"a reader saw {seen}, which is not how the outbox begins now: {ids}")
    sent = [e["data"]["message"] for e in r.of("message.sent", path=True)]
    if ids != sent[: len(ids)]:
        out.append(f"published {ids}, sent on the path {sent}")
    published = Counter(e["data"]["message"] for e in r.of("message.published"))
    out += [f"{message} was published {n} times" for message, n in published.items() if n > 1]
    if set(published) != set(ids):
        out.append(f"events say published: {sorted(published)}, the outbox holds {sorted(ids)}")
    if r.state == "completed" and len(ids) != script.expected(r.plan.turns)["sent"]:
        out.append(f"{len(ids)} messages published, {script.expected(r.plan.turns)['sent']} sent")
    return out


def last_words(r: Record) -> str:
    """The end of the agent's output."""
    bodies = [e["body"] for e in r.of("output", path=True)[-20:] if isinstance(e["body"], str)]
    said = b"".join(base64.urlsafe_b64decode(body) for body in bodies)
    return said[-500:].decode("utf-8", "replace")


def outcome(r: Record) -> list[str]:
    """Promises 1 and 7: the result of an undisturbed run, or the end that the agent brought upon itself."""
    if r.plan.die_at is not None and r.state == "failed":
        fine = r.reason == "exited" and r.exit_code in (137, -9)
        return [] if fine else [f"the agent killed itself, the session says {r.reason}, exit code {r.exit_code}"]
    if r.state != "completed":
        return [f"the session ended {r.state} ({r.reason}, exit code {r.exit_code}); it said {last_words(r)!r}"]
    if r.plan.die_at is not None:
        return ["the agent should have killed itself"]
    want = script.expected(r.plan.turns)
    if r.result != want:
        got: dict[str, Any] = r.result or {}
        return [f"the result differs in {[k for k in want if got.get(k) != want[k]]}: {str(got)[:500]}"]
    return []


def turns_in_order(r: Record) -> list[str]:
    """Promise 6: on the line that a reader sees, the agent went through each turn once."""
    emitted = r.of("emitted", path=True)
    turns: list[Any] = [e["body"]["turn"] for e in emitted if e["data"].get("name") == "turn"]
    return [] if turns == list(range(len(turns))) else [f"turns on the path: {turns}"]


def nothing_left(r: Record) -> list[str]:
    """Promise 9: no process and no mount stays behind."""
    return [f"left behind: {what}" for what in r.leftovers]


CHECKS: tuple[Callable[[Record], list[str]], ...] = (
    gapless,
    append_only,
    one_writer,
    calls_explained,
    paid_once,
    orphans,
    calls_counted,
    released_after_snapshot,
    inbox_once,
    outbox_once,
    outcome,
    turns_in_order,
    nothing_left,
)


def check(record: Record) -> list[str]:
    """All violations, each with the name of its check."""
    return [f"{c.__name__}: {text}" for c in CHECKS for text in c(record)]
