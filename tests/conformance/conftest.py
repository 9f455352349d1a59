"""Fixtures of the conformance suites."""

from engine_fixtures import boot, data_dir, engine, make_engine, rootfs, spec, staging, warm
from tier_fixtures import ceph, kind, moto, tier

__all__ = [
    "boot",
    "ceph",
    "data_dir",
    "engine",
    "kind",
    "make_engine",
    "moto",
    "rootfs",
    "spec",
    "staging",
    "tier",
    "warm",
]
