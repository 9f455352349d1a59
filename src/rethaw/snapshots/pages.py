"""Pages of 4 KiB compared with those of an earlier snapshot, by content, at memory speed.

A saved memory file keeps the order of its pages from one save to the next, but they shift as pages come and go. So a
page is looked up by a hash, and every hit is compared byte by byte: two contents that share a hash cost space, never
correctness. Where the earlier pages are not in memory any more, their digests are compared instead: 128 bits of BLAKE3
under a key that this process keeps to itself. What has no equal is compared with the page that stood in its place: where
few words differ, their XOR is worth storing in place of the page (a busy page of a Python heap shrinks to a fifteenth).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

PAGE = 4096
_WORDS = PAGE // 8
_CHUNK = 256  # pages compared at a time: 1 MiB, about a core's cache
_DELTA_WORDS = _WORDS // 2  # with more words than this changed, a page is stored whole

Words = NDArray[np.uint64]  # (pages, 512)
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]

# Odd, so that a change of one word always changes the sum. Random for each process: nobody can aim at collisions.
_WEIGHTS: Words = np.random.default_rng().integers(0, 1 << 63, _WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

_KEY = os.urandom(32)


def as_pages(buffer: bytes | memoryview | NDArray[np.uint8]) -> Words:
    """`buffer` as rows of words, its end filled up with zeros to a whole page (only then it is copied)."""
    flat = np.frombuffer(buffer, dtype=np.uint8)
    rest = flat.size % PAGE
    if rest:
        flat = np.concatenate([flat, np.zeros(PAGE - rest, dtype=np.uint8)])
    return flat.view(np.uint64).reshape(-1, _WORDS)


def hashes(pages: Words) -> Words:
    """One 64-bit number a page; only for finding candidates within this process."""
    out = np.empty(len(pages), dtype=np.uint64)
    for at in range(0, len(pages), _CHUNK):
        np.einsum("ij,j->i", pages[at : at + _CHUNK], _WEIGHTS, out=out[at : at + _CHUNK])
    return out


def digests(pages: Words, which: NDArray[np.integer]) -> Words:
    """Two numbers for each page in `which`, equal only for equal contents; only within this process."""
    flat = np.ascontiguousarray(pages).reshape(-1).view(np.uint8).data
    out = [blake3(flat[n * PAGE : (n + 1) * PAGE], key=_KEY).digest(length=16) for n in which.tolist()]
    return np.frombuffer(b"".join(out), dtype=np.uint64).reshape(-1, 2)


def zeros(pages: Words, found: Words) -> Bools:
    """Which pages hold nothing but zeros; `found`: their hashes."""
    out = found == 0
    candidates = np.flatnonzero(out)
    for start in range(0, len(candidates), _CHUNK):
        some = candidates[start : start + _CHUNK]
        out[some] = ~pages[some].any(axis=1)
    return out


@dataclass
class Former:
    """What is compared with: an earlier snapshot's pages, and for those stored as a delta the content they refer to.

    `pages` None: they are not in memory any more; then `digests` must be there. `apart`: pages whose base is in neither
    `pages` nor `bases`; `read` gives the bases of such pages."""

    pages: Words | None
    hashes: Words
    base_row: Ints  # row of `bases` for a page stored as a delta, -1 for one stored whole or `apart`
    bases: Words
    digests: Words | None = None
    apart: Bools | None = None
    read: Callable[[Ints], Words] | None = None

    def base_of(self, at: Ints) -> Words:
        """The whole page that a delta against page `at` refers to."""
        rows = self.base_row[at]
        out = np.empty((len(at), _WORDS), dtype=np.uint64)
        held = rows >= 0
        if held.any():
            out[held] = self.bases[rows[held]]
        apart = ~held if self.pages is None else np.zeros(len(at), np.bool_) if self.apart is None else self.apart[at]
        own = ~held & ~apart
        if self.pages is not None:
            out[own] = self.pages[at[own]]
        if apart.any():
            assert self.read is not None
            out[apart] = self.read(at[apart])
        return out


@dataclass
class Plan:
    """What becomes of each page. `same`: index of the former page it equals, or -1. `base`: index of the former page
    that a delta refers to, or -1. `twin`: index of an earlier page of this snapshot with the same content, or itself.
    A page that is neither zero nor same, and its own twin, is stored: as a delta if it has a base, else whole.
    `digests`: of all pages but those of zeros."""

    zero: Bools
    same: Ints
    base: Ints
    twin: Ints
    digests: Words

    def stored(self) -> tuple[Ints, Ints]:
        """Indices of the pages to store whole, and as deltas, in order."""
        own = ~self.zero & (self.same < 0) & (self.twin == np.arange(len(self.twin)))
        whole = np.flatnonzero(own & (self.base < 0)).astype(np.int32)
        return whole, np.flatnonzero(own & (self.base >= 0)).astype(np.int32)


def plan(pages: Words, found: Words, former: Former | None, renew: Bools | None = None) -> Plan:
    """Compare. `found`: hashes of `pages`. `renew`: former pages that must not be referred to."""
    count = len(pages)
    zero = zeros(pages, found)
    same = np.full(count, -1, dtype=np.int32)
    base = np.full(count, -1, dtype=np.int32)
    own = np.zeros((count, 2), dtype=np.uint64)
    known = zero
    if former is not None and len(former.hashes):
        if former.pages is None:
            own[~zero] = digests(pages, np.flatnonzero(~zero))
            known = np.ones(count, dtype=np.bool_)
        equal, alone = _equals(pages, found, own, zero, former)
        if former.pages is not None and former.digests is not None:
            own[equal >= 0] = former.digests[equal[equal >= 0]]
            known = zero | (equal >= 0)
        anchors = np.flatnonzero(alone & (equal >= 0)).astype(np.int32)
        same = equal.copy()
        if renew is not None:
            same[(equal >= 0) & renew[equal]] = -1
        _find_bases(pages, zero, equal, anchors, former, renew, base, np.flatnonzero(~zero & (same < 0)))
    twin = _twins(pages, found, np.flatnonzero(~zero & (same < 0)).astype(np.int32), count)
    own[~known] = digests(pages, np.flatnonzero(~known))
    return Plan(zero, same, base, twin, own)


def _equals(pages: Words, found: Words, own: Words, zero: Bools, former: Former) -> tuple[Ints, Bools]:
    """For each page the former page that it equals or -1, and whether that content stood there once only. `own`: digests
    of `pages`, where there are only those of the former ones to compare with."""
    order = np.argsort(former.hashes, kind="stable").astype(np.int32)
    ordered = former.hashes[order]
    at = np.searchsorted(ordered, found)
    at[at == len(ordered)] = 0
    candidate = order[at]
    after = np.minimum(at + 1, len(ordered) - 1)
    alone = (ordered[after] != found) | (after == at)
    hit = np.flatnonzero((ordered[at] == found) & ~zero)
    equal = np.full(len(pages), -1, dtype=np.int32)
    if former.pages is None:
        assert former.digests is not None
        good = (own[hit] == former.digests[candidate[hit]]).all(axis=1)
        equal[hit[good]] = candidate[hit[good]]
        return equal, alone
    for start in range(0, len(hit), _CHUNK):
        mine = hit[start : start + _CHUNK]
        theirs = candidate[mine]
        if _is_run(mine) and _is_run(theirs):  # the common case, without a copy
            left, right = pages[mine[0] : mine[-1] + 1], former.pages[theirs[0] : theirs[-1] + 1]
        else:
            left, right = pages[mine], former.pages[theirs]
        good = (left == right).all(axis=1)
        equal[mine[good]] = theirs[good]
    return equal, alone


def _is_run(indices: NDArray[np.integer]) -> bool:
    return int(indices[-1]) - int(indices[0]) == len(indices) - 1 and bool((np.diff(indices) == 1).all())


def _find_bases(
    pages: Words,
    zero: Bools,
    equal: Ints,
    anchors: Ints,
    former: Former,
    renew: Bools | None,
    base: Ints,
    wanted: NDArray[np.intp],
) -> None:
    """Fill `base` for the `wanted` pages that resemble what stood in their place, reckoned from the nearest unchanged
    pages before and after."""
    shift = (equal[anchors] - anchors) if len(anchors) else np.zeros(1, dtype=np.int32)
    last = len(former.hashes) - 1
    for start in range(0, len(wanted), _CHUNK):
        mine = wanted[start : start + _CHUNK].astype(np.int32)
        right = np.searchsorted(anchors, mine)
        best = np.full(len(mine), _DELTA_WORDS + 1)
        before: Ints | None = None
        for side in (np.maximum(right - 1, 0), np.minimum(right, len(shift) - 1)):
            guess = np.clip(mine + shift[side], 0, last).astype(np.int32)
            fit = np.ones(len(mine), dtype=np.bool_) if renew is None else ~renew[guess]
            if before is not None:
                fit &= guess != before
            before = guess
            look = np.flatnonzero(fit)
            if not len(look):
                continue
            differ = (pages[mine[look]] != former.base_of(guess[look])).sum(axis=1)
            better = differ < best[look]
            base[mine[look[better]]] = guess[look[better]]
            best[look[better]] = differ[better]


def _twins(pages: Words, found: Words, wanted: Ints, count: int) -> Ints:
    twin = np.arange(count, dtype=np.int32)
    if len(wanted):
        _, first, inverse = np.unique(found[wanted], return_index=True, return_inverse=True)
        earliest = wanted[first][inverse.reshape(-1)]
        others = np.flatnonzero(earliest != wanted)
        for start in range(0, len(others), _CHUNK):
            mine, theirs = wanted[others[start : start + _CHUNK]], earliest[others[start : start + _CHUNK]]
            good = (pages[mine] == pages[theirs]).all(axis=1)
            twin[mine[good]] = theirs[good]
    return twin
