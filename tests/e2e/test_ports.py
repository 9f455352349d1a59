"""Ports of real sandboxes from outside: `rethaw forward`, /sessions/ID/ports/PORT/, signed links; with saves, crashes and
suspensions in between."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from e2e_fixtures import House, Session, house
from e2e_site import PORT, SITE, big
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from rethaw.api.links import Links
from rethaw.sdk.client import Client

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as running:
        yield running


@pytest.fixture(scope="module")
def site(home: House) -> Session:
    """One dev server for all tests that leave it as it was. It is never suspended by itself."""
    session = start(home)
    session.until_output("serving")
    return session


def start(home: House, **spec: Any) -> Session:
    command = ["python3", "-c", SITE + "\nserve()"]
    return home.start({"name": "site", "command": command, "idle_suspend_s": None, **spec})


def path(session: Session, rest: str = "") -> str:
    return f"/sessions/{session.id}/ports/{PORT}{rest}"


def fetch(
    session: Session,
    rest: str,
    *,
    method: str = "GET",
    body: Any = None,
    token: bool = True,
    timeout: float = 60,
    **headers: str,
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """`rest`: below the port's path, or a whole address."""
    server = urlsplit(session.house.server.url)
    connection = http.client.HTTPConnection(server.hostname or "", server.port, timeout=timeout)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        given["Authorization"] = f"Bearer {session.house.server.token}"
    where = urlsplit(rest)
    target = (where.path + (f"?{where.query}" if where.query else "")) if where.netloc else path(session, rest)
    connection.request(method, target, body, given, encode_chunked=body is not None and not isinstance(body, bytes))
    response = connection.getresponse()
    try:
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def client(home: House) -> Client:
    return Client(home.server.url, token=home.server.token)


@contextlib.contextmanager
def forwarded(session: Session, *ports: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`rethaw forward`, and its local ports."""
    command = [sys.executable, "-m", "rethaw.cli.main", "forward", session.id, *(ports or (f"{PORT}:0",))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=session.house.server.env
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in ports or (1,)]
        assert all(f"of {session.id}" in line for line in lines), (lines, process.poll())
        yield process, [int(line.split(" ")[0].rpartition(":")[2]) for line in lines]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
        process.stderr.close()  # pyright: ignore[reportOptionalMemberAccess]


def get(port: int, what: str, timeout: float = 60) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", what)
        return connection.getresponse().read()
    finally:
        connection.close()


# ---------------------------------------------------------------- forward


def test_forward_carries_tcp_as_it_is(home: House, site: Session) -> None:
    with forwarded(site, f"{PORT}:0", "9:0") as (process, (local, closed)):
        where, headers = json.loads(get(local, "/headers?x=1"))
        assert where == "/headers?x=1" and ["Host", f"127.0.0.1:{local}"] in headers
        assert hashlib.sha256(get(local, "/big")).digest() == hashlib.sha256(big()).digest()
        with pytest.raises(ConnectionResetError):
            get(closed, "/")
        assert get(local, "/count").isdigit()
    assert process.returncode == 0
    wrong = home.server.cli("forward", site.id, "3000:x", check=False)
    assert wrong.returncode == 2 and "'3000:x' is not PORT or PORT:LOCALPORT" in wrong.stderr
    assert home.server.cli("forward", "s_nosuch", "3000", check=False).returncode == 4


@pytest.mark.timeout(900)
@pytest.mark.parametrize("saves", [6, pytest.param(50, marks=pytest.mark.long)])
def test_saves_are_not_noticed(home: House, site: Session, saves: int) -> None:
    """Downloads of 20 MB by both ways while snapshots are taken, byte for byte."""
    expected = hashlib.sha256(big()).hexdigest()
    stop = threading.Event()
    found: list[str] = []

    def download(once: Callable[[], bytes]) -> None:
        while not stop.is_set():
            found.append(hashlib.sha256(once()).hexdigest())

    with forwarded(site) as (_, (local,)):
        ways = (lambda: get(local, "/big"), lambda: fetch(site, "/big")[1])
        threads = [threading.Thread(target=download, args=(way,)) for way in ways]
        for thread in threads:
            thread.start()
        try:
            for _ in range(saves):
                site.post("snapshots")
        finally:
            stop.set()
            for thread in threads:
                thread.join(120)
    assert len(found) >= 2 and set(found) == {expected}, found


# ---------------------------------------------------------------- HTTP


def test_what_the_guest_is_told_and_what_it_is_not(home: House, site: Session) -> None:
    status, body, answered = fetch(
        site, "/headers?a=%20b&rethaw=1", Cookie="mine=1; rethaw_link=x; other=2", Origin=home.server.url,
        Referer=home.server.url + path(site, "/page?q"), Connection="close, X-Gone", X_Gone="1", X_Kept="yes",
    )  # fmt: skip
    where, pairs = json.loads(body)
    headers = {name.lower(): value for name, value in pairs}
    assert (status, where) == (200, "/headers?a=%20b&rethaw=1")
    assert home.server.token not in body.decode() and "authorization" not in headers
    assert headers["cookie"] == "mine=1; other=2"
    assert headers["host"] == f"localhost:{PORT}" and headers["origin"] == f"http://localhost:{PORT}"
    assert headers["referer"] == f"http://localhost:{PORT}/page?q"
    assert headers["x-forwarded-prefix"] == path(site) and headers["x-forwarded-proto"] == "http"
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-host"] == urlsplit(home.server.url).netloc
    assert headers["x-kept"] == "yes" and "x-gone" not in headers
    assert answered["content-type"] == "application/json" and answered["referrer-policy"] == "same-origin"


def test_redirects_and_cookies_stay_below_the_prefix(site: Session) -> None:
    status, _, headers = fetch(site, "/redirect")
    assert (status, headers["location"]) == (302, path(site, "/headers?a=1"))
    assert headers.get_all("set-cookie") == [f"sid=1; HttpOnly; Path={path(site, '/')}"]
    assert "service-worker-allowed" not in headers and headers["x-own"] == "kept"
    status, _, headers = fetch(site, "")
    assert (status, headers["location"]) == (307, path(site, "/"))


def test_bodies_stream_both_ways(site: Session) -> None:
    data = big(3_000_000)
    digest = hashlib.sha256(data).hexdigest().encode()
    assert fetch(site, "/upload", method="POST", body=data)[1] == digest
    parts = (data[at : at + 70_000] for at in range(0, len(data), 70_000))
    assert fetch(site, "/upload", method="POST", body=parts, Transfer_Encoding="chunked")[1] == digest
    server = urlsplit(site.house.server.url)
    connection = http.client.HTTPConnection(server.hostname or "", server.port, timeout=30)
    connection.request("GET", path(site, "/stream"), headers={"Authorization": f"Bearer {site.house.server.token}"})
    response = connection.getresponse()
    times = []
    while response.read(2):
        times.append(time.monotonic())
    connection.close()
    assert len(times) == 5 and times[-1] - times[0] > 0.2
    status, body, headers = fetch(site, "/big", method="HEAD")
    assert (status, body, headers["content-length"]) == (200, b"", "20000000")
    status, body, _ = fetch(site, f"{site.house.server.url}/sessions/{site.id}/ports/9/")
    assert (status, body) == (502, b"rethaw: nothing listens on port 9 in the sandbox\n")


async def test_websockets_pass_message_by_message(home: House, site: Session) -> None:
    address = home.server.url.replace("http", "ws") + path(site, "/socket?x=1")
    headers = {"Authorization": f"Bearer {home.server.token}"}
    async with connect(address, additional_headers=headers, subprotocols=["other", "vite"], proxy=None) as socket:  # pyright: ignore[reportArgumentType]
        assert socket.subprotocol == "vite"
        where, pairs = json.loads(await socket.recv())
        told = {name.lower(): value for name, value in pairs}
        assert where == "/socket?x=1" and told["host"] == f"localhost:{PORT}" and "authorization" not in told
        for message in ("text \u00e9", b"bytes", "x" * 70_000, b"\0" * 200_000):
            await socket.send(message)
            assert await socket.recv() == message
        taking = asyncio.to_thread(lambda: [site.post("snapshots") for _ in range(5)])
        snapshots = asyncio.ensure_future(taking)
        count = 0
        while not snapshots.done():
            await socket.send(str(count))
            assert await socket.recv() == str(count)
            count += 1
        await snapshots
        await socket.send("close")
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        assert (socket.close_code, socket.close_reason) == (4321, "bye")
    with pytest.raises(InvalidStatus) as refused:
        await connect(address.replace("/socket", "/nosocket"), additional_headers=headers, proxy=None)
    assert refused.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as refused:
        await connect(address, proxy=None)
    assert refused.value.response.status_code == 403


# ---------------------------------------------------------------- links


def test_a_link_opens_one_port_until_it_expires(home: House, site: Session) -> None:
    made = client(home).sessions.get(site.id).link(PORT, "1h")
    assert home.server.cli("link", site.id, str(PORT), "--expires", "2d").stdout.startswith(
        home.server.url + path(site, "/?")
    )
    status, body, headers = fetch(site, made.url.replace("/?", "/headers?a=1&"), token=False)
    where, pairs = json.loads(body)
    assert status == 200 and where == "/headers?a=1" and "rethaw_link" not in str(pairs)
    cookie = headers["set-cookie"]
    assert f"Path={path(site, '/')};" in cookie and "HttpOnly" in cookie and "SameSite=Lax" in cookie
    value = cookie.partition(";")[0]
    assert fetch(site, "/count", token=False, Cookie=f"rethaw_link=bad; {value}")[0] == 200
    # A browser is sent on, so that scripts and referrers do not see the signature.
    status, _, headers = fetch(site, made.url, token=False, Accept="text/html,*/*")
    assert (status, headers["location"]) == (303, path(site, "/")) and headers["set-cookie"].startswith(value)
    # Nothing else.
    other = made.url.replace(f"/{PORT}/", "/3001/")
    for refused in (other, made.url[:-3] + "AAA", made.url.replace(site.id, "s_other"), made.url.replace("rethaw_link=", "rethaw_link=9")):  # fmt: skip
        status, body, _ = fetch(site, refused, token=False)
        assert status == 403 and body.startswith(b"rethaw: this link is not for port") and body.count(b"\n") == 1, body
    assert fetch(site, "/count", token=False)[0] == 403
    status, body, _ = fetch(site, "/count", token=False, Cookie=value.replace("=", "=1"))
    assert status == 403
    assert fetch(site, f"{home.server.url}/v1/sessions", token=False, Cookie=value)[0] == 401
    key = (home.server.data_dir / "link-key").read_bytes()
    old = f"{int(time.time()) - 5}"
    made_up = Links(key, home.server.url)._sign(site.id, PORT, int(old))
    status, body, _ = fetch(site, f"/count?rethaw_link={made_up}", token=False)
    assert (status, body) == (403, b"rethaw: this link has expired; rethaw link makes a new one\n")
    assert fetch(site, "/count", token=False, Authorization="Bearer wrong")[0] == 403
    assert fetch(site, f"/headers?{value}", token=False, Authorization="Basic YTpi")[1].count(b"Basic YTpi") == 1
    long = home.server.cli("link", site.id, "3000", "--expires", "31d", check=False)
    assert long.returncode == 2 and "use 1s to 30d" in long.stderr


# ---------------------------------------------------------------- freezes


WAITING = (
    SITE
    + """
def main(ctx):
    threading.Thread(target=serve, daemon=True).start()
    while True:
        ctx.receive()
"""
)


def test_a_frozen_session_thaws_at_the_first_request(home: House) -> None:
    """By Context waits, and a program that only serves once somebody was connected to it."""
    for session in (home.agent(WAITING, idle_suspend_s=1.0), start(home, idle_suspend_s=1.0)):
        session.until_output("serving")
        hits = int(fetch(session, "/count")[1])
        for _ in range(3):
            session.until_state("suspended")
            assert session.view["reason"] == "idle"
            hits += 1
            assert int(fetch(session, "/count")[1]) == hits
        with forwarded(session) as (_, (local,)):
            session.until_state("suspended")
            assert int(get(local, "/count")) == hits + 1
            session.post("suspend")
            session.until_state("suspended")
            status, body, _ = fetch(session, "/count")
            assert status == 409 and f"rethaw resume {session.id}".encode() in body and body.count(b"\n") == 1
            with pytest.raises(ConnectionResetError):
                get(local, "/count")
        session.post("resume")
        assert int(fetch(session, "/count")[1]) == hits + 2
        session.post("cancel", {"now": True})
        session.until_state("cancelled")
        status, body, _ = fetch(session, "/count")
        assert status == 410 and b"is cancelled" in body


@pytest.mark.long  # a silence of a minute
def test_moving_bytes_keep_it_awake_and_silence_does_not(home: House) -> None:
    session = home.agent(WAITING, idle_suspend_s=1.0)
    session.until_output("serving")
    with forwarded(session) as (_, (local,)):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert get(local, "/count")
            assert session.view["state"] != "suspended"
            time.sleep(0.2)
        session.until_state("suspended")
    session.post("cancel", {"now": True})


def test_a_crash_resets_and_the_next_request_works(home: House) -> None:
    session = start(home)
    session.until_output("serving")
    session.post("snapshots")
    with forwarded(session) as (_, (local,)):
        for generation in range(3):
            hits = int(get(local, "/count"))
            raw = http.client.HTTPConnection("127.0.0.1", local, timeout=60)
            raw.request("GET", "/hang")
            answer = raw.getresponse()
            proxied = http.client.HTTPConnection("127.0.0.1", home.server.port, timeout=60)
            proxied.request("GET", path(session, "/hang"), headers={"Authorization": f"Bearer {home.server.token}"})
            other = proxied.getresponse()
            assert answer.read(4) == other.read(4) == b"part"
            session.crash()
            for one in (answer, other):
                with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
                    one.read()
            raw.close()
            proxied.close()
            assert fetch(session, "/count")[0] == 200, generation
            assert int(get(local, "/count")) <= hits + 4
    assert session.view["state"] in ("running", "waiting")


def test_a_forward_outlives_the_server(home: House, site: Session) -> None:
    with forwarded(site) as (_, (local,)):
        before = int(get(local, "/count"))
        site.post("snapshots")
        home.server.kill9()
        with pytest.raises(OSError):
            get(local, "/count")
        home.server.restart()
        assert int(get(local, "/count", timeout=90)) > before - 5
