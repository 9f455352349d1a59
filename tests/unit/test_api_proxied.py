"""What of a guest's answer is changed so that it stays below its path, and links."""

from __future__ import annotations

import time

import pytest

from rethaw.api.doors import Door
from rethaw.api.links import Links
from rethaw.api.proxied import below, cookie
from rethaw.model.errors import Forbidden, InvalidInput

PREFIX = "/sessions/s_1/ports/3000"
DOOR = Door("s_1", 3000, PREFIX, "/", [], "http", "1.2.3.4", own=("http://here:7420", "https://here:7420"))


@pytest.mark.parametrize(
    ("said", "outside"),
    [
        ("/login?next=/", PREFIX + "/login?next=/"),
        ("relative", "relative"),
        ("?page=2", "?page=2"),
        ("http://localhost:3000/a#b", PREFIX + "/a#b"),
        ("http://127.0.0.1:3000", PREFIX + "/"),
        ("http://here:7420/a", PREFIX + "/a"),
        ("https://here:7420" + PREFIX + "/a", PREFIX + "/a"),
        (PREFIX + "/a", PREFIX + "/a"),
        (PREFIX + "1/a", PREFIX + PREFIX + "1/a"),
        ("http://localhost:4000/a", "http://localhost:4000/a"),
        ("https://example.com/a", "https://example.com/a"),
        ("//example.com/a", "//example.com/a"),
        ("http://[bad", "http://[bad"),
    ],
)
def test_redirects(said: str, outside: str) -> None:
    assert below(DOOR, said) == outside


@pytest.mark.parametrize(
    ("said", "outside"),
    [
        ("a=1", f"a=1; Path={PREFIX}/"),
        ("a=1; Path=/; Domain=here; Secure", f"a=1; Secure; Path={PREFIX}/"),
        ("a=1; path=/app", f"a=1; Path={PREFIX}/app"),
        (f"a=1; Path={PREFIX}/x", f"a=1; Path={PREFIX}/x"),
        (f"a=1; Path={PREFIX}1/x", f"a=1; Path={PREFIX}{PREFIX}1/x"),
        ("a=1; Path=/sessions/s_2/ports/3000/", f"a=1; Path={PREFIX}/sessions/s_2/ports/3000/"),
        ("rethaw_link=1; Path=/", None),
    ],
)
def test_cookies(said: str, outside: str | None) -> None:
    assert cookie(DOOR, said) == outside


def test_a_link_is_for_one_port_one_session_and_one_time() -> None:
    links = Links(b"k" * 32, "http://here:7420/")
    url, until = links.make("s_1", 3000, 60)
    assert url.startswith(f"http://here:7420{PREFIX}/?rethaw_link=")
    text = url.rpartition("=")[2]
    assert 55 < links.left_s("s_1", 3000, text) <= 60 and abs(until.timestamp() - time.time() - 60) < 5
    for session, port, given in (
        ("s_2", 3000, text),
        ("s_1", 3001, text),
        ("s_1", 3000, text[:-1]),
        ("s_1", 3000, ""),
        ("s_1", 3000, "é.x"),
    ):
        with pytest.raises(Forbidden, match="this link is not for port"):
            links.left_s(session, port, given)
    with pytest.raises(Forbidden):
        Links(b"other", "http://here").left_s("s_1", 3000, text)
    with pytest.raises(Forbidden, match="has expired"):
        links.left_s("s_1", 3000, links._sign("s_1", 3000, int(time.time()) - 1))
    for wrong in (0, 31 * 86400.0, float("nan")):
        with pytest.raises(InvalidInput, match="use 1s to 30d"):
            links.make("s_1", 3000, wrong)
