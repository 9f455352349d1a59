"""The steps of an image on its base: Debian, Python and npm packages, commands, uploaded files.

What comes from outside runs in a sandbox (`images.sandbox`) or not at all: files are placed.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rethaw.images import archive, build, changes, mirrors, npm, places, pypi, sandbox
from rethaw.images.spec import KERNELS, all_steps
from rethaw.model.errors import ImageError
from rethaw.model.image_types import ImageSpec, ImageStep

Progress = Callable[[str], None]
_APT = """
command -v apt-get >/dev/null || {{ echo "the image has no apt-get: it is not made of Debian packages"; exit 127; }}
apt-get update -q
apt-get install -q -y --no-install-recommends -o Acquire::Retries=3 {packages}
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
"""


@dataclass(frozen=True)
class Below:
    """What a step stands on. `runtime`: the tree with the private interpreter, of an image that is not of Debian's making."""

    rootfs: Path
    runtime: Path | None = None


async def perform(spec: ImageSpec, number: int, below: Below, rootfs: Path, blobs: Path, progress: Progress) -> None:
    """Make `rootfs` from `below` by step `number` of `all_steps(spec)`. Raises ImageError naming the step."""
    every = all_steps(spec)
    step = every[number]
    what = f"step {number + 1} of the image, {_short(step)},"
    progress(f"step {number + 1} of {len(every)}: {_short(step)}")
    if step.kind == "run":
        job = sandbox.Job(step.words[0], dict(step.env), workdir=step.workdir or "/")
        await _sandboxed(what, job, below, rootfs, progress)
    elif step.kind == "apt":
        command = _APT.format(packages=_quoted(step.words))
        hosts = await asyncio.to_thread(_mirror_hosts, spec.suite)
        await _sandboxed(what, sandbox.Job(command, allowed=hosts), below, rootfs, progress)
    elif step.kind == "npm":
        found = await asyncio.to_thread(npm.find)
        hosts = (*found.hosts, *await asyncio.to_thread(_mirror_hosts, spec.suite))
        job = sandbox.Job(npm.command(step.words), found.env(), hosts, found.files())
        await _sandboxed(what, job, below, rootfs, progress)
    elif step.kind == "pip":
        before = [word for earlier in every[:number] if earlier.kind == "pip" for word in earlier.words]
        await _sandboxed(what, await asyncio.to_thread(_pip, spec, step, before), below, rootfs, progress)
    else:
        await build.link_copy(below.rootfs, rootfs)
        await _add(what, step, rootfs, blobs)


def _pip(spec: ImageSpec, step: ImageStep, before: list[str]) -> sandbox.Job:
    found = pypi.find()
    wanted = pypi.Wanted(step.words, tuple(before))
    python = spec.python or ("python3" if spec.oci is not None else "/usr/bin/python3")
    command = pypi.command(python, own=spec.python is not None or spec.oci is not None)
    env = {**step.env, **found.env()}
    return sandbox.Job(command, env, found.hosts, {**found.files(), **wanted.files()}, trees=pypi.tool())


def _short(step: ImageStep) -> str:
    said = " ".join(step.said().split())
    return f"`{said if len(said) <= 80 else said[:77] + '...'}`"


def _quoted(words: Iterable[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


async def _sandboxed(what: str, job: sandbox.Job, below: Below, rootfs: Path, progress: Progress) -> None:
    work = rootfs.with_name("work")
    try:
        out = await sandbox.run(what, job, below.rootfs, work, lambda line: progress(f"  {line}"), below.runtime)
        await build.link_copy(below.rootfs, rootfs)
        try:
            await asyncio.to_thread(changes.apply, out, rootfs)
        except ImageError as error:
            raise ImageError(f"{what} failed: {error.message}", remedy=error.remedy) from error
    finally:
        await asyncio.to_thread(shutil.rmtree, work, True)


def _mirror_hosts(suite: str) -> tuple[str, ...]:
    found: list[str] = re.findall(r"https?://\S+", " ".join(mirrors.find(suite).sources))
    return tuple(sorted({urlsplit(uri).hostname or "" for uri in found}))


async def _add(what: str, step: ImageStep, rootfs: Path, blobs: Path) -> None:
    source = blobs / f"{step.blob}.tar.gz"
    if not source.is_file():
        raise ImageError(f"{what} failed: its files are not on this node", remedy="start the agent again")
    fresh = rootfs.with_name("added")
    try:
        await asyncio.to_thread(archive.extract, source, fresh)
        for name in KERNELS if step.target == "/" else ():
            if (fresh / name).is_symlink() or (fresh / name).exists():
                raise ImageError(f"/{name} is made anew in each sandbox", remedy="use another place")
        await asyncio.to_thread(places.merge, fresh, rootfs, step.target or "/")
    except ImageError as error:
        raise ImageError(f"{what} failed: {error.message}", remedy=error.remedy) from error
    finally:
        await asyncio.to_thread(shutil.rmtree, fresh, True)
