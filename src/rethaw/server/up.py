"""The composition root: puts the rooms together in one process and keeps them running.

PostgreSQL first (embedded unless DATABASE_URL is set), then the control side, then the node, then the API. SIGTERM and
SIGINT end it in order: sessions are suspended, PostgreSQL is stopped. SIGKILL at any moment is fine too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, TextIO

import uvicorn

from rethaw import __version__
from rethaw.api.app import create_app
from rethaw.control.control import Control
from rethaw.control.loops import ControlLoops
from rethaw.control.policy import Policy
from rethaw.control.snapshots import Catalog
from rethaw.db.embedded import EmbeddedPostgres
from rethaw.db.migrate import migrate
from rethaw.db.notify import NotifyHub
from rethaw.db.pool import Database
from rethaw.gateway.gateway import Gateway
from rethaw.images.builder import ImageStore
from rethaw.images.shelf import Shelf
from rethaw.log.store import Log
from rethaw.model.errors import Conflict, InvalidInput, RethawError
from rethaw.model.ids import new_generation
from rethaw.node.dialing import NodeDialing
from rethaw.node.look import NodeLook
from rethaw.node.node import Node, node_id
from rethaw.node.parts import Parts
from rethaw.node.peek import Throwaways
from rethaw.node.transfers import Transfers
from rethaw.server import hooks
from rethaw.server.config import Config
from rethaw.server.engines import engines_of
from rethaw.snapshots.remote import Remote
from rethaw.snapshots.store import SnapshotStore
from rethaw.snapshots.uploads import Uploader

log = logging.getLogger("rethaw.server")
Say = Callable[[str], None]
_LOCK_S = 2.0  # a server that was just killed may still be on its way out


def prepare_data_dir(path: Path) -> TextIO:
    """Make the data directory and lock it; the lock is held as long as the returned file is open.

    Raises Conflict when another server uses the directory, InvalidInput when it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # PostgreSQL runs as another user below this directory, so others may pass through; nothing in it is readable.
        path.chmod(0o711)
        for name in ("code", "snapshots", "engines", "run", "logs"):
            (path / name).mkdir(mode=0o700, exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as error:
        raise InvalidInput(f"data_dir {path} cannot be used: {error.strerror}", remedy="name another one") from error
    end = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for kind in ("export-*", "import-*"):  # on their way when a former server was killed
                for left in (path / "code").glob(kind):
                    shutil.rmtree(left, ignore_errors=True)
            return lock
        except OSError as error:
            if time.monotonic() > end:
                lock.close()
                raise Conflict(
                    f"another rethaw server uses {path}", remedy="stop it, or name another data_dir"
                ) from error
        time.sleep(0.05)


def token_of(data_dir: Path) -> str:
    """The installation's bearer token; made at the first start, readable by root only."""
    return _secret(data_dir / "token", lambda: secrets.token_urlsafe(32).encode()).decode().strip()


def link_key_of(data_dir: Path) -> bytes:
    """What signs links; made at the first start. Without the file every link is void."""
    return _secret(data_dir / "link-key", lambda: secrets.token_bytes(32))


def _secret(path: Path, make: Callable[[], bytes]) -> bytes:
    if not path.exists():
        partial = path.with_suffix(".new")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(make())
        partial.rename(path)
    return path.read_bytes()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by what it accepts, for which asyncio does not set it: an answer's body would wait for the caller's
    # delayed acknowledgement of its head, 40 ms on a connection that is used again.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise Conflict(
            f"cannot listen on {host}:{port}: {error.strerror}", remedy="choose another one with --listen"
        ) from error
    sock.listen(256)
    sock.setblocking(False)
    return sock


@contextlib.asynccontextmanager
async def _database(config: Config, say: Say) -> AsyncGenerator[tuple[Database, EmbeddedPostgres | None]]:
    postgres: EmbeddedPostgres | None = None
    keeper: asyncio.Task[None] | None = None
    if config.database_url is None:
        postgres = EmbeddedPostgres(config.data_dir / "pg", run_dir=config.data_dir / "run")
        started = time.monotonic()
        dsn = await postgres.start()
        major = postgres.binaries.major if postgres.binaries else ""
        say(f"PostgreSQL {major} in {config.data_dir / 'pg'} ({time.monotonic() - started:.1f} s)")
        keeper = asyncio.ensure_future(postgres.supervise())
    else:
        dsn = config.database_url
        say("PostgreSQL at DATABASE_URL")
    try:
        async with Database(dsn) as db:
            applied = await migrate(db)
            if applied:
                say(f"database brought up to {applied[-1]}")
            yield db, postgres
    finally:
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if postgres is not None:
            await postgres.stop()


async def serve(config: Config, say: Say, on_ready: Callable[[str, str], None]) -> None:
    """Run until SIGTERM or SIGINT. `on_ready(url, token)` is called once sessions can be started.

    Raises RethawError with a clear line when something it needs is missing.
    """
    if os.geteuid() != 0:
        raise InvalidInput("the server runs sandboxes and must be root", remedy="run it with sudo")
    lock = prepare_data_dir(config.data_dir)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        sock = _listen(config.host, config.port)
        with contextlib.closing(sock):
            async with _database(config, say) as (db, postgres):
                await _run(config, db, postgres, sock, stop, say, on_ready)
    finally:
        lock.close()


async def _run(
    config: Config,
    db: Database,
    postgres: EmbeddedPostgres | None,
    sock: socket.socket,
    stop: asyncio.Event,
    say: Say,
    on_ready: Callable[[str, str], None],
) -> None:
    data, incarnation = config.data_dir, new_generation()
    url = config.url_at(sock.getsockname()[1])
    public_url = config.public_url or url
    token = token_of(data)
    async with NotifyHub(db) as hub:
        policy = Policy(object_store=config.snapshots.s3 is not None)
        context_log = Log(db, hub)
        catalog = Catalog(db, hub, policy)
        control = Control(
            db, context_log, hub, public_url=public_url, secret=token.encode(), policy=policy, prices=config.prices
        )
        engines = engines_of(data, config.engine)
        await engines.default.build()
        parts = Parts(
            node=node_id(data),
            incarnation=incarnation,
            data_dir=data,
            engines=engines,
            images=ImageStore(data),
            store=_store(config, catalog),
            gateway=Gateway(context_log, config.providers, incarnation, books=control),
            log=context_log,
            control=control,
            catalog=catalog,
            providers=tuple(config.providers.names()),
            egress=config.egress,
        )
        node = Node(parts)
        await node.start()
        say(f"node {parts.node[:8]} with engine {engines.default.name}")
        throwaways = Throwaways(parts)
        app = create_app(
            control,
            context_log,
            catalog,
            token=token,
            crash_hook=hooks.Crash(node, postgres).crash,
            doctor_hook=hooks.Doctor(engines, s3=config.snapshots.s3).report,
            blobs_dir=data / "code",
            public_url=public_url,
            looking=NodeLook(parts, throwaways),
            carrier=Transfers(parts),
            node=parts.node,
            cpu=node.cpu_s,
            usage=node.usage,
            trees=Shelf(parts.images),
            terminals=parts.terminals,
            dialing=NodeDialing(node.life),
            link_key=link_key_of(data),
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=2,
                ws="websockets-sansio",
                ws_max_size=1 << 20,
                ws_per_message_deflate=False,
                ws_ping_timeout=None,  # a peer whose reader waits answers late; one that is gone is found by keep-alives
            )
        )
        # It says so of each WebSocket that was refused with an answer of its own.
        logging.getLogger("uvicorn.error").addFilter(
            lambda said: "without completing handshake" not in said.getMessage()
        )
        tasks = [
            asyncio.ensure_future(ControlLoops(control).run()),
            asyncio.ensure_future(node.run()),
            asyncio.ensure_future(_serve_api(server, sock)),
        ]
        stopping = asyncio.ensure_future(stop.wait())
        try:
            _write_json(data / "server.json", {"url": url, "pid": os.getpid(), "version": __version__})
            on_ready(url, token)
            await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            (data / "server.json").unlink(missing_ok=True)
            say("stopping: sessions are suspended")
            stopping.cancel()
            failed = [t for t in tasks if t.done() and not t.cancelled() and t.exception() is not None]
            server.should_exit = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await app.state.warming.close()
            await throwaways.close()
            await node.stop()
        for task in failed:
            error = task.exception()
            assert error is not None
            raise error if isinstance(error, RethawError) else RethawError(f"the server stopped: {error!r}") from error


def _store(config: Config, catalog: Catalog) -> SnapshotStore:
    settings, remote = config.snapshots, None
    if settings.s3 is not None:
        from rethaw.snapshots.tiers.s3 import S3Tier

        tier = S3Tier(settings.s3)
        uploader = Uploader(
            tier,
            config.data_dir / "snapshots" / "remote",
            linger_s=settings.s3.linger_s,
            on_uploaded=catalog.uploaded,
        )
        remote = Remote(tier, uploader)
    return SnapshotStore(
        config.data_dir,
        keys=settings.keyring(),
        staging_bytes=settings.staging_bytes,
        kept_bytes=settings.cache_bytes,
        remote=remote,
        lazy_from=settings.lazy_from_bytes,
    )


async def _serve_api(server: uvicorn.Server, sock: socket.socket) -> None:
    # Server.serve would take SIGTERM for itself; here the node ends before the API does.
    with contextlib.suppress(asyncio.CancelledError):
        await server._serve(sockets=[sock])  # pyright: ignore[reportPrivateUsage]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(value))
    partial.rename(path)
