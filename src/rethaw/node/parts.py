"""What every session's supervisor on a node shares."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from rethaw.engines.base import Base, SandboxSpec
from rethaw.engines.several import Engines
from rethaw.gateway.gateway import Gateway
from rethaw.images import guest
from rethaw.images.builder import ImageStore
from rethaw.model.egress import EgressSettings
from rethaw.model.ports import ControlPlane, LogSink, SnapshotCatalog
from rethaw.node.terminal import Terminals
from rethaw.snapshots.store import SnapshotStore

_GUESTD = ("-I", "-S", "-u", "/.rethaw/lib/rethaw/guest/guestd.py")
GUEST_ARGV = ("/usr/bin/python3", *_GUESTD)
GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Timing:
    """Seconds. Tests shorten them; none is part of a promise."""

    ping_every: float = 10.0
    ping_timeout: float = 30.0
    hold_freeze: float = 4.0  # a held provider freezes the agent after this long (promise: within 5 s)
    wait_report: float = 0.2  # a wait shorter than this is not reported as `waiting`
    run_report: float = 0.05  # and so much of what comes between two waits not as `running`
    save_attempts: int = 3  # failed saves in a row before answers are released and durability is degraded
    degraded_every: float = 10.0  # a save is tried again at least so often while durability is degraded
    poll: float = 20.0


@dataclass
class Parts:
    """The rooms that a supervisor uses. `providers`: names under which the guest reaches model providers."""

    node: str
    incarnation: str
    data_dir: Path
    engines: Engines
    images: ImageStore
    store: SnapshotStore
    gateway: Gateway
    log: LogSink
    control: ControlPlane
    catalog: SnapshotCatalog
    providers: tuple[str, ...] = ()
    timing: Timing = field(default_factory=Timing)
    egress: EgressSettings = field(default_factory=EgressSettings)
    terminals: Terminals = field(default_factory=Terminals)
    ahead: int = 1  # sandboxes created ahead for each spec in use

    async def sandbox_spec(self, image_digest: str, rootfs: Path, memory_bytes: int, pids: int) -> SandboxSpec:
        base = await self.images.base(image_digest)
        return SandboxSpec(
            image_digest=image_digest,
            rootfs=rootfs,
            memory_bytes=memory_bytes,
            pids=pids,
            argv=(await asyncio.to_thread(guest.python, rootfs), *_GUESTD),
            env=(("PATH", GUEST_PATH), ("LANG", "C.UTF-8"), ("HOME", "/root")),
            base=None if base is None else Base(*base),
        )
