"""Where an agent may connect to: rules as people write them, and what they allow.

    api.github.com       that name, ports 80 and 443          *.pypi.org:443   every name below it, not itself
    example.com:*        every port                           *                everything that is public
    10.0.0.5:8080        an address                           10.0.0.0/8:*     a network
    [2001:db8::1]:443    IPv6 with a port stands in brackets; without one it need not

What is matched is the name that the agent asked for. An address that is not public is reached only by a rule that says so:
one that names the address or its network or, for private networks, the exact name that leads there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rethaw.model.errors import InvalidInput

PORTS = (80, 443)  # of a rule that names none
MOST_RULES = 256
NAME_LIMIT = 253

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Guarded = Literal["loopback", "link-local", "private", "of the node itself"]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
_WRITE = 'write HOST, HOST:PORT or HOST:*, like "api.github.com", "*.pypi.org:443" or "10.0.0.5:8080"'


@dataclass(frozen=True)
class Rule:
    """`kind` "any", "below" (`host` is the domain), "name" or "net". `ports` None: all of them."""

    text: str
    kind: Literal["any", "below", "name", "net"]
    host: str = ""
    net: Network | None = None
    ports: tuple[int, ...] | None = PORTS

    def asked(self, host: str, port: int) -> bool:
        """Whether it fits what was asked for; `host` as `host_of` gives it."""
        if self.ports is not None and port not in self.ports:
            return False
        if self.kind == "any":
            return True
        literal = address_of(host)
        if literal is not None:
            return self.holds(literal, port)
        return host == self.host if self.kind == "name" else self.kind == "below" and host.endswith("." + self.host)

    def leads_to(self, host: str) -> bool:
        """Whether it fits `host` on any port."""
        return any(self.asked(host, port) for port in self.ports or PORTS)

    def holds(self, address: Address, port: int) -> bool:
        """Whether it names `address` itself, or its network."""
        fits = self.ports is None or port in self.ports
        return fits and self.net is not None and self.net.version == address.version and address in self.net

    @property
    def is_narrow(self) -> bool:
        """Whether it means its network: 0.0.0.0/0 is written for the public ones."""
        return self.net is not None and self.net.prefixlen >= (8 if self.net.version == 4 else 7)


@dataclass(frozen=True)
class EgressSettings:
    """A node's own say: `enabled` for all its agents, `deny` for what none of them may reach, whatever it allows."""

    enabled: bool = True
    deny: tuple[Rule, ...] = ()


def rules_of(texts: Iterable[str], *, what: str = "allow", ports: tuple[int, ...] | None = PORTS) -> tuple[Rule, ...]:
    """Parsed rules. Raises InvalidInput naming the one that cannot be understood, and how to write it."""
    out = tuple(_rule(text, what, ports) for text in texts)
    if len(out) > MOST_RULES:
        raise InvalidInput(
            f"{what} has {len(out)} rules, at most {MOST_RULES} fit", remedy="use patterns, like *.domain"
        )
    return out


def _rule(text: object, what: str, ports: tuple[int, ...] | None) -> Rule:
    if not isinstance(text, str) or not text.strip():
        raise InvalidInput(f"{what}: {text!r} names no host", remedy=_WRITE)
    whole = text.strip()
    if "://" in whole or "@" in whole:
        raise InvalidInput(f"{what}: {text!r} is a URL, not a host", remedy=_WRITE)
    host, given = _split(whole)
    if given == "*":
        ports = None
    elif given is not None:
        if not (given.isascii() and given.isdigit() and 0 < int(given[:6]) < 65536):
            raise InvalidInput(f"{what}: {text!r} has no port {given!r}", remedy="use 1 to 65535, or *")
        ports = (int(given),)
    if host.startswith("[") != host.endswith("]"):
        raise InvalidInput(f"{what}: {text!r} has one bracket", remedy="write an IPv6 address like [2001:db8::1]:443")
    if host == "*":
        return Rule(whole, "any", ports=ports)
    try:
        net = ipaddress.ip_network(host.removeprefix("[").removesuffix("]"))
    except ValueError as error:
        if "host bits" in str(error):
            meant = ipaddress.ip_network(host.removeprefix("[").removesuffix("]"), strict=False)
            raise InvalidInput(f"{what}: {text!r} is no network", remedy=f"write {meant}, or one address") from None
    else:
        return Rule(whole, "net", net=net, ports=ports)
    below = host.startswith("*.")
    try:
        name = host_of(host.removeprefix("*."))
    except ValueError as error:
        raise InvalidInput(f"{what}: {text!r} is not a host: {error}", remedy=_WRITE) from None
    return Rule(whole, "below" if below else "name", host=name, ports=ports)


def _split(text: str) -> tuple[str, str | None]:
    """Host and port; None where no port is named."""
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        return host + bracket, rest[1:] if rest.startswith(":") else rest or None
    if text.count(":") > 1:
        return text, None
    host, colon, port = text.partition(":")
    return host, port if colon else None


def host_of(text: str) -> str:
    """A host as it is compared: an address as Python writes it, or a name in lower case, ASCII, without a last dot.
    Raises ValueError saying what is wrong."""
    bare = text.removeprefix("[").removesuffix("]")
    literal = address_of(bare)
    if literal is not None:
        return str(literal)
    name = bare.removesuffix(".").lower()
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii")
        except UnicodeError:
            raise ValueError("it is no name of the DNS") from None
    labels = name.split(".")
    if not name or len(name) > NAME_LIMIT or not all(0 < len(x) < 64 for x in labels):
        raise ValueError("it is empty, or too long, or two dots follow each other")
    if strange := sorted(set(name) - _LETTERS - {"."}):
        raise ValueError(f"{strange[0]!r} cannot be in a name")
    if labels[-1].isdigit() or labels[-1].startswith("0x"):
        raise ValueError("it looks like an address and is none")
    return name


def address_of(host: str) -> Address | None:
    """`host` if it is an address, without a scope; an IPv4 address in IPv6 clothes is that IPv4 address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return None
        return address.ipv4_mapped or address
    return address


def guarded(address: Address) -> Guarded | None:
    """Why an address is not one of the public ones; None if it is. (Whether it is the node's own only the node knows.)"""
    inner: Address | None = None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(address.packed[12:])
    if inner is not None and (why := guarded(inner)) is not None:
        return why
    if address.is_loopback or address.is_unspecified:
        return "loopback"
    if address.is_link_local:
        return "link-local"
    return "private" if not address.is_global or address.is_multicast or address.is_reserved else None


def permitted(rules: Sequence[Rule], host: str, port: int, address: Address, why: Guarded | None) -> bool:
    """Whether rules that fit `host` let it be reached at `address`; `why`: what is special about that address."""
    if why is None or any(rule.holds(address, port) and rule.is_narrow for rule in rules):
        return True
    return why == "private" and any(rule.kind == "name" and rule.asked(host, port) for rule in rules)


def why_no_address(rules: Sequence[Rule], settings: EgressSettings, host: str) -> tuple[str, str | None]:
    """Why a name that was looked up without the proxy has no address in a sandbox, and the rule to add if that is it."""
    if not settings.enabled:
        return "egress is switched off on this node", None
    denied = next((rule for rule in settings.deny if rule.leads_to(host)), None)
    if denied is not None:
        return f"denied on this node by {denied.text}", None
    if any(rule.leads_to(host) for rule in rules):
        return "it was looked up without the proxy, and there is no other way out; use HTTPS_PROXY", None
    return "no rule allows it", host


def rule_for(host: str, port: int) -> str:
    """The narrowest rule that lets `host`:`port` through."""
    if port in PORTS:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def remedy_for(host: str, port: int) -> str:
    """What to do about a refusal, in words."""
    rule = rule_for(host, port)
    return f'add allow=["{rule}"] to the agent (or rethaw run --allow {rule})'
