"""Runs a step of an image in a gVisor sandbox of its own: root inside, no network card, HTTP through `images.proxy`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rethaw.images import build, driver, proxy, runtime
from rethaw.model.errors import ImageError

_CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETFCAP",
    "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
]  # fmt: skip
_PROXY = f"http://127.0.0.1:{driver.PORT}"
ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    **{name: _PROXY for one in ("http_proxy", "https_proxy") for name in (one, one.upper())},
    "no_proxy": "127.0.0.1,localhost",
    "NO_PROXY": "127.0.0.1,localhost",
}
_DELETE_S = 30.0


@dataclass(frozen=True)
class Job:
    """A shell command. `allowed`: hosts that it reaches even where their addresses are not public; `files`: name to text,
    at driver.SHARE, which is no part of the image; `trees`: name to a directory or zip of this machine, whose contents are
    there as well; `workdir`: made when it is missing."""

    command: str
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    allowed: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    workdir: str = "/"
    trees: Mapping[str, Path] = field(default_factory=dict[str, Path])


async def run(
    what: str,
    job: Job,
    below: Path,
    work: Path,
    progress: Callable[[str], None],
    runtime_: Path | None = None,
) -> Path:
    """Do `job` on the tree `below`, which stays as it is. `runtime_`: the tree whose private interpreter drives it, where
    `below` has none. Returns the directory that says what it changed, under `work`
    (made). Raises ImageError with its last lines; no process or mount is left either way."""
    runsc = os.environ.get("RETHAW_RUNSC") or shutil.which("runsc")
    if runsc is None:
        raise ImageError(f"{what} needs gVisor to run in, and runsc is not on PATH", remedy="see `rethaw doctor`")
    share, bundle = work / "share", work / "bundle"
    for directory in (share / "tmp", bundle, work / "overlay", work / "runsc"):
        await asyncio.to_thread(directory.mkdir, parents=True)
    told = {"command": job.command, "env": {**ENV, **job.env}, "workdir": job.workdir}
    for name, text in {"job.json": json.dumps(told), **job.files}.items():
        await asyncio.to_thread(_private, share / name, text)
    for name, tree in job.trees.items():
        await asyncio.to_thread(_copied, tree, share / name)
    source = await asyncio.to_thread(Path(driver.__file__).read_text)
    await asyncio.to_thread((share / "driver.py").write_text, source)
    await asyncio.to_thread((bundle / "config.json").write_text, json.dumps(_config(below, share, runtime_)))
    if runtime_ is not None:
        await asyncio.to_thread((share / PurePosixPath(runtime.HOME).name).mkdir)
    ident = f"build-{uuid.uuid4().hex[:12]}"
    common = [runsc, f"--root={work}/runsc", "--platform=systrap", "--network=none", "--ignore-cgroups"]
    argv = [*common, f"--overlay2=root:dir={work}/overlay", "--host-uds=open", "run", "--bundle", str(bundle), ident]
    # A Unix socket's path is short; the directory's need not be.
    handle = os.open(share, os.O_PATH | os.O_DIRECTORY)
    try:
        hosts = [*job.allowed, *filter(None, os.environ.get("RETHAW_BUILD_ALLOW", "").split(","))]
        async with proxy.serving(Path(f"/proc/self/fd/{handle}/net.sock"), hosts):
            await build.run(what, argv, progress, {"PATH": ENV["PATH"]}, who="its command")
    finally:
        os.close(handle)
        await asyncio.shield(_delete([*common, "delete", "--force", ident]))
    return share / "out"


def _private(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(text)


def _copied(tree: Path, target: Path) -> None:
    """With its dates, by which byte code is found to be right."""
    if tree.is_dir():
        shutil.copytree(tree, target)
    else:
        with zipfile.ZipFile(tree) as archive:
            archive.extractall(target)


async def _delete(argv: list[str]) -> None:
    """A sandbox that ended is gone already; one that was given up is killed here."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await asyncio.wait_for(process.wait(), _DELETE_S)
    except TimeoutError:  # it waits for its sandbox to be gone, whose remains nobody may have reaped
        process.kill()
        await process.wait()


def _config(rootfs: Path, share: Path, runtime_: Path | None) -> dict[str, Any]:
    def tmpfs(where: str, mode: str) -> dict[str, Any]:
        options = ["nosuid", "nodev", f"mode={mode}"]
        return {"destination": where, "type": "tmpfs", "source": "tmpfs", "options": options}

    def bound(where: str, source: Path, how: str) -> dict[str, Any]:
        return {"destination": where, "type": "bind", "source": str(source), "options": ["bind", how]}

    capabilities = dict.fromkeys(("bounding", "effective", "permitted", "inheritable"), _CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [runtime.PYTHON if runtime_ else "/usr/bin/python3", "-I", "-S", f"{driver.SHARE}/driver.py"],
            "env": [f"PATH={ENV['PATH']}", "LANG=C.UTF-8"],
            "cwd": "/",
            "capabilities": capabilities,
        },
        "root": {"path": str(rootfs), "readonly": False},  # writes go to an overlay beside the tree
        "hostname": "build",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            tmpfs("/dev/shm", "1777"),
            tmpfs("/run", "755"),
            tmpfs("/tmp", "1777"),
            bound(driver.SHARE, share, "rw"),
            *([bound(f"/{runtime.HOME}", runtime_ / runtime.HOME, "ro")] if runtime_ else []),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]},
    }
