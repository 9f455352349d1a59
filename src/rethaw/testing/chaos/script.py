"""The model of the chaos runs, and what an undisturbed run returns."""

from __future__ import annotations

import re
from typing import Any

from rethaw.testing.chaos.agent import KINDS
from rethaw.testing.conversation import ProviderRequest
from rethaw.testing.reply import Reply, TokenUsage

_LAST = re.compile(r"turn (\d+) kind (\w+) branch (\d+)")


def said(turn: int, branch: int) -> str:
    """The model's answer: long enough for several pieces, and a function of the question alone."""
    return f"answer to {turn}.{branch} " + "thinking " * 6


def script(request: ProviderRequest) -> Reply:
    found = _LAST.search(request.last_text)
    if found is None:
        return Reply(status=400, message=f"this is no question of the chaos agent: {request.last_text[:80]!r}")
    turn, kind, branch = int(found[1]), found[2], int(found[3])
    # Parallel calls come back in another order than they were made; the impatient client gives up after 0.7 s.
    first = {"impatient": 1.2, "parallel": 0.1 + 0.15 * (2 - branch)}.get(kind, 0.1)
    return Reply(said(turn, branch), usage=TokenUsage(1000, 10), first_byte_s=first, chunk_s=0.03)


def turn_of(last_text: str) -> int:
    """The turn that a request belongs to, -1 for none."""
    found = _LAST.search(last_text)
    return int(found[1]) if found else -1


def kind_of(turn: int) -> str:
    return KINDS[turn % len(KINDS)]


def calls_needed(turns: int) -> int:
    """Model calls of an undisturbed run."""
    return sum(3 if kind_of(t) == "parallel" else 1 for t in range(turns))


def messages_needed(turns: int) -> list[int]:
    """The turns that wait for an inbox message; the message for the k-th of them is {"i": k}."""
    return [t for t in range(turns) if kind_of(t) == "inbox"]


def signals_needed(turns: int) -> list[int]:
    """The turns that wait for the signal `go-TURN`, whose payload is {"go": TURN}."""
    return [t for t in range(turns) if kind_of(t) == "signal"]


def expected(turns: int) -> dict[str, Any]:
    """What the agent returns, however it was treated."""
    kinds = [kind_of(t) for t in range(turns)]
    return {
        "answers": [[said(t, b) for b in range(3 if k == "parallel" else 1)] for t, k in enumerate(kinds)],
        "inbox": list(range(len(messages_needed(turns)))),
        "signals": signals_needed(turns),
        "sent": sum({"plain": 1, "inbox": 1, "parallel": 2}.get(k, 0) for k in kinds),
        "timeouts": kinds.count("timer"),
    }
