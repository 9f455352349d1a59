"""From what an agent asked for to a connection: rules, then the name's addresses, then the rules again, then exactly the
address that was looked at."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from rethaw.model.egress import (
    Address,
    EgressSettings,
    Guarded,
    Rule,
    address_of,
    guarded,
    host_of,
    permitted,
    remedy_for,
    rule_for,
)

CONNECT_S = 10.0  # resolving the name included
READ_AHEAD = 1 << 16
Resolve = Callable[[str], Awaitable[Sequence[Address]]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter, Address]


class Refused(Exception):
    """Not to be reached. `rule` is what would have to be allowed; None where no rule helps."""

    def __init__(self, message: str, why: str, rule: str | None = None, status: int = 403) -> None:
        super().__init__(message)
        self.message = message
        self.why = why
        self.rule = rule
        self.status = status


class Unreachable(Exception):
    """Allowed, and not there."""


async def reach(
    rules: Sequence[Rule], settings: EgressSettings, asked: str, port: int, resolve: Resolve | None = None
) -> Connection:
    """Connect to `asked`:`port`. A name that no rule fits is not even looked up. Raises Refused, Unreachable."""
    try:
        host = host_of(asked)
    except ValueError as error:
        raise Refused(f"{asked[:200]!r} is not a host: {error}", "malformed", status=400) from None
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not settings.enabled:
        raise Refused(
            f"egress to {where} is switched off on this node; set enabled = true in [egress] of its rethaw.toml",
            "egress is switched off on this node",
        )
    _not_denied(settings, where, next((r for r in settings.deny if r.asked(host, port)), None))
    if not any(rule.asked(host, port) for rule in rules):
        raise Refused(
            f"egress to {where} is not allowed; {remedy_for(host, port)}", "no rule allows it", rule_for(host, port)
        )
    try:
        async with asyncio.timeout(CONNECT_S):
            literal = address_of(host)
            found = [literal] if literal is not None else await (resolve or lookup)(host)
            usable = _usable(rules, settings, host, port, where, found)
            return await _connect(usable, port, where)
    except TimeoutError:
        raise Unreachable(f"{where} did not answer within {CONNECT_S:g} s") from None


def _usable(
    rules: Sequence[Rule], settings: EgressSettings, host: str, port: int, where: str, found: Sequence[Address]
) -> list[Address]:
    """Those of a host's addresses that may be reached. Raises Refused for the first one when there are none."""
    out: list[Address] = []
    refusal: Refused | None = None
    for address in found:
        try:
            _not_denied(settings, where, next((r for r in settings.deny if r.holds(address, port)), None))
            why = special(address)
            if not permitted(rules, host, port, address, why):
                is_it = "" if str(address) == host else f"it is at {address}, "
                kind = f"an address {why}" if why == "of the node itself" else f"a {why} address"
                raise Refused(
                    f"egress to {where} is not allowed: {is_it}{kind}; {remedy_for(str(address), port)}",
                    f"{address} is {kind}",
                    rule_for(str(address), port),
                )
            out.append(address)
        except Refused as error:
            refusal = refusal or error
    if not out and refusal is not None:
        raise refusal
    return out


def _not_denied(settings: EgressSettings, where: str, rule: Rule | None) -> None:
    if rule is not None:
        raise Refused(
            f'egress to {where} is denied on this node: "{rule.text}" is in deny of [egress] in its rethaw.toml',
            f"denied on this node by {rule.text}",
        )


async def _connect(addresses: Sequence[Address], port: int, where: str) -> Connection:
    failed: OSError | None = None
    for n, address in enumerate(addresses):
        try:
            # An address is not looked up again. The last one may take all the time that is left.
            async with asyncio.timeout(CONNECT_S / 3 if n + 1 < len(addresses) else None):
                reader, writer = await asyncio.open_connection(str(address), port, limit=READ_AHEAD)
        except OSError as error:  # TimeoutError is one
            failed = error
            continue
        raw = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return reader, writer, address
    raise Unreachable(f"{where} could not be connected to: {_said(failed)}")


def _said(error: OSError | None) -> str:
    if error is None:
        return "the name has no address"
    return os.strerror(error.errno) if error.errno else "it did not answer in time"


# ---------------------------------------------------------------- names and addresses

# Of its own: a name server that is slow must not hold up what else runs in threads.
_threads = ThreadPoolExecutor(8, thread_name_prefix="rethaw-dns")


async def lookup(host: str) -> list[Address]:
    """Addresses of a name, as the node's resolver orders them. Raises Unreachable."""
    work = functools.partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.get_running_loop().run_in_executor(_threads, work)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise Unreachable(f"the name {host} could not be resolved: {why}") from None
    out: list[Address] = []
    for *_, where in found:
        address = address_of(str(where[0]))
        if address is not None and address not in out:
            out.append(address)
    return out


def special(address: Address) -> Guarded | None:
    """What keeps an address from being reached by a mere name or pattern."""
    why = guarded(address)
    if why in (None, "private") and is_own(address):
        return "of the node itself"
    return why


def is_own(address: Address) -> bool:
    """Whether a network card of this machine has the address."""
    return _binds(str(address), address.version) and not _binds_anything(address.version)


@functools.cache
def _binds_anything(version: Literal[4, 6]) -> bool:
    """net.ipv4.ip_nonlocal_bind is set: binding says nothing."""
    return _binds("192.0.2.1" if version == 4 else "2001:db8::1", version)


def _binds(address: str, version: int) -> bool:
    try:
        with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True
