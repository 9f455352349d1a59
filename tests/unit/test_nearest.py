"""What somebody probably meant."""

from __future__ import annotations

import pytest

from rethaw.model.ids import new_id
from rethaw.model.nearest import did_you_mean, nearest, nearest_id

ID = "s_06h2m0ne153z7807byh3"


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [("reseacher", "researcher"), ("RESEARCHER", "researcher"), ("Writr", "Writer"), ("gardener", None), ("", None)],
)
def test_a_name(wanted: str, meant: str | None) -> None:
    assert nearest(wanted, ["researcher", "Writer", "x"]) == meant


@pytest.mark.parametrize(
    "wanted",
    [
        "s_06h2m1",
        "s_06h2m0nr153",
        "s_60h2m0ne",
        "s_06h2m0n153z",
        "s_06h2m0nne153z",
        ID[:-1] + "4",
        ID + "3",
        "s_x6h2m0",
    ],
)
def test_an_id_with_one_mistake(wanted: str) -> None:
    assert nearest_id(wanted, [ID, "s_0000000000000000000a"]) == ID


@pytest.mark.parametrize("wanted", ["s_06h2", "s_16h2m1ne", "s_zzzzzzzzzz", "", "s_06h2m0xx"])
def test_an_id_with_more_than_that_is_not_guessed(wanted: str) -> None:
    assert nearest_id(wanted, [ID]) is None


def test_nothing_is_said_of_two_that_are_as_near() -> None:
    assert nearest_id("s_06h2m9", [ID, "s_06h2m1ne153z7807byh3"]) is None


def test_a_full_id_of_something_else_is_not_taken_for_a_mistake() -> None:
    known = [new_id("s") for _ in range(200)]
    assert all(nearest_id(new_id("s"), known) is None for _ in range(50))


def test_the_remedy() -> None:
    assert did_you_mean("dialy", ["daily"], "see the list") == "did you mean 'daily'?"
    assert did_you_mean("zebra", ["daily"], "see the list") == "see the list"
