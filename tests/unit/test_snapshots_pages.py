"""Comparing pages: what a plan says of a page is true of its bytes, whatever hashes collide."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import Memory, changed, noise, seeds, steps

from rethaw.snapshots import pages
from rethaw.snapshots.pages import PAGE, Bools, Former, Plan, Words

WORDS = PAGE // 8


def former_of(
    content: Words, deltas: Sequence[int] = (), found: Words | None = None, *, in_memory: bool = True
) -> Former:
    """As if the pages in `deltas` were stored as deltas against pages of noise."""
    row = np.full(len(content), -1, dtype=np.int32)
    row[list(deltas)] = np.arange(len(deltas), dtype=np.int32)
    bases = pages.as_pages(noise(99, PAGE * len(deltas))).copy() if deltas else np.empty((0, WORDS), dtype=np.uint64)
    found = pages.hashes(content) if found is None else found
    former = Former(content, found, row, bases, pages.digests(content, np.arange(len(content))))
    if in_memory:
        return former
    return Former(None, found, np.full_like(row, -1), bases[:0], former.digests, read=former.base_of)


def check(content: Words, plan: Plan, former: Former | None, renew: Bools | None) -> None:
    assert np.array_equal(plan.digests[~plan.zero], pages.digests(content, np.flatnonzero(~plan.zero)))
    whole, deltas = plan.stored()
    stored = set(whole.tolist()) | set(deltas.tolist())
    for n, page in enumerate(content):
        if plan.zero[n]:
            assert not page.any()
            assert n not in stored
        elif plan.same[n] >= 0:
            assert former is not None
            assert former.pages is not None
            assert np.array_equal(page, former.pages[plan.same[n]])
            assert renew is None or not renew[plan.same[n]]
            assert n not in stored
        elif plan.twin[n] != n:
            assert plan.twin[n] < n
            assert np.array_equal(page, content[plan.twin[n]])
            assert plan.twin[n] in stored
            assert n not in stored
        else:
            assert n in stored
            if plan.base[n] >= 0:
                assert former is not None
                base = former.base_of(plan.base[[n]])[0]
                assert int((page != base).sum()) <= WORDS // 2
                assert renew is None or not renew[plan.base[n]]


def test_any_buffer_becomes_pages() -> None:
    for size in (0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE):
        data = noise(size, size)
        rows = pages.as_pages(data)
        assert rows.shape == (-(-size // PAGE), WORDS)
        assert rows.tobytes() == data.ljust(len(rows) * PAGE, b"\0")


def test_a_word_that_changes_changes_the_hash() -> None:
    rng = np.random.default_rng(1)
    content = pages.as_pages(noise(1, 300 * PAGE)).copy()
    before = pages.hashes(content)
    content[np.arange(300), rng.integers(0, WORDS, 300)] ^= np.uint64(1) << rng.integers(0, 64, 300, dtype=np.uint64)
    assert (pages.hashes(content) != before).all()
    assert len(np.unique(before)) == 300


def test_zeros_are_found_by_their_bytes() -> None:
    content = np.zeros((5, WORDS), dtype=np.uint64)
    content[1, 7] = 1
    assert pages.zeros(content, np.zeros(5, dtype=np.uint64)).tolist() == [True, False, True, True, True]
    assert pages.zeros(content, pages.hashes(content)).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize(("words", "delta"), [(1, True), (256, True), (257, False), (512, False)])
def test_few_changed_words_make_a_delta(words: int, delta: bool) -> None:
    former = pages.as_pages(noise(1, 20 * PAGE))
    content = former.copy()
    content[9, :words] += np.uint64(1)
    plan = pages.plan(content, pages.hashes(content), former_of(former))
    whole, deltas = plan.stored()
    assert (whole.tolist(), deltas.tolist()) == (([], [9]) if delta else ([9], []))
    assert not delta or plan.base[9] == 9
    assert plan.same.tolist() == [n if n != 9 else -1 for n in range(20)]


def test_a_base_is_looked_for_where_the_page_moved_to() -> None:
    former = pages.as_pages(noise(1, 60 * PAGE))
    content = np.concatenate([former[:10], pages.as_pages(noise(2, 5 * PAGE)), former[10:30], former[33:]])
    content[20, 3] = 7  # formerly 15, pages in between came
    content[50, 3] = 7  # formerly 48, and others went
    plan = pages.plan(content, pages.hashes(content), former_of(former))
    assert (plan.base[20], plan.base[50]) == (15, 48)


def test_a_delta_refers_to_what_a_former_delta_refers_to() -> None:
    """One hop, however long the chain of saves."""
    content = pages.as_pages(noise(1, 10 * PAGE)).copy()
    former = former_of(content.copy(), deltas=[4])
    former.bases[0] = content[4]
    former.bases[0, 0] += np.uint64(1)
    content[4, 100] += np.uint64(1)
    plan = pages.plan(content, pages.hashes(content), former)
    assert plan.base[4] == 4
    assert int((former.base_of(plan.base[[4]])[0] != content[4]).sum()) == 2


def test_pages_that_must_not_be_referred_to() -> None:
    former = pages.as_pages(noise(1, 20 * PAGE))
    content = former.copy()
    content[5, 0] += np.uint64(1)
    content[6, 0] += np.uint64(1)
    renew = np.zeros(20, dtype=np.bool_)
    renew[[3, 5]] = True
    plan = pages.plan(content, pages.hashes(content), former_of(former), renew)
    whole, deltas = plan.stored()
    assert (whole.tolist(), deltas.tolist()) == ([3, 5], [6])


def test_many_equal_pages_are_stored_once() -> None:
    content = np.full((5000, WORDS), 7, dtype=np.uint64)
    content[::2] = 9
    plan = pages.plan(content, pages.hashes(content), None)
    assert plan.stored()[0].tolist() == [0, 1]
    assert set(plan.twin.tolist()) == {0, 1}
    check(content, plan, None, None)


@settings(deadline=None, max_examples=100)
@given(steps, seeds, st.sampled_from([64, 3, 1, 0]), st.booleans(), st.booleans())
def test_plans_are_true(names: list[str], seed: int, bits: int, compared: bool, renewing: bool) -> None:
    """`bits`: how many of each hash count. And they are the same when the former pages are not in memory."""
    rng = random.Random(seed)
    before = changed(Memory([noise(n % 11, PAGE) for n in range(25)] + [bytes(PAGE)] * 2, b"end"), names[:1], seed + 1)
    content = pages.as_pages(changed(before, names, seed).data)
    former_pages = pages.as_pages(before.data)

    def cut(rows: Words) -> Words:
        return pages.hashes(rows) & np.uint64((1 << bits) - 1)

    former = renew = None
    deltas: list[int] = []
    if compared:
        deltas = rng.sample(range(len(former_pages)), len(former_pages) // 3)
        former = former_of(former_pages, deltas, cut(former_pages))
        renew = (
            ~former_pages.any(axis=1) if not renewing else np.array([rng.random() < 0.4 for _ in former_pages], bool)
        )
    plan = pages.plan(content, cut(content), former, renew)
    check(content, plan, former, renew)
    if compared:
        thin = pages.plan(
            content, cut(content), former_of(former_pages, deltas, cut(former_pages), in_memory=False), renew
        )
        for name in ("zero", "same", "base", "twin", "digests"):
            assert np.array_equal(getattr(plan, name), getattr(thin, name)), name
