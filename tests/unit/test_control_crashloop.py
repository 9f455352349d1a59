"""The crash-loop rule of DESIGN §8, without a database."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rethaw.control.crashloop import Death, Level, Loop, Step, next_step
from rethaw.control.policy import Policy

POLICY = Policy()


def deaths(loop: Loop, death: Death, limit: int = 100) -> list[Step]:
    """The steps that follow when the session dies the same way again and again."""
    out: list[Step] = []
    for _ in range(limit):
        loop, step = next_step(loop, death, POLICY)
        out.append(step)
        if step == Step.FAIL:
            break
    return out


def test_three_deaths_then_parent_then_fresh_then_failed() -> None:
    first = Death(counted=True, progress=5, at_start=0, snapshot=True, parent=True)
    loop, step = next_step(Loop(), first, POLICY)  # a first crash, after work
    assert step == Step.SAME
    again = Death(counted=True, progress=5, at_start=5, snapshot=True, parent=True)
    assert deaths(loop, again) == [
        Step.SAME, Step.SAME, Step.PARENT,
        Step.SAME, Step.SAME, Step.FRESH,
        Step.SAME, Step.SAME, Step.FAIL,
    ]  # fmt: skip


def test_without_a_parent_it_boots_fresh() -> None:
    death = Death(counted=True, progress=1, at_start=1, snapshot=True, parent=False)
    assert deaths(Loop(high=1), death) == [Step.SAME, Step.SAME, Step.FRESH, Step.SAME, Step.SAME, Step.FAIL]


def test_without_a_snapshot_it_fails_after_three() -> None:
    death = Death(counted=True, progress=0, at_start=0, snapshot=False, parent=False)
    assert deaths(Loop(), death) == [Step.SAME, Step.SAME, Step.FAIL]


def test_doing_the_same_again_is_no_progress() -> None:
    """An agent that always dies at its fifth step is given up, though it logs steps anew after each way back."""
    loop, _ = next_step(Loop(), Death(True, 5, 0, True, True), POLICY)
    again = Death(counted=True, progress=5, at_start=2, snapshot=True, parent=True)
    assert deaths(loop, again)[-1] == Step.FAIL
    assert len(deaths(loop, again)) == 29  # with the first, ten at each of three levels: the total's limit


def test_lost_nodes_are_not_the_agents_fault() -> None:
    death = Death(counted=False, progress=3, at_start=3, snapshot=True, parent=True)
    assert set(deaths(Loop(high=3), death)) == {Step.SAME}


@given(st.lists(st.integers(min_value=1, max_value=5), min_size=1, max_size=60))
def test_an_agent_that_gets_further_each_time_is_never_given_up(gains: list[int]) -> None:
    loop, done = Loop(), 0
    for gain in gains:
        start, done = done, done + gain
        loop, step = next_step(loop, Death(True, done, start, True, True), POLICY)
        assert step == Step.SAME
        assert loop.level == Level.NEWEST


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=31, max_size=80))
def test_an_agent_that_never_gets_further_is_given_up(lives: list[tuple[int, int]]) -> None:
    loop, steps = Loop(high=6), []
    for a, b in lives:
        loop, step = next_step(loop, Death(True, max(a, b), min(a, b), True, True), POLICY)
        steps.append(step)
        if step == Step.FAIL:
            return
    raise AssertionError(steps)
