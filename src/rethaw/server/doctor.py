"""What this machine needs to run agents, looked at without a server. Only an engine's probe proves that agents run; the
other checks say what to install when it does not."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rethaw.db import binaries
from rethaw.engines.base import ProbeReport
from rethaw.engines.cgroups import detect
from rethaw.model.errors import RethawError
from rethaw.sdk.sizes import human_bytes
from rethaw.server.config import Config
from rethaw.server.engines import engines_of, microvm_assets
from rethaw.snapshots.tiers.s3 import S3Tier
from rethaw.snapshots.tiers.settings import S3Settings

_DISK_LEAST = 2 << 30  # an image, and some snapshots
_STAGING = Path("/dev/shm")  # DESIGN §7: a pause ends once the engine has written into memory
_STAGING_LEAST = 1 << 30
_BUCKET_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `needed`: agents cannot run without it. `remedy` is empty when `ok`."""

    name: str
    ok: bool
    said: str
    remedy: str = ""
    needed: bool = True


def of_report(report: ProbeReport, *, needed: bool = True) -> Finding:
    """An engine's probe as a finding. `needed`: it is the default."""
    times = ((report.boot_ms, "boot"), (report.save_ms, "save"), (report.restore_ms, "restore"))
    took = ", ".join(f"{name} {ms:.0f} ms" for ms, name in times if ms is not None)
    said = f"{report.version}: {report.detail}" + (f" ({took})" if took else "")
    return Finding(report.engine, report.ok, said, report.remedy, needed)


def recommended(reports: Sequence[ProbeReport]) -> Finding:
    """Which engine to use here, the default coming first. gVisor where it works: without KVM a microVM's CPU is about ten
    times slower, and it takes more memory; a microVM is for agents that want a kernel of their own."""
    works = {report.engine for report in reports if report.ok}
    best = next((name for name in ("gvisor", "qemu") if name in works), None)
    if best is None:
        return Finding("engine", False, "none works", "see what each of them says above")
    default = reports[0].engine
    said = f"recommended: {best}" + ("" if best == default else f" (the default here is {default})")
    if best == "gvisor" and "qemu" in works:
        said += "; qemu for agents that need a kernel of their own"
    return Finding("engine", default in works, said, f'set engine = "{best}"', needed=False)


async def examine(config: Config, timeout_s: float = 60.0) -> AsyncIterator[Finding]:
    """Each check as soon as it is done; the probes of the engines, the longest, at the end. Needs root."""
    yield _python()
    yield await asyncio.to_thread(_postgres, config)
    yield _disk(config.data_dir)
    yield _staging()
    yield _limits()
    yield _builder()
    for name in config.providers.names():
        yield _provider(config, name)
    if (keys := _keys(config)) is not None:
        yield keys
    if config.snapshots.s3 is not None:
        yield await probe_bucket(config.snapshots.s3)
    with tempfile.TemporaryDirectory(prefix="rethaw-doctor-") as scratch:
        engines = engines_of(Path(scratch), config.engine, assets=microvm_assets(config.data_dir))
        # Its warnings repeat what the findings say.
        logging.getLogger("rethaw.engines").setLevel(logging.ERROR)
        try:
            reports: list[ProbeReport] = []
            for engine in engines:
                reports.append(await engine.probe(timeout_s))
                yield of_report(reports[-1], needed=engine is engines.default)
            yield recommended(reports)
        finally:
            await engines.close()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "python", sys.version_info >= (3, 11), f"{version} ({sys.executable})", "install Python 3.11 or newer"
    )


def _postgres(config: Config) -> Finding:
    if config.database_url is not None:
        return Finding("postgresql", True, "the one that database_url names")
    try:
        recorded = config.data_dir / "pg" / "PG_VERSION"
        major = int(recorded.read_text()) if recorded.exists() else None
        found = binaries.choose(major)
    except RethawError as e:
        return Finding("postgresql", False, e.message, e.remedy or "")
    except (OSError, ValueError) as e:
        return Finding("postgresql", False, f"{config.data_dir / 'pg'} cannot be read: {e}", "run this as root")
    return Finding("postgresql", True, f"{found.major} from {found.origin} ({found.bin})")


def _disk(path: Path) -> Finding:
    existing = next(p for p in (path, *path.parents) if p.exists())
    usage = shutil.disk_usage(existing)
    ok = usage.free >= _DISK_LEAST and os.access(existing, os.W_OK)
    said = f"{human_bytes(usage.free)} free for {path}"
    return Finding("disk", ok, said, f"make room for {human_bytes(_DISK_LEAST)} or set data_dir to another disk")


def _staging() -> Finding:
    if not _STAGING.is_dir():
        return Finding("staging", False, f"there is no {_STAGING}", f"mount a tmpfs at {_STAGING}")
    free = shutil.disk_usage(_STAGING).free
    remedy = f"enlarge it: mount -o remount,size=2G {_STAGING}"
    return Finding("staging", free >= _STAGING_LEAST, f"{human_bytes(free)} free in {_STAGING}", remedy, needed=False)


def _limits() -> Finding:
    found = detect()
    remedy = "mount cgroup v2 with the memory and pids controllers"
    return Finding("limits", not found.notes, found.notes or f"cgroup v{found.version}", remedy, needed=False)


def _builder() -> Finding:
    path = shutil.which("mmdebstrap")
    return Finding("images", path is not None, path or "mmdebstrap is missing", "apt install mmdebstrap")


def _provider(config: Config, name: str) -> Finding:
    try:
        provider = config.providers.get(name)
    except RethawError as e:
        return Finding(f"provider {name}", False, e.message, e.remedy or "", needed=False)
    return Finding(f"provider {name}", True, provider.base_url, needed=False)


def _keys(config: Config) -> Finding | None:
    """None when snapshots are not to be encrypted."""
    try:
        keyring = config.snapshots.keyring()
    except RethawError as e:
        return Finding("encryption", False, e.message, e.remedy or "")
    return None if keyring.active is None else Finding("encryption", True, f"with the key {keyring.active}")


async def probe_bucket(settings: S3Settings) -> Finding:
    """A small object is put, read and deleted."""
    tier = S3Tier(replace(settings, timeout_s=min(settings.timeout_s, _BUCKET_S)))
    name, content = f"probe/{os.urandom(8).hex()}", os.urandom(1024)
    started = time.monotonic()
    try:
        try:
            await tier.put(name, content)
            same = await tier.get(name, 0, len(content)) == content
        finally:
            await tier.delete(name)
    except RethawError as e:
        return Finding("bucket", False, e.message, e.remedy or "", needed=False)
    said = f"{tier.label}: put, get and delete in {(time.monotonic() - started) * 1000:.0f} ms"
    remedy = "look for a proxy or cache between"
    return Finding("bucket", same, said if same else f"{tier.label} gave back other bytes", remedy, needed=False)
