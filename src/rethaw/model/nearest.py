"""What somebody probably meant: of the names there are, the one that is nearest to what was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_ID_AT_LEAST = 6  # characters of an id; fewer resemble too many others


def nearest(wanted: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `wanted` is nearly, whatever its case; None when none is close."""
    import difflib  # only errors need it

    folded: dict[str, str] = {}
    for name in known:
        folded.setdefault(name.casefold(), name)
    close = difflib.get_close_matches(wanted[:200].casefold(), folded, 1, cutoff=0.65)
    return folded[close[0]] if close else None


def nearest_id(wanted: str, known: Iterable[str]) -> str | None:
    """The one of `known` whose beginning is `wanted` but for one character that is wrong, missing, too many, or swapped
    with its neighbour; the beginning that says so much. None when there is none, or more than one."""
    if len(wanted.partition("_")[2]) < _ID_AT_LEAST:
        return None
    found: set[str] = set()
    for one in known:
        for length in (len(wanted), len(wanted) - 1, len(wanted) + 1):
            if _one_mistake(wanted, one[:length]):
                found.add(one)
                break
        if len(found) > 1:
            return None
    return found.pop() if found else None


def did_you_mean(wanted: str, known: Iterable[str], otherwise: str, also: Mapping[str, str] | None = None) -> str:
    """The remedy of an error about a name that is not there: the nearest one of `known`, else `otherwise`. `also`: names
    that it may be taken for, and what they stand for."""
    meant = nearest(wanted, [*known, *(also or {})])
    if meant is None:
        return otherwise
    return f"did you mean {(also or {}).get(meant, repr(meant))}?"


def _one_mistake(a: str, b: str) -> bool:
    if a == b or abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])
