"""Cgroups: what is detected, and version 2's files, on a made-up tree (the machine's own is covered by conformance)."""

from __future__ import annotations

from pathlib import Path

import pytest

from rethaw.engines import cgroups, cpu

V1 = """\
tmpfs {root} tmpfs rw 0 0
cgroup {root}/cpu cgroup rw,relatime,cpu 0 0
cgroup {root}/memory cgroup rw,relatime,memory 0 0
cgroup {root}/pids cgroup rw,relatime,pids 0 0
cgroup {root}/systemd cgroup rw,relatime,name=systemd 0 0
cgroup2 {root}/unified cgroup2 rw 0 0
"""


def mounts(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mounts"
    path.write_text(text.format(root=tmp_path))
    return path


def test_version_1_and_an_empty_version_2(tmp_path: Path) -> None:
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified/cgroup.controllers").write_text("")
    found = cgroups.detect(mounts(tmp_path, V1))
    assert found.works
    assert found.version == 1
    assert found.memory == tmp_path / "memory"
    assert tmp_path / "systemd" in found.mounts


def test_no_controllers_is_said(tmp_path: Path) -> None:
    found = cgroups.detect(mounts(tmp_path, "tmpfs / tmpfs rw 0 0\n"))
    assert not found.works
    assert found.notes == "no cgroup controller for memory and pids"
    group = found.create("owner", "name", 1 << 20, 10)
    assert group.usage() == group.oom_kills() == 0
    assert group.limit(1)


@pytest.fixture
def v2(tmp_path: Path) -> cgroups.Cgroups:
    (tmp_path / "cgroup.controllers").write_text("cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("")
    # The kernel makes these files with each directory.
    for directory, names in {
        "rethaw": ["cgroup.subtree_control"],
        "rethaw/owner": ["cgroup.subtree_control"],
        "rethaw/owner/one": ["memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "cgroup.procs"],
    }.items():
        (tmp_path / directory).mkdir()
        for name in names:
            (tmp_path / directory / name).write_text("")
    return cgroups.detect(mounts(tmp_path, "cgroup2 {root} cgroup2 rw 0 0\n"))


def test_version_2_sets_its_limits(tmp_path: Path, v2: cgroups.Cgroups) -> None:
    assert v2.works
    assert v2.version == 2
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids"
    home = tmp_path / "rethaw/owner/one"
    (home / "memory.current").write_text("4096\n")
    group = v2.create("owner", "one", 64 << 20, 77)
    assert (home / "memory.max").read_text() == str(64 << 20)
    assert (home / "memory.oom.group").read_text() == "1"
    assert (home / "memory.swap.max").read_text() == "0"
    assert (home / "pids.max").read_text() == "77"
    assert group.directories == [home]
    (home / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert group.oom_kills() == 2


def test_version_2_is_never_set_below_what_is_used(tmp_path: Path, v2: cgroups.Cgroups) -> None:
    home = tmp_path / "rethaw/owner/one"
    (home / "memory.current").write_text("1000000\n")
    group = v2.group("owner", "one")
    group.raise_limit(2_000_000)
    assert not group.limit(500_000), "the kernel would kill the guest instead of refusing"
    assert (home / "memory.max").read_text() == "2000000"


def test_cpu_features_are_those_of_all_cpus(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("vendor_id\t: X\nflags\t\t: a b c\n\nvendor_id\t: X\nflags\t\t: b c d\n")
    names = cpu.features(info)
    assert {"b", "c", "vendor=X"} <= names
    assert not {"a", "d"} & names
    name = cpu.remember(tmp_path / "cpu", names)
    assert cpu.recall(tmp_path / "cpu", name) == names
    (tmp_path / "cpu" / f"{name}.txt").write_text("damaged")
    assert cpu.recall(tmp_path / "cpu", name) is None
