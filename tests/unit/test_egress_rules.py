"""Rules of egress: how they are written, what they allow, what no pattern opens, and where they are checked."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from rethaw.cli import render
from rethaw.control.policy import Policy
from rethaw.control.sessions import check_agent
from rethaw.model import egress
from rethaw.model.egress import address_of, guarded, host_of, permitted, remedy_for, rules_of
from rethaw.model.enums import EventType
from rethaw.model.errors import InvalidInput
from rethaw.model.image_types import ImageSpec
from rethaw.model.types import AgentSpec, Assignment, Event
from rethaw.node.boot import guest_env
from rethaw.node.egress_reach import is_own, special
from rethaw.sdk.agents import agent, options
from rethaw.server.config import load


@pytest.mark.parametrize(
    ("rule", "yes", "no"),
    [
        ("api.github.com", ["api.github.com:443", "API.GitHub.com.:80"], ["api.github.com:22", "github.com:443", "x.api.github.com:443"]),
        ("*.pypi.org:443", ["files.pypi.org:443", "a.b.pypi.org:443"], ["pypi.org:443", "files.pypi.org:80", "evilpypi.org:443"]),
        ("example.com:*", ["example.com:1", "example.com:65535"], ["www.example.com:443"]),
        ("*", ["anything.example:443", "8.8.8.8:80"], ["anything.example:25"]),
        ("*:*", ["anything.example:25"], []),
        ("10.0.0.5:8080", ["10.0.0.5:8080", "::ffff:10.0.0.5:8080"], ["10.0.0.5:80", "10.0.0.6:8080", "ten.example:8080"]),
        ("10.0.0.0/8:*", ["10.1.2.3:5432"], ["11.0.0.1:80"]),
        ("[2001:db8::1]:8443", ["2001:db8::1:8443"], ["2001:db8::2:8443"]),
        ("2001:db8::/32", ["2001:db8:1::7:443"], ["2001:db9::7:443"]),
        ("bücher.example", ["xn--bcher-kva.example:443", "BÜCHER.example:443"], []),
        (" spaced.example ", ["spaced.example:443"], []),
    ],
)  # fmt: skip
def test_what_a_rule_fits(rule: str, yes: list[str], no: list[str]) -> None:
    (parsed,) = rules_of([rule])
    for expected, targets in ((True, yes), (False, no)):
        for target in targets:
            host, _, port = target.rpartition(":")
            assert parsed.asked(host_of(host), int(port)) is expected, target


@pytest.mark.parametrize(
    "rule",
    ["", " ", "http://x.example", "user@x.example", "a.*.example", "*a.example", "*.", "x:0", "x:65536", "x:", "x:http",
     "10.0.0.5/8", "1.2.3", "0x7f.1", "300.1.1.1", "[::1", "::1]", "a b", "a..b", "x" * 300, "a/b", 7, None],
)  # fmt: skip
def test_what_is_no_rule_is_named_with_the_remedy(rule: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        rules_of([rule])  # pyright: ignore[reportArgumentType]
    assert caught.value.message.startswith(f"allow: {rule!r}") and caught.value.remedy
    with pytest.raises(InvalidInput):
        check_agent(
            AgentSpec.model_construct(name="a", command=("x",), allow=(rule,), env={}, image=ImageSpec()), Policy()
        )


def test_where_rules_are_checked() -> None:
    spec = options("a", allow=["b.example", " *.c.example:443"]).spec(command=("true",))
    assert spec.allow == ("b.example", "*.c.example:443")
    check_agent(spec, Policy())
    assert options("a").spec().allow == ()
    with pytest.raises(InvalidInput, match=r"write allow=\['x.example'\]"):
        options("a", allow="x.example")
    with pytest.raises(InvalidInput, match="is a URL"):
        agent(name="a", allow=["https://x.example"])(lambda ctx: None)
    with pytest.raises(InvalidInput, match="257 rules"):
        options("a", allow=[f"h{n}.example" for n in range(257)])
    with pytest.raises(InvalidInput, match="is a URL"):
        check_agent(spec.model_copy(update={"allow": ("ftp://x",)}), Policy())


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("8.8.8.8", None), ("2606:4700::1111", None),
        ("127.0.0.1", "loopback"), ("127.9.9.9", "loopback"), ("::1", "loopback"), ("0.0.0.0", "loopback"), ("::", "loopback"),
        ("169.254.169.254", "link-local"), ("fe80::1", "link-local"),
        ("10.0.0.1", "private"), ("172.16.0.1", "private"), ("192.168.1.1", "private"), ("100.64.0.1", "private"),
        ("fd00::1", "private"), ("224.0.0.1", "private"), ("255.255.255.255", "private"), ("192.0.2.1", "private"),
        ("::ffff:127.0.0.1", "loopback"), ("::ffff:169.254.169.254", "link-local"), ("64:ff9b::7f00:1", "loopback"),
        ("64:ff9b::a9fe:a9fe", "link-local"), ("2002:7f00:1::", "loopback"), ("2002:a00:1::", "private"),
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str, why: str | None) -> None:
    found = address_of(address)
    assert found is not None and guarded(found) == why


@pytest.mark.parametrize(
    ("rules", "host", "address", "allowed"),
    [
        (["*"], "a.example", "8.8.8.8", True),
        (["*"], "a.example", "10.0.0.1", False),
        (["*.example"], "a.example", "10.0.0.1", False),
        (["a.example"], "a.example", "10.0.0.1", True),  # named: somebody knows that it is inside
        (["a.example"], "a.example", "127.0.0.1", False),  # no name may lead into the node
        (["a.example"], "a.example", "169.254.169.254", False),
        (["*", "10.0.0.0/8"], "a.example", "10.0.0.1", True),
        (["*", "10.0.0.0/8:8080"], "a.example", "10.0.0.1", False),
        (["*", "127.0.0.1"], "a.example", "127.0.0.1", True),
        (["0.0.0.0/0"], "127.0.0.1", "127.0.0.1", False),  # means the internet
        (["0.0.0.0/0"], "8.8.8.8", "8.8.8.8", True),
        (["::/0"], "::1", "::1", False),
    ],
)
def test_private_addresses_need_a_rule_of_their_own(rules: list[str], host: str, address: str, allowed: bool) -> None:
    found = address_of(address)
    assert found is not None
    assert permitted(rules_of(rules), host, 443, found, guarded(found)) is allowed


def test_the_addresses_of_this_machine_are_known() -> None:
    own, other = address_of("127.0.0.1"), address_of("8.8.8.8")
    assert own is not None and other is not None
    assert is_own(own) and not is_own(other)
    assert special(own) == "loopback" and special(other) is None
    for rules, allowed in ((["a.example"], False), (["*:*"], False), (["8.8.8.8:*"], True)):
        assert permitted(rules_of(rules), "a.example", 443, other, "of the node itself") is allowed


def test_remedies() -> None:
    assert remedy_for("a.example", 443) == 'add allow=["a.example"] to the agent (or rethaw run --allow a.example)'
    assert egress.rule_for("a.example", 8080) == "a.example:8080"
    assert egress.rule_for("2001:db8::1", 8080) == "[2001:db8::1]:8080"
    assert egress.rule_for("2001:db8::1", 443) == "2001:db8::1"


def test_events_in_words() -> None:
    def line(kind: EventType, **data: object) -> str:
        event = Event(
            session="s",
            seq=1,
            line=0,
            attempt=1,
            type=kind,
            data={"host": "a.example", "port": 443, **data},
            at=datetime.now(UTC),
        )
        return render.event_line(event).partition(kind.value)[2].strip()

    assert line(EventType.EGRESS_OPENED, address="8.8.8.8", tunnel="1.1") == "a.example:443 at 8.8.8.8"
    assert line(EventType.EGRESS_OPENED, host="2001:db8::1", address="2001:db8::1") == "[2001:db8::1]:443"
    assert line(EventType.EGRESS_REFUSED, why="no rule allows it", rule="a.example", repeats=3) == (
        "a.example:443 refused: no rule allows it; to allow it: --allow a.example (3 more of the same)"
    )
    assert (
        line(EventType.EGRESS_FAILED, error="a.example:443 is not there", others=2)
        == "a.example:443 is not there (2 more to other places)"
    )
    assert line(EventType.EGRESS_CLOSED, sent=10, received=2048, seconds=1.5, why="closed by the agent") == (
        "a.example:443, sent 10 B, received 2 KiB in 1.5s: closed by the agent"
    )


# ---------------------------------------------------------------- the environment of the agent, the node's settings


def environment(**spec: object) -> dict[str, str]:
    given = AgentSpec.model_validate({"name": "a", "command": ["true"], **spec})
    return guest_env(
        Assignment(session="s", action="start", generation="g", line=1, attempt=1, agent=given, revision=1), []
    )


def test_clients_are_told_of_the_proxy_unless_the_agent_has_its_own() -> None:
    env = environment()
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        assert env[name] == "http://127.0.0.1:8484"
    assert env["NO_PROXY"] == env["no_proxy"] == "localhost,127.0.0.1,::1"
    env = environment(env={"https_proxy": "http://mine"}, image={"env": {"NO_PROXY": "*"}})
    assert (env["https_proxy"], env["NO_PROXY"]) == ("http://mine", "*")
    assert "HTTPS_PROXY" not in env and "no_proxy" not in env and env["HTTP_PROXY"] == "http://127.0.0.1:8484"


def test_a_function_that_may_go_nowhere_stored_twice_as_much_per_turn_for_a_proxy_that_it_had() -> None:
    function: dict[str, object] = {"command": [], "entry": "a.py::a", "code": "0" * 64}
    assert not {name for name in environment(**function) if name.upper().endswith("_PROXY")}
    assert environment(**function, allow=["a.example"])["HTTPS_PROXY"] == "http://127.0.0.1:8484"


def test_the_node_has_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def settings(text: str, **env: str) -> egress.EgressSettings:
        Path("rethaw.toml").write_text(text)
        return load(env=env).egress

    usual = settings("")
    assert usual.enabled and [r.text for r in usual.deny] == ["169.254.0.0/16", "fe80::/10", "fd00:ec2::254"]
    found = settings('[egress]\nenabled = false\ndeny = ["*.evil.example", "10.0.0.0/8:22"]')
    assert not found.enabled and [r.ports for r in found.deny] == [None, (22,)]
    assert settings("[egress]\nenabled = false", RETHAW_EGRESS="on").enabled
    assert [r.text for r in settings("", RETHAW_EGRESS_DENY="a.example, 10.0.0.0/8").deny] == [
        "a.example",
        "10.0.0.0/8",
    ]
    for text, said in (
        ("egress = 1", "egress is not a table"),
        ("[egress]\nallow = []", "'allow' in \\[egress\\] is not a setting"),
        ("[egress]\nenabled = 1", "is no switch"),
        ('[egress]\ndeny = "x"', "is no list"),
        ('[egress]\ndeny = ["http://x"]', "deny: 'http://x' is a URL"),
    ):
        with pytest.raises(InvalidInput, match=said):
            settings(text)
