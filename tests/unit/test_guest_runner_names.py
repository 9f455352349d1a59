"""Whether an agent failed for a name that it could not resolve, however its client says so."""

from __future__ import annotations

import socket
import urllib.error

import pytest

from rethaw.guest.runner import _wanted_a_name


def _caused(outer: BaseException, inner: BaseException) -> BaseException:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (urllib.error.URLError(socket.gaierror(-3, "no")), True),
        (_caused(ConnectionError("x"), _caused(ConnectionError("y"), socket.gaierror(-2, "no"))), True),
        (ConnectionRefusedError("x"), False),
        (ValueError("gaierror"), False),
    ],
)
def test_a_name_was_wanted(error: BaseException, so: bool) -> None:
    assert _wanted_a_name(error) is so


def test_an_error_that_is_its_own_cause_is_no_trap() -> None:
    error = ValueError("x")
    error.__context__ = other = ValueError("y")
    other.__context__ = error
    assert not _wanted_a_name(error)
