"""Shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer  # pyright: ignore[reportMissingTypeStubs]
from xdist.scheduler import LoadScopeScheduling  # pyright: ignore[reportMissingTypeStubs]

# A developer's own server must never be what a test talks to.
for _name in ("RETHAW_URL", "RETHAW_TOKEN", "RETHAW_CONFIG", "RETHAW_DATA_DIR", "RETHAW_LISTEN", "DATABASE_URL"):
    os.environ.pop(_name, None)
# Nor their bucket or keys.
for _name in [n for n in os.environ if n.startswith(("AWS_", "RETHAW_S3_", "RETHAW_SNAPSHOT_"))]:
    del os.environ[_name]


class _ByFile(LoadScopeScheduling):
    """Of a file all tests go to one process, since they share servers; only chaos runs share nothing."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith("tests/chaos/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """xdist's own loadgroup does not see its groups with pytest 9.2, and loadfile knows no exception."""
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`root`: skipped, by name, where it cannot run at all."""
    for item in items:
        if os.geteuid() != 0 and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty HOME, so that credentials of tests never meet those of their user."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.delenv("SUDO_USER", raising=False)
    yield path
