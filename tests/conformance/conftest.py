"""Fixtures of the conformance suites."""

from engine_fixtures import boot, data_dir, engine, make_engine, rootfs, spec, staging

__all__ = ["boot", "data_dir", "engine", "make_engine", "rootfs", "spec", "staging"]
