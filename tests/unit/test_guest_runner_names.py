"""Whether an agent failed because it may connect to nothing, however its client says so."""

from __future__ import annotations

import errno
import socket
import urllib.error

import pytest

from rethaw.guest.runner import _wanted_a_host


def _caused(outer: BaseException, inner: BaseException) -> BaseException:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (urllib.error.URLError(socket.gaierror(-3, "no")), True),
        (_caused(ConnectionError("x"), _caused(ConnectionError("y"), socket.gaierror(-2, "no"))), True),
        (urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is unreachable")), True),
        (ConnectionRefusedError("x"), False),
        (ValueError("gaierror"), False),
    ],
)
def test_a_host_was_wanted(error: BaseException, so: bool) -> None:
    assert _wanted_a_host(error) is so


def test_an_error_that_is_its_own_cause_is_no_trap() -> None:
    error = ValueError("x")
    error.__context__ = other = ValueError("y")
    other.__context__ = error
    assert not _wanted_a_host(error)
