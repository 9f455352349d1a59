"""Bad input: each gives one clear line that names the value and the remedy, a fitting exit code or HTTP status, and
loses nothing."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_agents import Agents
from e2e_cli import as_nobody, refused
from e2e_fixtures import ENGINE, SLOWER, House, Session, house

from rethaw.model.errors import AmbiguousId, InvalidInput, KeyReused, NotFound, TooLarge
from rethaw.testing import processes

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(120 * SLOWER),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]
agents = Agents()
MIB = 1 << 20
MESSAGE_LIMIT = 1 * MIB


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    with house(providers={"keyless": {"base_url": "http://127.0.0.1:9", "key_env": "RETHAW_TEST_NO_SUCH_KEY"}}) as h:
        yield h


@pytest.fixture
def home(shared: House) -> House:
    shared.provider.reset()
    return shared


def raw(
    home: House, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    at = urllib.parse.urlsplit(home.server.url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def final(session: Session, timeout_s: float = 60.0) -> dict[str, Any]:
    session.until_state("completed", "failed", "cancelled", timeout_s=timeout_s)
    return session.view


def count(home: House) -> int:
    return len(home.server.request("GET", "/v1/sessions")["sessions"])


# ---------------------------------------------------------------- names


def test_unknown_agent_file_or_function(home: House, tmp_path: Path) -> None:
    before = count(home)
    good, broken, empty = (tmp_path / name for name in ("good.py", "broken.py", "empty.py"))
    good.write_text("import rethaw\n@rethaw.agent\ndef coder(ctx):\n    return 1\n")
    broken.write_text("def (:\n")
    empty.write_text("x = 1\n")
    refused(home.server.cli("run", "nosuch.py", check=False, cwd=tmp_path), 4, "nosuch.py")
    refused(home.server.cli("run", f"{good}::writer", check=False), 4, "'writer'", "coder")
    refused(home.server.cli("run", str(broken), check=False), 2, "broken.py", "line 1")
    refused(home.server.cli("run", str(empty), check=False), 2, "empty.py", "@rethaw.agent")
    refused(home.server.cli("run", str(good), "--task", "x", check=False), 2, "'task'")
    refused(home.server.cli("run", str(good), "--memory", "lots", check=False), 2, "'lots'")
    assert count(home) == before


WRONG_ENTRY = agents.add("def main(ctx):\n    pass\n")


def test_an_entry_that_is_not_in_the_code_fails_the_session_in_one_line(home: House) -> None:
    for entry, words in (("agent.py::nosuch", ("nosuch", "agent.py")), ("nosuch.py::main", ("nosuch.py",))):
        session = agents.start(home, WRONG_ENTRY, entry=entry)
        view = final(session)
        assert (view["state"], view["exit_code"]) == ("failed", 1)
        said = session.output("stderr").splitlines()
        assert len(said) == 1, said
        assert all(word in said[0] for word in words)
        assert session.output() == ""


def test_unknown_image(home: House) -> None:
    before = count(home)
    refused(home.server.cli("run", "--image", "nosuch", "--", "true", check=False), 4, "'nosuch'", "base")
    assert count(home) == before


def test_an_image_that_cannot_be_built_fails_the_session_and_names_the_package(home: House) -> None:
    for image, said in (({"suite": "trixy"}, "trixy"), ({"apt": ["no/such package"]}, "no/such package")):
        view = final(home.start({"name": "t", "command": ["true"], "image": image}))
        assert (view["state"], view["reason"]) == ("failed", "image_failed")
        assert said in view["detail"]


def test_unknown_code(home: House) -> None:
    with pytest.raises(NotFound, match="0" * 64):
        home.start({"name": "t", "entry": "agent.py::main", "code": "0" * 64})


@pytest.mark.parametrize("command", [("show",), ("why",), ("suspend",), ("rm",), ("logs", "-f")])
def test_unknown_session(home: House, command: tuple[str, ...]) -> None:
    refused(home.server.cli(*command, "s_nosuch", check=False), 4, "'s_nosuch'", "rethaw ls")


def test_unknown_session_over_http(home: House) -> None:
    paths = ("", "/why", "/events", "/logs", "/messages", "/outbox", "/snapshots", "/result", "/exchanges")
    for path in paths:
        with pytest.raises(NotFound, match="s_nosuch"):
            home.server.request("GET", f"/v1/sessions/s_nosuch{path}")
    for path in ("suspend", "resume", "cancel", "crash", "snapshots", "signals/x"):
        with pytest.raises(NotFound, match="s_nosuch"):
            home.server.request("POST", f"/v1/sessions/s_nosuch/{path}", {"payload": 1} if "/" in path else {})
    for path in ("/v1/exchanges/x_nosuch/request", "/v1/nosuch", "/v1/sessions/%00", "/v1/sessions/%ff%fe"):
        with pytest.raises(NotFound):
            home.server.request("GET", path)


def test_ambiguous_prefix(home: House) -> None:
    first = home.start({"name": "t", "command": ["true"]})
    second = home.start({"name": "t", "command": ["true"]})
    common = next(n for n in range(len(first.id)) if first.id[n] != second.id[n])
    shared = first.id[:common]
    refused(home.server.cli("show", shared, check=False), 4, repr(shared), first.id, second.id)
    with pytest.raises(AmbiguousId, match=first.id):
        home.server.request("GET", f"/v1/sessions/{shared}")
    assert json.loads(home.server.cli("show", first.id, "--json").stdout)["id"] == first.id
    for wild in ("%25", "_", "s_%25"):
        with pytest.raises((NotFound, AmbiguousId)):
            home.server.request("GET", f"/v1/sessions/{wild}")


def test_key_reused_with_other_arguments(home: House) -> None:
    run = ("run", "-d", "--image", "base", "--key", "nightly")
    first = home.server.cli(*run, "--", "echo", "one").stdout.strip()
    assert home.server.cli(*run, "--", "echo", "one").stdout.strip() == first
    refused(home.server.cli(*run, "--", "echo", "two", check=False), 5, "'nightly'", first)
    with pytest.raises(KeyReused, match=first):
        home.start({"name": "echo", "command": ["echo", "one"]}, {"x": 1}, "nightly")


def test_command_that_does_not_exist_in_the_image(home: House) -> None:
    session = home.start({"name": "t", "command": ["no-such-command", "--really"]})
    view = final(session)
    assert (view["state"], view["reason"], view["exit_code"]) == ("failed", "command_not_found", 127)
    assert "'no-such-command'" in view["detail"]
    done = home.server.cli("run", "--image", "base", "--", "no-such-command", check=False)
    refused(done, 127, "'no-such-command'")


def test_command_that_cannot_be_run_or_a_missing_workdir(home: House) -> None:
    not_executable = home.start({"name": "t", "command": ["/etc/passwd"]})
    nowhere = home.start({"name": "t", "command": ["true"], "workdir": "/no/such/dir"})
    view = final(not_executable)
    assert (view["state"], view["exit_code"]) == ("failed", 126)
    assert "'/etc/passwd'" in view["detail"]
    assert view["reason"] == "boot_failed"
    view = final(nowhere)
    assert (view["state"], view["exit_code"]) == ("failed", 126)
    assert "'/no/such/dir'" in view["detail"]
    assert view["reason"] == "boot_failed"


@pytest.mark.parametrize(
    "field",
    [
        {"entry": "agent.py::main"},
        {"idle_suspend_s": -1},
        {"snapshot_every_s": 0},
        {"snapshot_every_s": -5},
        {"max_duration_s": 0},
        {"max_duration_s": -1},
        {"hold_max_s": -1},
        {"grace_s": -1},
        {"pids": 0},
        {"name": ""},
        {"workdir": "relative"},
        {"env": {"A=B": "x"}},
        {"env": {"": "x"}},
        {"command": [""]},
        {"durability": "eternal"},
        {"memory_bytes": 10 * MIB},
        {"nosuch": 1},
    ],
    ids=lambda f: next(iter(f)) + "=" + str(next(iter(f.values()))),
)
def test_an_agent_that_cannot_be(home: House, field: dict[str, Any]) -> None:
    before = count(home)
    with pytest.raises(InvalidInput) as said:
        home.start({"name": "t", "command": ["true"], **field})
    (name,) = field
    assert any(word in str(said.value) for word in (name, name.removesuffix("_s"), name.removesuffix("_bytes")))
    assert count(home) == before


# ---------------------------------------------------------------- memory and crash loops


def test_more_memory_than_any_node_has_is_refused(home: House) -> None:
    done = home.server.cli("run", "--image", "base", "--memory", "900TiB", "--", "true", check=False)
    refused(done, 2, "943718400 MiB", "no node", "the largest takes", "give it less")


def test_memory_too_small_to_get_up(home: House) -> None:
    refused(home.server.cli("run", "--image", "base", "--memory", "8MiB", "--", "true", check=False), 2, "8 MiB", "32")


HUNGRY = agents.add("""
def main(ctx, save):
    print("up", flush=True)
    if save:
        ctx.snapshot()
    data = []
    while True:
        data.append(bytearray(os.urandom(4 << 20)))
""")


def test_an_agent_that_always_runs_out_of_memory_fails_and_names_the_limit(home: House) -> None:
    before = time.monotonic()
    at_once, after_a_save = (
        agents.start(home, HUNGRY, {"save": save}, memory_bytes=96 * MIB) for save in (False, True)
    )
    for session in (at_once, after_a_save):
        view = final(session, timeout_s=100)
        assert (view["state"], view["reason"]) == ("failed", "out_of_memory"), view
        assert "96 MiB" in view["detail"]
        crashes = session.events("session.crashed", all_lines=True)
        assert {c["data"]["reason"] for c in crashes} == {"out_of_memory"}, [c["data"] for c in crashes]
        assert "96 MiB" in crashes[0]["data"]["detail"]
    tried = [e["data"]["next"] for e in after_a_save.events("session.crashed", all_lines=True)]
    assert tried == ["same", "same", "fresh", "same", "same", "fail"]
    # A snapshot that the restored agent was waiting for is the one it was restored from.
    assert len(after_a_save.events("snapshot.created", all_lines=True)) == 2
    assert time.monotonic() - before < 100 * SLOWER
    refused(home.server.cli("run", "--image", "base", "--memory", "64MiB", "--key", "oom", "--", "python3", "-c",
        "x = bytearray(b'x' * (1 << 30))", check=False), 1, "64 MiB", "memory")  # fmt: skip


GROWING = agents.add("""
def main(ctx):
    done = [e for e in ctx.history() if e["type"] == "message.sent"]
    if not done:
        ctx.send(ask("what I need to know"))  # its answer is paid for once
        ctx.snapshot()
    data = [bytearray(os.urandom(4 << 20)) for _ in range(40)]
    return [len(done), len(data), ctx.fresh]
""")


def test_a_retry_with_more_memory_ends_what_ran_out_of_it(home: House) -> None:
    retries = {"max": 1, "delay_s": 0.1, "on": ["out_of_memory"]}
    session = agents.start(home, GROWING, memory_bytes=96 * MIB, retries=retries)
    view = final(session, timeout_s=100)
    assert (view["state"], view["reason"]) == ("failed", "out_of_memory"), view
    assert view["detail"].startswith("2 attempts failed, last: it runs out of memory again and again")
    (retried,) = session.events("retry.scheduled", all_lines=True)
    assert retried["data"]["after"] == "out of memory"
    refused(home.server.cli("retry", session.id, "--memory", "8MiB", check=False), 2, "8 MiB", "32")
    refused(home.server.cli("retry", session.id, "--memory", "900TiB", check=False), 2, "no node", "the largest takes")
    home.server.cli("retry", session.id, "--memory", "384MiB")
    assert session.result() == [1, 40, True]
    assert home.provider.texts.count("what I need to know") == 1
    assert session.outbox() == ["echo what I need to know"]
    assert "384 MiB" in home.server.cli("show", session.id).stdout


MALICIOUS = agents.add("""
def main(ctx):
    ctx.snapshot()
    ctx.snapshot()
    pid = os.getppid()
    while (above := int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])) > 1:
        pid = above
    try:
        while True:
            with open(f"/proc/{pid}/fd/1", "wb", buffering=0) as channel:
                channel.write(os.urandom(100_000))
            time.sleep(0.01)
    except OSError:  # a microVM's channel has room for guestd alone
        os.kill(pid, signal.SIGKILL)
        time.sleep(60)
""")


def test_an_agent_that_dies_right_after_every_restore_is_given_up(home: House) -> None:
    other = home.start({"name": "other", "command": ["sleep", "300"]})
    other.until_state("running")
    session = agents.start(home, MALICIOUS, retries={"max": 1, "delay_s": 0.1})
    session.until("a retry", lambda s: s.events("retry.scheduled"), timeout_s=100)
    assert session.events("retry.scheduled")[0]["data"]["after"] == "crash loop"
    view = final(session, timeout_s=100)
    assert (view["state"], view["reason"]) == ("failed", "crash_loop"), view
    assert view["detail"].startswith("2 attempts failed, last: it died again and again")
    tried = [e["data"]["next"] for e in session.events("session.crashed", all_lines=True)]
    assert tried[-1] == "fail"
    assert [t for t in tried if t != "same"] == ["parent", "fresh", "fail"] * 2, tried
    assert bool(session.events("channel.malformed", all_lines=True)) == (ENGINE == "gvisor")
    assert other.view["state"] == "running"  # what one guest writes into its channel is nobody else's trouble
    other.post("cancel", {"now": True})
    said = home.server.cli("why", session.id).stdout
    assert "crash_loop" in said


# ---------------------------------------------------------------- requests


SLEEPER = agents.add('def main(ctx):\n    return ctx.wait("on").payload\n')


def test_message_over_the_limit(home: House, tmp_path: Path) -> None:
    session = agents.start(home, SLEEPER)
    fits = "x" * (MESSAGE_LIMIT - 2)
    session.send(fits)
    for path in ("messages", "signals/on"):
        with pytest.raises(TooLarge, match=str(MESSAGE_LIMIT)):
            session.post(path, {"payload": fits + "x"})
        with pytest.raises(TooLarge):
            session.post(path, {"payload": "x" * (40 * MIB)})
    done = subprocess.run(
        [sys.executable, "-m", "rethaw.cli.main", "send", session.id, "-"],
        env=home.server.env, input=fits + "x", check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    refused(done, 2, str(MESSAGE_LIMIT))
    assert len(home.server.request("GET", f"/v1/sessions/{session.id}/messages")["messages"]) == 1
    session.signal("on", "still there")
    assert session.result() == "still there"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/sessions", b'{"agent": ', "malformed JSON"),
        ("/v1/sessions", b"\xff\xfe{}", ""),
        ("/v1/sessions", b"[]", ""),
        ("/v1/sessions", b'{"agent": {"name": "t", "command": ["true"]}, "args": [1]}', "args"),
        ("/v1/sessions", b'{"agent": {"name": "t", "command": "true"}}', "command"),
        ("/v1/sessions", b'{"agent": {"name": "t", "command": ["true"], "memory_bytes": NaN}}', ""),
        ("/v1/sessions", b'{"agent": {"name": "t", "command": ["true"], "grace_s": NaN}}', ""),
        ("/v1/sessions", b'{"agent": {"name": "t", "command": ["true"], "hold_max_s": Infinity}}', ""),
        ("/v1/sessions", b'{"agent": {"name": "a\\u0000b", "command": ["true"]}}', ""),
        ("/v1/sessions", b'{"agent": {"name": "t", "command": ["tr\\ud800ue"]}}', ""),
        ("/v1/sessions", b'{"agent": {"name": "t", "command": ["true"]}, "args": {"x": "\\u0000"}, "key": ""}', "key"),
        ("SESSION/messages", b'{"payload": }', "malformed JSON"),
        ("SESSION/messages", b"{}", "payload"),
        ("SESSION/messages", b'{"payload": NaN}', ""),
        ("SESSION/messages", b'{"payload": 1} trailing', "malformed JSON"),
        ("SESSION/messages", b'{"payload": ' + b"[" * 100_000 + b"}", ""),
        ("SESSION/messages", b'{"payload": 1, "idempotency_key": 7}', "idempotency_key"),
        ("SESSION/cancel", b'{"now": "perhaps"}', "now"),
        ("SESSION/crash", b'{"what": "everything"}', "what"),
        ("SESSION/signals/%00", b'{"payload": 1}', ""),
    ],
)
def test_malformed_bodies_are_refused_in_one_line(home: House, path: str, body: bytes, words: str) -> None:
    if "SESSION" in path:
        (known,) = home.server.request("GET", "/v1/sessions?limit=1")["sessions"]
        path = path.replace("SESSION", f"/v1/sessions/{known['id']}")
    before = count(home)
    auth = {"authorization": f"Bearer {home.server.token}", "content-type": "application/json"}
    status, answer = raw(home, "POST", path, body, auth)
    assert status == 422, answer
    assert set(answer["error"]) == {"code", "message", "remedy", "details"}
    assert answer["error"]["code"] == "invalid_input"
    assert words in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 500
    assert count(home) == before


def test_odd_queries_are_refused(home: House) -> None:
    session = home.start({"name": "t", "command": ["true"]})
    for query in (
        "events?after=-1",
        "events?after=x",
        "events?limit=0",
        "events?types=nosuch",
        "result?wait_s=nan",
        "outbox?after=99999999999999999999999",
    ):
        with pytest.raises(InvalidInput):
            home.server.request("GET", f"/v1/sessions/{session.id}/{query}")
    for query in ("?state=nosuch", "?limit=x"):
        with pytest.raises(InvalidInput):
            home.server.request("GET", f"/v1/sessions{query}")


@pytest.mark.parametrize("token", [None, "", "wrong", "wrong\u00e9"])
def test_missing_and_wrong_token(home: House, token: str | None) -> None:
    headers = {} if token is None else {"authorization": f"Bearer {token}".encode("latin-1").decode("latin-1")}
    for method, path in (
        ("GET", "/v1/sessions"),
        ("POST", "/v1/sessions"),
        ("GET", "/v1/nodes"),
        ("POST", "/v1/blobs"),
    ):
        status, answer = raw(home, method, path, b"{}" if method == "POST" else None, headers)
        assert status == 401, answer
        assert answer["error"]["code"] == "unauthorized"
        assert home.server.token not in json.dumps(answer)
    assert raw(home, "GET", "/healthz")[0] == 200


def test_the_command_line_without_a_token_or_with_a_wrong_one(home: House, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    url = home.server.url
    refused(as_nobody(home.server, "ls", cwd=tmp_path, env={"RETHAW_URL": url}), 3, "token")
    refused(as_nobody(home.server, "ls", cwd=tmp_path, env={"RETHAW_URL": url, "RETHAW_TOKEN": "wrong"}), 3, "token")
    refused(as_nobody(home.server, "ls", cwd=tmp_path, env={"RETHAW_URL": "nonsense"}), 2, "'nonsense'")
    gone = {"RETHAW_URL": "http://127.0.0.1:1", "RETHAW_TOKEN": "t"}
    refused(as_nobody(home.server, "ls", cwd=tmp_path, env=gone), 6, "127.0.0.1:1", "rethaw up")


def test_an_unprivileged_user_needs_nothing_but_the_token(home: House, tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    (tmp_path / "hello.py").write_text(
        "import rethaw\n@rethaw.agent\ndef hello(ctx, who: str):\n    print('working')\n    return f'hello {who}'\n"
    )
    env = {"RETHAW_URL": home.server.url, "RETHAW_TOKEN": home.server.token}
    done = as_nobody(home.server, "run", "hello.py", "--who", "you", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "working\nhello you\n"
    assert as_nobody(home.server, "ls", cwd=tmp_path, env=env).returncode == 0
    up = as_nobody(home.server, "up", cwd=tmp_path, env={"RETHAW_DATA_DIR": str(tmp_path / "d")})
    refused(up, 2, "root", "sudo")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    up = as_nobody(home.server, "up", cwd=tmp_path, env={"RETHAW_DATA_DIR": str(closed / "d")})
    refused(up, 2, str(closed / "d"), "Permission denied", "sudo")


# ---------------------------------------------------------------- provider without a key


KEYLESS = agents.add("""
def main(ctx):
    base = urllib.parse.urlsplit(os.environ["RETHAW_KEYLESS_URL"])
    said = []
    for n in range(3):
        c = http.client.HTTPConnection(base.hostname, base.port, timeout=30)
        c.request("POST", base.path + "/anything", b"{}", {"content-type": "application/json"})
        r = c.getresponse()
        said.append([r.status, r.headers["x-should-retry"], json.loads(r.read())["error"]["message"]])
    unknown = http.client.HTTPConnection(base.hostname, base.port, timeout=30)
    unknown.request("POST", "/nosuch/v1/chat/completions", b"{}", {"content-type": "application/json"})
    r = unknown.getresponse()
    return said + [[r.status, r.headers["x-should-retry"], json.loads(r.read())["error"]["message"]]]
""")


def test_provider_without_a_key_and_unknown_provider(home: House) -> None:
    session = agents.start(home, KEYLESS)
    *keyless, unknown = session.result()
    for status, retry, message in keyless:
        assert (status, retry) == (401, "false")
        assert "RETHAW_TEST_NO_SUCH_KEY" in message
        assert "\n" not in message
    assert unknown[:2] == [404, "false"]
    assert "'nosuch'" in unknown[2]
    assert not session.events("exchange.upstream")


# ---------------------------------------------------------------- the server itself


def test_a_second_server_on_one_data_directory(home: House) -> None:
    refused(home.server.cli("up", "--listen", "127.0.0.1:0", check=False), 5, str(home.server.data_dir), "another")
    assert home.server.request("GET", "/healthz")["ok"]
    assert json.loads((home.server.data_dir / "server.json").read_text())["pid"] == home.server.pid


def test_port_in_use(home: House, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{home.server.port}"
    done = home.server.cli("up", "--data-dir", str(tmp_path / "data"), "--listen", listen, check=False)
    refused(done, 5, listen, "--listen")
    assert not (tmp_path / "data" / "pg").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("listen = ", ("rethaw.toml", "not TOML")),
        ("liste = 'x'", ("'liste'", "listen")),
        ("listen = 'everywhere'", ("'everywhere'", "HOST:PORT")),
        ("[providers.x]\nbase_url = 'ftp://x'", ("ftp://x", "[providers.x]")),
    ],
)
def test_bad_configuration(home: House, tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "rethaw.toml"
    path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "rethaw.cli.main", "up", "--config", str(path), "--data-dir", str(tmp_path / "d")],
        env={**home.server.env, "RETHAW_LISTEN": ""}, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    refused(done, 2, *words)
    assert not (tmp_path / "d").exists()


def test_postgresql_data_of_a_newer_version(home: House, tmp_path: Path) -> None:
    cluster = tmp_path / "data" / "pg"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("99\n")
    (cluster / "kept").write_text("kept")
    data, listen = str(tmp_path / "data"), "127.0.0.1:0"
    refused(
        home.server.cli("up", "--data-dir", data, "--listen", listen, check=False), 6, "PostgreSQL 99", "RETHAW_PG_BIN"
    )
    assert (cluster / "kept").read_text() == "kept"
    assert (cluster / "PG_VERSION").read_text() == "99\n"


@pytest.mark.skipif(ENGINE != "gvisor", reason="it is not needed, then")
def test_no_runsc(home: House, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rethaw.cli.main", "up", "--data-dir", str(tmp_path / "d"), "--listen", "127.0.0.1:0"],
        env={**home.server.env, "RETHAW_RUNSC": "/no/such/runsc"},
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    refused(done, 8, "/no/such/runsc", "install runsc")
    assert processes.mentioning(str(tmp_path / "d")) == []


def test_sigterm_while_it_starts_leaves_nothing_running(home: House, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "rethaw.cli.main", "up", "--data-dir", str(tmp_path / "d"), "--listen", "127.0.0.1:0"],
        env=home.server.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        processes.wait_until((tmp_path / "d" / "lock").exists, 30, "the data directory")
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    finally:
        processes.kill(child.pid)
        processes.sweep(tmp_path / "d")
    assert "Traceback" not in err
    assert child.returncode in (0, -signal.SIGTERM, 143)
