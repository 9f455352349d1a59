"""What is said when there is no server, another one, or one that does not know us: one line, with what to do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import rethaw
from rethaw.cli.main import main
from rethaw.sdk import agents, credentials
from rethaw.sdk.agents import find

REMEDY = "rethaw up"
AGENT = "import rethaw\n@rethaw.agent\ndef one(ctx): return 1\n"


class Picky(BaseHTTPRequestHandler):
    """Knows the token "right", and nothing else of Rethaw than its errors and an empty list of sessions."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        given = self.headers.get("authorization")
        if given == "Bearer right":
            self._answer(200, {"sessions": [], "next": None})
        else:
            said = "the token is missing" if given is None else "the token is wrong"
            self._answer(401, {"error": {"code": "unauthorized", "message": said, "remedy": REMEDY}})

    do_POST = do_GET

    def _answer(self, status: int, body: object) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def picky() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Picky) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def nowhere() -> str:
    """Nobody listens there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def lines(capsys: pytest.CaptureFixture[str], *command: str, code: int) -> str:
    assert main(command) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


@pytest.fixture(params=["ls", "run", "shell", "agent.start"])
def attempt(
    request: pytest.FixtureRequest, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> object:  # fmt: skip
    """Calls it and gives the line that it says."""
    file = tmp_path / "one.py"
    file.write_text(AGENT)
    monkeypatch.setattr(agents, "_shared", [])

    def do(code: int) -> str:
        if request.param == "agent.start":
            with pytest.raises(rethaw.RethawError) as caught:
                find(file).start()
            assert caught.value.exit_code == code
            return str(caught.value)
        command = {"ls": ["ls"], "run": ["run", str(file)], "shell": ["shell", "snap_1"]}[request.param]
        return lines(capsys, *command, code=code)

    return do


def test_no_server_is_set(attempt: object, monkeypatch: pytest.MonkeyPatch, nowhere: str) -> None:
    assert callable(attempt)
    monkeypatch.setattr(credentials, "DEFAULT_URL", nowhere)
    said = attempt(6)
    assert (
        f"no Rethaw server is set, and none answers at {nowhere}; start one with `sudo rethaw up`, or set RETHAW_"
        in said
    )


def test_the_server_of_the_credentials_is_down(attempt: object, nowhere: str) -> None:
    assert callable(attempt)
    path = credentials.save(nowhere, "right")
    said = attempt(6)
    assert f"no Rethaw server answers at {nowhere} (which {path} names); start it with `sudo rethaw up`" in said


def test_the_server_of_the_environment_is_down(
    attempt: object, monkeypatch: pytest.MonkeyPatch, nowhere: str, picky: str
) -> None:
    assert callable(attempt)
    credentials.save(picky, "right")
    monkeypatch.setenv("RETHAW_URL", nowhere)
    assert f"no Rethaw server answers at {nowhere}; start it with `sudo rethaw up`, or set RETHAW_URL" in attempt(6)


def test_a_token_that_is_old_or_missing(attempt: object, monkeypatch: pytest.MonkeyPatch, picky: str) -> None:
    assert callable(attempt)
    path = credentials.save(picky, "of another server")
    assert f"the token is wrong; {REMEDY} (yours: {path})" in attempt(3)
    monkeypatch.setenv("RETHAW_URL", picky)
    monkeypatch.setenv("RETHAW_TOKEN", "typo")
    assert f"the token is wrong; {REMEDY} (yours: RETHAW_TOKEN)" in attempt(3)
    monkeypatch.delenv("RETHAW_TOKEN")
    credentials.save("http://127.0.0.1:1", "right")
    assert f"the token is missing; {REMEDY} (yours: {path} (which is for http://127.0.0.1:1))" in attempt(3)


def test_a_damaged_file_and_a_server_without_tls(attempt: object, home: Path, picky: str) -> None:
    assert callable(attempt)
    path = credentials.save(picky.replace("http:", "https:"), "right")
    said = attempt(6)
    assert "cannot be spoken to: [SSL" in said and "check https and the certificate" in said
    path.write_text("{")
    assert f"{path} is damaged; remove it and run `rethaw up` again" in attempt(2)


def test_a_program_follows_the_credentials(
    home: Path, picky: str, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "_shared", [])
    look = agents._default_client  # pyright: ignore[reportPrivateUsage]
    credentials.save(nowhere, "old")
    with pytest.raises(rethaw.Unavailable):
        look().sessions.list()
    credentials.save(picky, "right")  # the server was started anew meanwhile
    assert look().sessions.list() == [] and look() is look()


def test_up_gives_credentials_of_a_server_that_runs_already(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], picky: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "token").write_text("right\n")
    stands = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "rethaw"])
    try:
        (data / "server.json").write_text(json.dumps({"url": picky, "pid": stands.pid}))
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.delenv("SUDO_USER", raising=False)
        user = credentials.User("me", 0, os.getegid(), home)
        monkeypatch.setattr(credentials, "invoking_user", lambda: user)
        assert main(["up", "--detach", "--data-dir", str(data)]) == 0
        err = capsys.readouterr().err
        assert "it runs already" in err and f"credentials for me in {user.path}" in err
    finally:
        stands.send_signal(signal.SIGKILL)
        stands.wait()
    assert main(["ls"]) == 0
