"""The `rethaw` command inside a sandbox: what it takes, what it prints, how it ends."""

from __future__ import annotations

import io
import json

import pytest

from rethaw import LocalContext
from rethaw.guest import command
from rethaw.model.errors import InvalidInput


def told(ctx: LocalContext, *argv: str) -> str | None:
    return command.run(*command.parsed(list(argv)), ctx)


def test_messages_and_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = LocalContext(inbox=["hi", {"n": 1}], signals={"go": {"ok": True}}, args={"goal": "x"})
    assert told(ctx, "receive") == '"hi"'
    assert json.loads(told(ctx, "receive", "--whole", "--timeout", "1s") or "") == {
        "number": 2, "id": None, "payload": {"n": 1},
    }  # fmt: skip
    assert json.loads(told(ctx, "wait", "go", "--timeout=1h") or "") == {"ok": True}
    told(ctx, "send", "plain text")
    told(ctx, "send", "--json", "[1, 2]")
    told(ctx, "send", "--", "--json")
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    told(ctx, "send", "-")
    assert ctx.outbox == ["plain text", [1, 2], "--json", "from stdin"]
    assert told(ctx, "args") == '{"goal": "x"}'


def test_time_events_and_result() -> None:
    ctx = LocalContext()
    told(ctx, "sleep", "10m")
    assert ctx.slept == [600.0]
    told(ctx, "emit", "step", '{"name": "build", "n": 3}')
    told(ctx, "emit", "bare")
    assert told(ctx, "snapshot") == "snap_local"
    lines = (told(ctx, "history") or "").splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["step", "bare"]
    assert told(ctx, "history", "--after", "2") is None
    told(ctx, "result", "42")
    assert ctx.value == 42
    assert json.loads(told(ctx, "info") or "")["session"] == "s_local"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fly"], "'fly' is no command"),
        (["receive", "now"], "takes 0 words"),
        (["send"], "takes 1 words"),
        (["emit", "a", "b", "c"], "takes 1 or 2 words"),
        (["wait", "x", "--timeout"], "--timeout of rethaw wait needs a value"),
        (["wait", "x", "--for", "1s"], "no option '--for'"),
        (["sleep", "soon"], "'soon'"),
        (["emit", "x", "[1]"], "no JSON object"),
        (["emit", "x", "{"], "not JSON"),
        (["send", "--json", "nope"], "the message is not JSON"),
        (["history", "--after", "-1"], "'-1' is no position"),
    ],
)
def test_what_does_not_fit_is_named(argv: list[str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        told(LocalContext(), *argv)


def test_how_it_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Context", LocalContext)
    assert command.main(["receive", "--timeout", "1s"]) == 7
    assert command.main(["fly"]) == 2
    assert command.main([]) == 2
    assert command.main(["send", "--help"]) == 0
    assert command.main(["info"]) == 0
    out, err = capsys.readouterr()
    assert "no message came within 1s" in err
    assert json.loads(out.splitlines()[-1])["session"] == "s_local"
    monkeypatch.undo()
    monkeypatch.setenv("RETHAW_SOCKET", "/nowhere/context.sock")
    assert command.main(["info"]) == 6
    assert "nothing answers at /nowhere/context.sock" in capsys.readouterr().err
