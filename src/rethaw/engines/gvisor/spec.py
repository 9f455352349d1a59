"""The OCI configuration of a sandbox. A function of `SandboxSpec` alone: saved and restored under the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rethaw.engines.base import CAPABILITIES, GUESTD_CAPABILITIES, OPEN_FILES, SandboxSpec

MIB = 1 << 20


def memory_limit(memory_bytes: int) -> int:
    """The host's limit for a guest of `memory_bytes`: its memory, plus the sentry and gofer.

    Measured with runsc 20240729: 14 MiB before the guest runs, 1 % of the guest's memory for page tables and page
    accounting, 1-2 MiB for each process. 64 MiB + 1/16 leaves room for about 40 processes of nothing but overhead.
    """
    return memory_bytes + 64 * MIB + memory_bytes // 16


def task_limit(pids: int) -> int:
    """The host's task limit for a guest of `pids` processes: each is up to three tasks, plus the sentry's threads.

    The guest itself is held at `pids` by RLIMIT_NPROC (per user, EAGAIN); this one is for the host's sake, against a
    guest that spreads over many users, and ends the sandbox.
    """
    return 3 * pids + 256


def config(spec: SandboxSpec, cgroup: str | None) -> dict[str, Any]:
    """config.json as a dictionary. `cgroup` is the sandbox's own, below the root of each hierarchy; a save and its
    restores differ in nothing else."""

    def tmpfs(where: str, mode: str) -> dict[str, Any]:
        return {
            "destination": where,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "nodev", f"mode={mode}"],
        }

    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "noNewPrivileges": True,
            "user": {"uid": 0, "gid": 0},
            "args": list(spec.argv),
            "env": [f"{key}={value}" for key, value in spec.environment().items()],
            "cwd": "/",
            # What PID 1 has, and its children, which get no more than the bounding set when they execute a program. No
            # inheritable or ambient set: a program that drops to another user has none left.
            "capabilities": {
                "bounding": list(CAPABILITIES),
                "effective": list(GUESTD_CAPABILITIES),
                "permitted": list(GUESTD_CAPABILITIES),
            },
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "hard": OPEN_FILES, "soft": OPEN_FILES},
                {"type": "RLIMIT_NPROC", "hard": spec.pids, "soft": spec.pids},
                {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
            ],
        },
        "root": {"path": str(spec.rootfs), "readonly": False},  # writes go to the overlay in memory
        "hostname": spec.hostname,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            tmpfs("/dev/shm", "1777"),
            tmpfs("/run", "755"),
            tmpfs("/tmp", "1777"),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            **({"cgroupsPath": cgroup} if cgroup else {}),
        },
    }


def write_bundle(spec: SandboxSpec, bundle: Path, cgroup: str | None) -> Path:
    """The bundle directory of one sandbox. Blocking."""
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "config.json").write_text(json.dumps(config(spec, cgroup)))
    return bundle
