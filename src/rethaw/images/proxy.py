"""The way out of a build sandbox: an HTTP proxy (CONNECT and plain) on a Unix socket of its own.

It connects to public addresses and to the hosts that it is told, never to this machine or its neighbours; through the proxy
that the node's own environment names for them, where it names one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

log = logging.getLogger("rethaw.images")

_HEAD = 64 << 10
_CONNECT_S = 30.0
_ONE_LINE = dict.fromkeys(range(32), " ")
_HOP = (b"proxy-", b"connection:", b"keep-alive:")


class _Refused(Exception):
    pass


@contextlib.asynccontextmanager
async def serving(path: Path, allowed: Iterable[str]) -> AsyncGenerator[None]:
    """The proxy at the socket `path`; `allowed` are hosts that may have any address. At its end every connection is
    cut, the sandbox's lifeline too."""
    hosts = frozenset(host.lower() for host in allowed)
    open_: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_.add(task)
        try:
            await _serve(reader, writer, hosts)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            pass
        finally:
            open_.discard(task)
            writer.close()

    server = await asyncio.start_unix_server(serve, path=path, limit=_HEAD)
    try:
        yield
    finally:
        server.close()
        for task in list(open_):
            task.cancel()
        await asyncio.gather(*open_, return_exceptions=True)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hosts: frozenset[str]) -> None:
    first = await reader.readexactly(1)
    if first == b"L":
        await reader.read()
        return
    head = first + await reader.readuntil(b"\r\n\r\n")
    line, _, rest = head.partition(b"\r\n")
    try:
        method, target, version = line.decode("ascii").split(" ")
        upstream, opening = await _open(method, target, version, rest, hosts)
    except (_Refused, OSError, TimeoutError, ValueError) as error:
        text = f"rethaw: {error}\n".encode()
        reason = text.decode("ascii", "replace").translate(_ONE_LINE).strip().encode("ascii", "replace")
        # Clients show the reason of a tunnel that failed, and no more.
        writer.write(b"HTTP/1.1 403 %b\r\nContent-Type: text/plain\r\nConnection: close\r\n" % reason[:300])
        writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(text), text))
        await writer.drain()
        return
    theirs, ours = upstream
    try:
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await asyncio.gather(_copy(reader, ours), _copy(theirs, writer))
            return
        ours.write(opening)
        left = _length(rest)
        while left > 0 and (data := await reader.read(min(left, 1 << 16))):
            ours.write(data)
            await ours.drain()
            left -= len(data)
        await ours.drain()
        await _copy(theirs, writer)
    finally:
        ours.close()


async def _open(
    method: str, target: str, version: str, rest: bytes, hosts: frozenset[str]
) -> tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter], bytes]:
    if method == "CONNECT":
        where = urlsplit(f"//{target}")
        host, port = where.hostname or "", where.port or 443
        if (proxy := _nodes_proxy("https", host)) is not None:
            return await _tunnel(proxy, host, port, hosts), b""
        return await _connect(host, port, hosts), b""
    where = urlsplit(target)
    if where.scheme != "http" or not where.hostname:
        raise _Refused(f"{target[:100]!r} is no address that this proxy takes")
    kept = [header for header in rest.split(b"\r\n") if header and not header.lower().startswith(_HOP)]
    asked = (where.path or "/") + (f"?{where.query}" if where.query else "")
    proxy = _nodes_proxy("http", where.hostname)
    if proxy is None:
        upstream = await _connect(where.hostname, where.port or 80, hosts)
    else:
        upstream = await _reach(proxy, where.hostname, hosts)
        asked = f"http://{where.netloc}{asked}"
        kept += _login(proxy)
    lines = [f"{method} {asked} {version}".encode("ascii"), *kept, b"Connection: close", b"", b""]
    return upstream, b"\r\n".join(lines)


# ---------------------------------------------------------------- the node's own proxy


def _nodes_proxy(scheme: str, host: str) -> SplitResult | None:
    """By HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY of this process, in capitals or not."""
    if proxy_bypass(host):
        return None
    known = getproxies()
    text = known.get(scheme) or known.get("all")
    if not text:
        return None
    proxy = urlsplit(text if "://" in text else f"http://{text}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise _Refused(
            f"the node's {scheme.upper()}_PROXY is no http:// address of a proxy, and nothing else can be used"
        )
    return proxy


def _login(proxy: SplitResult) -> list[bytes]:
    if proxy.username is None:
        return []
    words = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
    return [b"Proxy-Authorization: Basic " + base64.b64encode(words)]


async def _reach(
    proxy: SplitResult, host: str, hosts: frozenset[str]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the proxy, for `host`: a name that is not known here may be known there."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    for *_, address in found:
        if (problem := _private(host, str(address[0]), hosts)) is not None:
            raise problem
    assert proxy.hostname is not None
    try:
        return await asyncio.wait_for(
            asyncio.open_connection(proxy.hostname, proxy.port or 80, limit=_HEAD), _CONNECT_S
        )
    except (OSError, TimeoutError) as error:
        raise _Refused(f"the node's proxy {proxy.hostname}:{proxy.port or 80} is not there: {error}") from None


async def _tunnel(
    proxy: SplitResult, host: str, port: int, hosts: frozenset[str]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await _reach(proxy, host, hosts)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {where} HTTP/1.1".encode("ascii"), f"Host: {where}".encode("ascii"), *_login(proxy), b"", b""]
    try:
        writer.write(b"\r\n".join(lines))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _CONNECT_S)
        _, status, *reason = head.partition(b"\r\n")[0].decode("ascii", "replace").split(" ")
        if not status.startswith("2"):
            raise _Refused(f"the node's proxy {proxy.hostname} refuses {where}: {status} {' '.join(reason)}".strip())
    except (_Refused, OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
        writer.close()
        if isinstance(error, _Refused):
            raise
        raise _Refused(f"the node's proxy {proxy.hostname} gave no tunnel to {where}: {type(error).__name__}") from None
    return reader, writer


# ---------------------------------------------------------------- without one


async def _connect(host: str, port: int, hosts: frozenset[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to an address that was looked at: a name that resolves differently the next time changes nothing."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    problem: Exception = _Refused(f"{host} has no address")
    for *_, address in found:
        if (refused := _private(host, str(address[0]), hosts)) is not None:
            problem = refused
            continue
        try:
            return await asyncio.wait_for(asyncio.open_connection(str(address[0]), port), _CONNECT_S)
        except OSError as error:
            problem = error
    raise problem


def _private(host: str, address: str, hosts: frozenset[str]) -> _Refused | None:
    if host.lower() in hosts or _public(address):
        return None
    return _Refused(f"{host} is {address}, which is not public; RETHAW_BUILD_ALLOW={host} allows it")


def _public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_global and not (mapped or ip).is_multicast


def _length(headers: bytes) -> int:
    for header in headers.split(b"\r\n"):
        name, _, value = header.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
        if name.strip().lower() == b"transfer-encoding":
            raise ValueError("a chunked request")
    return 0


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(1 << 16):
        target.write(data)
        await target.drain()
    with contextlib.suppress(OSError):
        target.write_eof()
