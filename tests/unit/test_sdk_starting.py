"""How a session is started: what the options check, and how those of a start go over those of a definition."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rethaw.model.errors import InvalidInput
from rethaw.model.types import StartOptions
from rethaw.sdk.agents import agent
from rethaw.sdk.listing import wanted
from rethaw.sdk.starting import Starting, starting


@agent(queue="reports", priority=3, ttl="1h", tags=["a", "b"])
def made(ctx: Any) -> None: ...


def test_options_of_a_start_go_over_those_of_the_definition() -> None:
    assert made.starting == Starting(queue="reports", priority=3, ttl=3600.0, tags=("a", "b"))
    one = made.with_options(priority=0, delay="10s", tags=["b", "c"], concurrency_key="k", key="x")
    assert one.starting.wire() == {
        "queue": "reports", "priority": 0, "delay_s": 10.0, "ttl_s": 3600.0, "concurrency_key": "k", "tags": ("a", "b", "c"),
    }  # fmt: skip
    assert one.key == "x" and made.key is None and made.starting.priority == 3
    assert StartOptions(**one.starting.wire()).tags == ("a", "b", "c")
    assert starting(**one.starting.given()) == one.starting
    assert Starting().wire() == {} and starting(delay=0).wire() == {"delay_s": 0.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"queue": ""}, "'' cannot be a queue's name"),
        ({"queue": "a b"}, "'a b' cannot be a queue's name"),
        ({"priority": 1.5}, "priority 1.5"),
        ({"priority": True}, "priority True"),
        ({"priority": 10**7}, "priority 10000000"),
        ({"delay": "soon"}, "'soon' is not a duration"),
        ({"delay": "400d"}, "a delay of"),
        ({"ttl": 0}, "a ttl of 0 s"),
        ({"tags": "abc"}, "pass a list: ['abc']"),
        ({"tags": ["a\n"]}, "cannot be a tag"),
        ({"tags": ["\ud800"]}, "cannot be a tag"),
        ({"tags": [""]}, "'' cannot be a tag"),
        ({"concurrency_key": "x" * 201}, "cannot be a concurrency key"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], said: str) -> None:
    for make in (lambda: starting(**given), lambda: made.with_options(**given)):
        with pytest.raises(InvalidInput) as caught:
            make()
        assert said in str(caught.value)


def test_filters_of_a_list() -> None:
    assert wanted().params == {}
    assert wanted(state="failed", tag=["a", "b"], search="x").params == {
        "state": ["failed"],
        "tag": ["a", "b"],
        "search": "x",
    }
    at = datetime(2026, 1, 31, 9, tzinfo=UTC)
    assert datetime.fromisoformat(str(wanted(created_after=at).params["created_after"])) == at
    there = datetime.fromisoformat(str(wanted(created_before="2026-01-31").params["created_before"]))
    assert there == datetime(2026, 1, 31).astimezone()
    ago = datetime.now(UTC) - datetime.fromisoformat(str(wanted(created_after="2h").params["created_after"]))
    assert timedelta(hours=2, seconds=-1) < ago < timedelta(hours=2, seconds=5)
    for wrong, said in (
        ({"state": "tired"}, "'tired' is not a state"),
        ({"created_after": "yore"}, "'yore' is not a time"),
    ):
        with pytest.raises(InvalidInput) as caught:
            wanted(**wrong)
        assert said in str(caught.value)
