"""What `rethaw run -it` and `rethaw attach` make of a command line, and what a terminal adds to an agent's definition."""

from __future__ import annotations

from pathlib import Path

import pytest

from rethaw.cli.arguments import apart, prepared
from rethaw.cli.attaching import DETACH_KEYS, keys_of
from rethaw.cli.joined import Joined, copies_of
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.types import AgentSpec, TerminalSpec
from rethaw.model.versions import digest


@pytest.mark.parametrize(
    ("text", "keys"),
    [(DETACH_KEYS, b"\x10\x11"), ("ctrl-a,d", b"\x01d"), ("Ctrl-], q", b"\x1dq"), ("none", b""), ("x", b"x")],
)
def test_keys_to_detach(text: str, keys: bytes) -> None:
    assert keys_of(text) == keys


@pytest.mark.parametrize("text", ["", "ctrl-1", "ctrl-", "ctrl-ab", "a,", "escape", "ctrl-p;ctrl-q", "é"])
def test_keys_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInput, match="is no key"):
        keys_of(text)


def test_short_options_may_be_written_together() -> None:
    assert apart(["-it", "--image", "base", "--", "ls", "-it"]) == ["-i", "-t", "--image", "base", "--", "ls", "-it"]
    assert apart(["-dit", "-d", "-e", "X=1", "-tx", "--it"]) == ["-d", "-i", "-t", "-d", "-e", "X=1", "-tx", "--it"]
    line = ["run", "-it", "--image", "base", "--mount-copy", ".", "--", "sh"]
    assert prepared(line) == ["run", "-i", "-t", *line[2:]]


def test_copies_of_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    assert [copy.target for copy in copies_of([".", "a:b:/data/x/"])] == ["/work", "/data/x"]
    assert [copy.addition.source for copy in copies_of([".", "a:b:/data"])] == [tmp_path, tmp_path / "a:b"]
    with pytest.raises(InvalidInput, match="two directories"):
        copies_of([".", str(tmp_path)])
    with pytest.raises(InvalidInput, match="made anew"):
        copies_of([".:/tmp/x"])
    with pytest.raises(NotFound, match="no directory"):
        copies_of(["gone"])


def test_what_does_not_fit_together() -> None:
    for joined, image, word in (
        (Joined(interactive=True), None, "--image"),
        (Joined(tty=True), "base", "terminal"),
        (Joined(detach_keys="x"), "base", "-t"),
    ):
        with pytest.raises(InvalidInput, match=word):
            joined.checked(image, detached=False, json=False)
    with pytest.raises(InvalidInput, match="--rm"):
        Joined(rm=True).checked("base", detached=True, json=False)
    assert Joined(interactive=True, tty=True).checked("base", detached=True, json=False).tty


def test_an_agent_without_a_terminal_is_written_as_ever() -> None:
    plain = AgentSpec(name="x", command=("sh",))
    assert "terminal" not in plain.model_dump() and "stdin" not in plain.model_dump()
    assert digest(plain) == "d3f5d7764dffea50637aee62c4d0471c4f3d7ea41fb03ac998c73d2318a9d849"


def test_the_size_of_a_terminal_makes_no_version() -> None:
    plain = AgentSpec(name="x", command=("sh",))
    small = plain.model_copy(update={"terminal": TerminalSpec(rows=24, cols=80)})
    large = plain.model_copy(update={"terminal": TerminalSpec(rows=50, cols=200, kind="linux")})
    assert digest(small) == digest(large) != digest(plain)
