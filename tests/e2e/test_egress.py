"""The way out of real sandboxes: proxied requests, refusals, and what freezes, crashes and kills do to a download."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from e2e_agents import Agents
from e2e_fixtures import House, Session, house

pytestmark = pytest.mark.root
HERE = "127.0.0.2"  # of this machine, and not among what a sandbox calls its own
PART = 600_000
agents = Agents()


class Site:
    """A web server with and without TLS. /slow gives half of a body and the rest when /go was asked for; /drip a byte
    every 0.2 s."""

    def __init__(self, directory: Path) -> None:
        self.go = threading.Event()
        self.asked: list[str] = []
        self.keep_alive = True
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.asked.append(self.path)
                with contextlib.suppress(OSError):
                    site.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.plain = ThreadingHTTPServer((HERE, 0), Handler)
        self.secure = ThreadingHTTPServer((HERE, 0), Handler)
        cert, key = directory / "cert.pem", directory / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        names = ["-days", "2", "-subj", "/CN=site", "-addext", f"subjectAltName=IP:{HERE}"]
        subprocess.run([*command, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
        self.ca = cert.read_text()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, key)
        self.secure.socket = context.wrap_socket(self.secure.socket, server_side=True)
        for server in (self.plain, self.secure):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{HERE}:{self.plain.server_port}"

    @property
    def secure_url(self) -> str:
        return f"https://{HERE}:{self.secure.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        slow = request.path.startswith("/slow")
        body = body_of(2 * PART) if slow else b"." * 15 if request.path == "/drip" else f"at {request.path}".encode()
        if request.path == "/go":
            self.go.set()
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.path == "/drip":
            for n in range(len(body)):
                request.wfile.write(body[n : n + 1])
                time.sleep(0.2)
        else:
            request.wfile.write(body[:PART])
            if slow:
                self.go.wait(60)
                request.wfile.write(body[PART:])

    def close(self) -> None:
        for server in (self.plain, self.secure):
            server.shutdown()
            server.server_close()


def body_of(size: int) -> bytes:
    return b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(size // 32 + 1))[:size]


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as running:
        yield running


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.go.set()
        made.close()


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


ORDINARY = agents.add("""
def main(ctx, url, secure, ca):
    import ssl, urllib.request
    trusting = ssl.create_default_context(cadata=ca)
    plain = urllib.request.urlopen(url + "/a?b=1").read().decode()
    tls = urllib.request.urlopen(secure + "/c", context=trusting).read().decode()
    first = urllib.request.urlopen(os.environ["OPENAI_BASE_URL"].replace("127.0.0.1", "localhost") + "/models")
    return [plain, tls, ask("hello"), first.status]
""")


def test_ordinary_clients_find_the_way_out(home: House, site: Site) -> None:
    session = agents.start(
        home, ORDINARY, {"url": site.url, "secure": site.secure_url, "ca": site.ca}, allow=[f"{HERE}:*"]
    )
    assert session.result() == ["at /a?b=1", "at /c", "echo hello", 200]
    opened, closed = session.events("egress.opened"), session.events("egress.closed")
    assert [(e["data"]["host"], e["data"]["port"]) for e in opened] == [
        (HERE, site.plain.server_port),
        (HERE, site.secure.server_port),
    ]
    assert all(e["data"]["address"] == HERE for e in opened)
    assert closed[0]["data"]["received"] > 10 and not session.events("egress.refused")
    assert "/a?b=1" not in str([e["data"] for e in session.events("egress")])
    shown = home.server.cli("events", session.id).stdout
    assert re.search(rf"egress.opened +{HERE}:{site.plain.server_port}$", shown, re.MULTILINE), shown
    assert re.search(rf"egress.closed +{HERE}:{site.plain.server_port}, sent \d+ B, received \d+ B in ", shown), shown


REFUSED = agents.add("""
def main(ctx, url, secure):
    import urllib.error, urllib.request
    said = []
    for address in (url, secure, "http://169.254.169.254/latest", "https://api.github.com/user"):
        try:
            urllib.request.urlopen(address)
        except urllib.error.HTTPError as error:
            said.append([error.code, error.read().decode()])
        except urllib.error.URLError as error:
            said.append(str(error.reason))
    return said
""")


def test_a_refusal_says_which_rule_to_add(home: House, site: Site) -> None:
    session = agents.start(home, REFUSED, {"url": site.url, "secure": site.secure_url}, allow=["*:*"])
    plain, tls, metadata, github = session.result()
    where = f"{HERE}:{site.plain.server_port}"
    remedy = f'add allow=["{where}"] to the agent (or rethaw run --allow {where})'
    assert plain == [403, f"rethaw: egress to {where} is not allowed: a loopback address; {remedy}\n"]
    assert tls.startswith("Tunnel connection failed: 403 egress to ") and "--allow" in tls
    assert metadata[0] == 403 and "denied on this node" in metadata[1]
    assert "403" not in github  # allowed, and not there
    assert not site.asked
    (first, *_) = session.events("egress.refused")
    assert first["data"]["rule"] == where


def test_nothing_is_allowed_by_default_and_the_command_line_allows(home: House, site: Site) -> None:
    code = f"import urllib.request; print(urllib.request.urlopen('{site.url}/cli').read().decode())"
    command = ["--image", "base", "--", "python3", "-c", code]
    refused = home.server.cli("run", *command, check=False)
    where = f"{HERE}:{site.plain.server_port}"
    assert refused.returncode == 1 and f"egress to {where} refused" in refused.stderr, refused.stderr
    assert f"--allow {where}" in refused.stderr
    assert home.server.cli("run", "--allow", "x.example", "--allow", where, *command).stdout == "at /cli\n"
    wrong = home.server.cli("run", "--allow", "https://x.example/", *command, check=False)
    assert wrong.returncode == 2 and "is a URL, not a host" in wrong.stderr


ALONE = agents.add("""
def main(ctx):
    import urllib.request
    urllib.request.urlopen("https://api.github.com/user")
""")


def test_a_function_that_may_go_nowhere_is_told_what_to_add(home: House) -> None:
    """It has no proxy in its environment that could refuse: all it sees is a name that cannot be resolved. The log and who
    started it hear of the refusal all the same."""
    session = agents.start(home, ALONE)
    session.until_state("failed")
    (refused,) = session.events("egress.refused")
    assert refused["data"] == {"host": "api.github.com", "why": "no rule allows it", "rule": "api.github.com"}
    shown = home.server.cli("events", session.id).stdout
    assert "api.github.com refused: no rule allows it; to allow it: --allow api.github.com" in shown
    remedy = 'rethaw: this agent may connect to no host, and resolves no name; add allow=["HOST"] to it'
    assert session.output("stderr").splitlines()[-1].startswith(remedy)
    assert remedy in home.server.cli("why", session.id).stdout


LOOKS_UP = agents.add("""
def main(ctx):
    import socket
    said = []
    for name in ctx.messages(idle="60s"):
        try:
            said.append(socket.getaddrinfo(name.payload, 443))
        except socket.gaierror as error:
            said.append(error.errno)
        if name.payload == "last.example":
            return [said, socket.gethostbyname("localhost"), socket.gethostbyname(socket.gethostname())]
""")


def _was_refused(host: str, session: Session) -> bool:
    return host in [e["data"]["host"] for e in session.events("egress.refused")]


def test_a_name_that_is_looked_up_without_the_proxy_is_an_event(home: House) -> None:
    """Also after three restores, and in a fork. Of a name that a rule allows, it says that the proxy is the way."""
    session = agents.start(home, LOOKS_UP, allow=["*.allowed.example"], idle_suspend_s=0.3)
    names = ["a.example", "A.example", "b.allowed.example", "c.example", "last.example"]
    for name in names[:-1]:
        session.until_state("suspended")
        session.send(name)
        session.until("its refusal", functools.partial(_was_refused, name.lower()))
    session.until_state("suspended")
    (made,) = home.server.request("POST", f"/v1/sessions/{session.id}/fork", {})["sessions"]
    fork = Session(home, made)
    for one in (session, fork):
        one.send(names[-1])
        assert one.result() == [[-2] * 5, "127.0.0.1", "127.0.0.1"]
    why = "it was looked up without the proxy, and there is no other way out; use HTTPS_PROXY"
    for one in (session, fork):
        told = [(e["data"]["host"], e["data"]["why"], e["data"]["rule"]) for e in one.events("egress.refused")]
        assert told == [
            ("a.example", "no rule allows it", "a.example"),
            ("b.allowed.example", why, None),
            ("c.example", "no rule allows it", "c.example"),
            ("last.example", "no rule allows it", "last.example"),
        ]


DOWNLOAD = agents.add("""
def main(ctx, url, snapshot):
    import hashlib, http.client, urllib.parse
    proxy, there = urllib.parse.urlsplit(os.environ["HTTPS_PROXY"]), urllib.parse.urlsplit(url)
    tries = 0
    while True:
        tries += 1
        try:
            connection = http.client.HTTPConnection(proxy.hostname, proxy.port, timeout=60)
            connection.set_tunnel(there.hostname, there.port)
            connection.request("GET", "/slow?%d" % tries)
            response = connection.getresponse()
            body = response.read(400_000)
            print("half", flush=True)
            if snapshot:
                for _ in range(3):
                    ctx.snapshot()
                print("saved", flush=True)
            while more := response.read(100_000):
                body += more
            return [tries, hashlib.sha256(body).hexdigest()]
        except OSError as error:
            print("again:", error, flush=True)
            time.sleep(0.2)
""")
WHOLE = hashlib.sha256(body_of(2 * PART)).hexdigest()


def test_snapshots_in_the_middle_of_a_download_do_not_touch_it(home: House, site: Site) -> None:
    session = agents.start(home, DOWNLOAD, {"url": site.url, "snapshot": True}, allow=[f"{HERE}:*"])
    session.until_output("saved")
    site.go.set()
    assert session.result() == [1, WHOLE]
    assert len(session.events("snapshot.created")) >= 3 and len(session.events("egress.opened")) == 1


def test_after_a_crash_and_after_a_kill_the_client_begins_anew(home: House, site: Site) -> None:
    """First the sandbox dies, then the whole server, each in the middle of a download."""
    session = agents.start(home, DOWNLOAD, {"url": site.url, "snapshot": True}, allow=[f"{HERE}:*"])
    session.until_output("saved")
    session.crash()
    session.until("a second try", lambda s: "saved" in s.output().partition("again:")[2])
    whys = [e["data"].get("why") for e in session.events("egress.closed", all_lines=True)]
    assert whys == ["the sandbox is gone"]
    home.server.kill9()
    home.server.start()
    until(lambda: len(site.asked) > 2)
    site.go.set()
    assert session.result() == [3, WHOLE]


FORKED = agents.add("""
def main(ctx, url):
    import http.client, urllib.parse
    proxy, there = urllib.parse.urlsplit(os.environ["HTTPS_PROXY"]), urllib.parse.urlsplit(url)
    def fresh():
        connection = http.client.HTTPConnection(proxy.hostname, proxy.port, timeout=60)
        connection.set_tunnel(there.hostname, there.port)
        return connection
    connection = fresh()
    connection.request("GET", "/kept")
    said = [connection.getresponse().read().decode()]
    ctx.wait("go-on")
    try:
        connection.request("GET", "/later")
        said.append(connection.getresponse().read().decode())
    except OSError as error:
        said.append(type(error).__name__)
        connection = fresh()
        connection.request("GET", "/anew")
        said.append(connection.getresponse().read().decode())
    return said
""")


def test_an_idle_connection_does_not_keep_an_agent_awake(home: House, site: Site) -> None:
    session = agents.start(home, FORKED, {"url": site.url}, allow=[f"{HERE}:*"], idle_suspend_s=0.5)
    session.until_state("suspended")
    session.signal("go-on")
    kept, broken, anew = session.result()
    assert (kept, anew) == ("at /kept", "at /anew")
    assert broken in ("ConnectionResetError", "BrokenPipeError", "RemoteDisconnected")


DRIP = agents.add("""
def main(ctx, url):
    import threading, urllib.request
    got = []
    def load():
        try:
            got.append(len(urllib.request.urlopen(url + "/drip").read()))
        except OSError as error:
            got.append(repr(error))
    thread = threading.Thread(target=load)
    thread.start()
    try:
        ctx.wait("never", timeout="3.5s")
    except TimeoutError:
        pass
    thread.join()
    return got
""")


def test_an_agent_in_the_middle_of_a_download_is_not_idle(home: House, site: Site) -> None:
    session = agents.start(home, DRIP, {"url": site.url}, allow=[f"{HERE}:*"], idle_suspend_s=1.0)
    assert session.result() == [15]
