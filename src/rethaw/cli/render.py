"""Events and sessions in words, for a reader. Nothing here prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from rethaw.cli.output import ago, color, plain, state_color
from rethaw.model.durations import human
from rethaw.sdk.sizes import human_bytes, human_count

if TYPE_CHECKING:
    from rethaw.model.types import Attempt, Event, SessionView
    from rethaw.sdk.types import Detail, Stats, Why

_BODY = 100  # characters of an event's body that are shown
_SAID = 300  # of a line that a program wrote
_ORDINARY = frozenset({"none", "exited", "cancelled"})  # reasons that say no more than the state


def state_text(view: SessionView) -> str:
    """`suspended (idle)`, with what is wrong."""
    return state_words(view.state.value, view.reason.value, view.exit_code, degraded=view.degraded)


def state_words(state: str, reason: str, exit_code: int | None, *, degraded: bool) -> str:
    text = state
    if reason not in _ORDINARY:
        text += f" ({reason})"
    if exit_code:
        text += f" (exit code {exit_code})"
    return f"{text}, durability degraded" if degraded else text


def event_line(event: Event) -> str:
    """One event: seq, time, line, type, what it says."""
    said = _egress(event.type.value, event.data) or " ".join(
        f"{key}={_value(value)}" for key, value in event.data.items() if value is not None
    )
    body = "" if event.body is None else f" {_body(event.body)}"
    at = event.at.astimezone().strftime("%H:%M:%S.%f")[:-3]
    text = f"{event.seq:>5}  {at}  {event.line:>2}  {event.type.value:<20}  {plain(said)}{body}".rstrip()
    return color(f"{text}  (superseded)", "2;9") if event.superseded else text


def _egress(kind: str, data: dict[str, Any]) -> str:
    """What an egress event says; empty for events of other kinds."""
    host = str(data.get("host"))
    where = f"[{host}]" if ":" in host else host
    where += f":{data['port']}" if data.get("port") else ""
    more = "".join(
        f" ({data[key]} more {what})"
        for key, what in (("repeats", "of the same"), ("others", "to other places"))
        if data.get(key)
    )
    if kind == "egress.opened":
        return where if data.get("address") == host else f"{where} at {data.get('address')}"
    if kind == "egress.refused":
        rule = f"; to allow it: --allow {data['rule']}" if data.get("rule") else ""
        return f"{where} refused: {data.get('why')}{rule}{more}"
    if kind == "egress.failed":
        return f"{data.get('error')}{more}"
    if kind == "egress.closed":
        sent, received = human_bytes(int(data.get("sent") or 0)), human_bytes(int(data.get("received") or 0))
        why = f": {data['why']}" if data.get("why") else ""
        return f"{where}, sent {sent}, received {received} in {human(float(data.get('seconds') or 0))}{why}"
    return ""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _body(body: bytes) -> str:
    return plain(repr(body.decode(errors="replace"))[1:-1], _BODY)


def durability(stats: Stats) -> str:
    """What durability did: "3 crashes, 4 model calls served from the log, 182k tokens not paid twice"."""
    return ", ".join(
        (
            _count(stats.crashes, "crash", "crashes"),
            f"{_count(stats.served_from_log, 'model call')} served from the log",
            f"{_count(stats.tokens_not_paid_twice, 'token', shown=human_count)} not paid twice",
        )
    )


def _count(number: int, one: str, many: str = "", shown: Any = str) -> str:
    return f"{shown(number)} {one if number == 1 else many or one + 's'}"


def agent_text(view: SessionView) -> str:
    """What runs, in one line."""
    agent = view.agent
    what = agent.entry or " ".join(agent.command)
    return plain(f"{agent.name}  {what}", 200)


def image_text(view: SessionView) -> str:
    image = view.agent.image
    parts = [f"Debian {image.suite}"]
    parts += [f"apt: {' '.join(image.apt)}"] if image.apt else []
    parts += [f"pip: {' '.join(image.pip)}"] if image.pip else []
    return ", ".join(parts)


def show_lines(detail: Detail) -> list[str]:
    """The text of `rethaw show`."""
    from rethaw.model.versions import label

    view, stats = detail.view, detail.stats
    rows = [
        ("session", view.id),
        ("agent", agent_text(view)),
        ("version", label(view.version, view.version_digest) or ""),
        ("image", image_text(view)),
        ("state", color(state_text(view), state_color(view.state.value))),
        ("detail", plain(view.detail or "")),
        ("key", plain(view.key or "")),
        ("queue", _queue(view)),
        ("tags", plain(" ".join(view.tags))),
        ("forked from", f"{view.forked_from} at event {view.forked_seq}" if view.forked_from else ""),
        ("parent", view.parent or ""),
        ("deadline", f"{view.deadline.astimezone():%Y-%m-%d %H:%M:%S}" if view.deadline else ""),
        ("created", f"{view.created_at.astimezone():%Y-%m-%d %H:%M:%S} ({ago(view.created_at)} ago)"),
        ("memory", human_bytes(view.agent.memory_bytes)),
        ("may reach", plain(" ".join(view.agent.allow), 200)),
        ("log", f"{view.last_seq} events, line {view.line}, attempt {view.attempt}"),
        ("model", _model(stats)),
        ("snapshots", f"{stats.snapshots}, {human_bytes(stats.stored_bytes)} stored"),
        ("newest", view.snapshot or ""),
        ("durability", f"{view.agent.durability.value}{', degraded' if view.degraded else ''}"),
    ]
    lines = [f"{name:<11} {value}" for name, value in rows if value]
    return [*lines, *attempt_lines(detail), *budget_lines(detail), "", durability(stats)]


def attempt_lines(detail: Detail) -> list[str]:
    """Each attempt and how it ended, when there was more than one or there may be."""
    attempts = detail.attempts
    if len(attempts) < 2 and (detail.view.agent.retries is None or not attempts):
        return []
    return [f"{'attempts' if i == 0 else '':<11} {plain(_attempt(one, detail.view))}" for i, one in enumerate(attempts)]


def _attempt(one: Attempt, view: SessionView) -> str:
    began = f"{one.started_at.astimezone():%H:%M:%S}" if one.started_at is not None else "not begun"
    took = ""
    if one.started_at is not None and one.ended_at is not None:
        took = f", {human(max(0.0, (one.ended_at - one.started_at).total_seconds()))}"
    return f"{one.attempt}: {began}{took}, {one.how or view.state.value}"


_LIMITS = {"tokens": "tokens", "input_tokens": "input tokens", "output_tokens": "output tokens", "money": "",
           "model_calls": "model calls", "wall_s": "of running"}  # fmt: skip


def budget_lines(detail: Detail) -> list[str]:
    """What was spent of what may be."""
    budget, spent = detail.budget, detail.spent
    if budget is None or spent is None:
        return []
    lines: list[str] = []
    for name, words in _LIMITS.items():
        limit, used = getattr(budget, name), getattr(spent, name)
        if limit is None:
            continue
        if name == "wall_s":
            text = f"{human(used)} of {human(limit)} {words}"
        elif name == "money":
            text = f"{used if used is not None else '?'} of {limit}"
        else:
            text = f"{used:,} of {limit:,} {words}"
        share = None if used is None else float(used) / float(limit) if float(limit) else 1.0
        lines.append(f"{'' if lines else 'budget':<11} {text}{'' if share is None else f' ({share:.0%})'}")
    if spent.unpriced is not None and budget.money is not None:
        lines.append(f"{'':<11} {plain(spent.unpriced)} has no price in the server's rethaw.toml")
    if spent.uncounted:
        lines.append(f"{'':<11} {_count(spent.uncounted, 'call')} came without token counts")
    return lines


def _queue(view: SessionView) -> str:
    """Nothing of one that was started as most are."""
    said = [f"priority {view.priority}"] if view.priority else []
    said += [f"concurrency key {view.concurrency_key!r}"] if view.concurrency_key is not None else []
    said += [f"not before {view.not_before.astimezone():%Y-%m-%d %H:%M:%S}"] if view.not_before else []
    said += [f"fails if not started by {view.expires_at.astimezone():%Y-%m-%d %H:%M:%S}"] if view.expires_at else []
    return plain(", ".join([view.queue or "default", *said])) if said or view.queue not in ("", "default") else ""


def _model(stats: Stats) -> str:
    text = f"{_count(stats.exchanges, 'exchange')}, {_count(stats.upstream_calls, 'call')} to providers"
    if stats.input_tokens or stats.output_tokens:
        text += f", {human_count(stats.input_tokens)} tokens in, {human_count(stats.output_tokens)} out"
    return text


def why_lines(session: str, why: Why) -> list[str]:
    """The text of `rethaw why`."""
    head = why.state if why.reason in _ORDINARY else f"{why.state} ({why.reason})"
    since = f" since {_when(why.since)}" if why.since else ""
    lines = [color(f"{head}{since}", state_color(why.state))]
    if why.detail:
        lines.append(plain(why.detail))
    for wait in why.waiting_for:
        name = f" {wait.name!r}" if wait.name else ""
        began = f", since {_when(wait.since)}" if wait.since else ""
        lines.append(plain(f"waits for {wait.kind}{name}{began}"))
        if wait.wakes_it:
            lines.append(plain(f"  woken by: {wait.wakes_it}"))
        elif wait.kind == "signal":
            lines.append(plain(f"  woken by: rethaw signal {session} {wait.name} PAYLOAD"))
    if why.last_words is not None:
        lines.append(f"the end of its {why.last_words.stream}:")
        lines += [f"  {plain(line, _SAID)}".rstrip() for line in why.last_words.lines]
    if why.state == "failed":
        lines.append(f"all that it wrote: rethaw logs {session}; how it ended: rethaw show {session}")
    lines.append(f"last snapshot: {_place(why.last_snapshot) or 'none yet'}")
    if why.would_resume_at is not None:
        lines.append(f"would resume at: {_place(why.would_resume_at)}")
    return lines


def _when(text: str | None) -> str:
    from datetime import datetime

    try:
        at = datetime.fromisoformat(text or "")
    except ValueError:
        return text or ""
    return f"{at.astimezone():%H:%M:%S} ({ago(at)})"


def _place(value: Any) -> str:
    """A snapshot or a position in the log, however the server says it."""
    if value is None:
        return ""
    if isinstance(value, dict):
        found = cast("dict[str, Any]", value)
        parts = [str(found[k]) if k == "id" else f"{k} {found[k]}" for k in ("id", "seq", "why", "at") if k in found]
        return plain(", ".join(parts) or json.dumps(value))
    return plain(f"seq {value}" if isinstance(value, int) else str(value))


def happening(event: Event, session: str) -> str | None:
    """What somebody who watches a session is told beside its output; None for what is no news."""
    data = event.data
    kind = event.type.value
    if kind == "session.state":
        return _state_news(data)
    if kind == "session.crashed":
        detail = f": {data['detail']}" if data.get("detail") else ""
        return plain(f"crashed ({data.get('reason')}{detail}); coming back")
    if kind == "snapshot.restored":
        took = data.get("resume_ms")
        return f"restored{f' in {human(float(took) / 1000)}' if took is not None else ''}"
    if kind == "session.upgraded":
        return f"upgraded from version {data.get('from_version')} to {data.get('to_version')}"
    if kind == "wait.opened":
        if data.get("kind") == "signal":
            return plain(f"waits for signal {data.get('name')!r}: rethaw signal {session} {data.get('name')} PAYLOAD")
        if data.get("kind") in ("any", "all"):
            return plain(
                f"waits for {_named(data.get('parts'), 'and' if data['kind'] == 'all' else 'or')}: rethaw why {session}"
            )
        return plain(f"waits for a message: rethaw send {session} TEXT") if data.get("kind") == "inbox" else None
    if kind == "child.spawned":
        return plain(f"spawned {data.get('agent')}: rethaw logs -f {data.get('child')}")
    if kind == "exchange.held":
        return plain(f"the provider said {data.get('status')}; held until it answers")
    if kind == "durability.degraded":
        return plain(f"durability degraded: {data.get('detail') or 'snapshots cannot be saved'}")
    if kind == "snapshot.unusable":
        return plain(f"snapshot {data.get('snapshot')} is unusable: {data.get('why') or data.get('detail') or ''}")
    if kind == "budget.warning":
        if data.get("what") == "uncounted":
            return plain(str(data.get("detail")))
        return plain(f"budget: {data.get('used')} of {data.get('limit')} {data.get('what')} are used")
    if kind == "egress.refused":
        return plain(f"egress to {_egress(kind, data)}")
    if kind == "durability.restored":
        return "durability restored"
    return None


def _named(parts: Any, word: str) -> str:
    """What a wait for several things is for, in a few words."""
    words = {"inbox": "a message", "timer": "time"}
    found = [cast("dict[str, Any]", part) for part in cast("list[Any]", parts or []) if isinstance(part, dict)]
    shown = [words.get(str(p.get("kind"))) or f"{p.get('kind')} {p.get('name')}" for p in found[:4]]
    return f" {word} ".join(shown) + (f" {word} {len(found) - 4} more" if len(found) > 4 else "")


def _state_news(data: dict[str, Any]) -> str | None:
    state, reason = str(data.get("state")), str(data.get("reason") or "none")
    if state not in ("suspended", "queued"):  # of an end the caller tells
        return None
    text = state if reason in _ORDINARY else f"{state} ({reason})"
    return plain(f"{text}: {data['detail']}" if data.get("detail") else text)
