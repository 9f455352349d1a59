"""The steps of an image beyond Debian and Python packages: more of both, commands, uploaded files, in any order.

What comes from outside runs in a sandbox (`images.sandbox`) or not at all: wheels are unpacked, files are placed.
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
from rethaw.images.spec import KERNELS, SUITES
from rethaw.model.errors import ImageError
from rethaw.model.types import ImageSpec, ImageStep

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
    """What a step stands on. `trusted`: the tree before any step, whose python3 may be executed here; `runtime`: the tree
    with the private interpreter, of an image that is not of Debian's making."""

    rootfs: Path
    trusted: Path
    runtime: Path | None = None


async def perform(spec: ImageSpec, number: int, below: Below, rootfs: Path, blobs: Path, progress: Progress) -> None:
    """Make `rootfs` from `below` by step `number` of `spec`. Raises ImageError naming the step."""
    step = spec.steps[number]
    what = f"step {number + 1} of the image, {_short(step)},"
    progress(f"step {number + 1} of {len(spec.steps)}: {_short(step)}")
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
    elif step.kind == "pip" and below.runtime is not None:
        found = await asyncio.to_thread(pypi.find)
        job = sandbox.Job(pypi.command(step.words), found.env(), found.hosts, found.files())
        await _sandboxed(what, job, below, rootfs, progress)
    elif step.kind == "pip":
        await build.link_copy(below.rootfs, rootfs)
        await _pip(what, spec, number, below.trusted, rootfs, progress)
    else:
        await build.link_copy(below.rootfs, rootfs)
        await _add(what, step, rootfs, blobs)


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


async def _pip(what: str, spec: ImageSpec, number: int, trusted: Path, rootfs: Path, progress: Progress) -> None:
    """Resolved with the requirements of the steps before, so that they fit together; installed apart, then moved in."""
    step = spec.steps[number]
    wanted = [*spec.pip, *(w for s in spec.steps[:number] if s.kind == "pip" for w in s.words), *step.words]
    fresh, listed = rootfs.with_name("packages"), rootfs.with_name("requirements.txt")
    await asyncio.to_thread(listed.write_text, "\n".join(wanted) + "\n")
    try:
        argv = [*build.installer(spec.suite, fresh), "-r", str(listed)]
        await build.run(what, argv, lambda _: None, build.pip_env(), who="the installer")
        place = build.DIST_PACKAGES.format(SUITES[spec.suite])
        target = await asyncio.to_thread(places.inside, rootfs, place)
        bin_ = await asyncio.to_thread(places.inside, rootfs, "usr/local/bin")
        await asyncio.to_thread(build.scripts, fresh / "bin", bin_)
        await asyncio.to_thread(_leave_what_is_there, fresh, target, rootfs)
        await build.compile_apart(trusted, fresh, fresh)
        await asyncio.to_thread(places.merge, fresh, rootfs, place)
        progress(f"  {len(wanted)} requirements fit together")
    finally:
        await asyncio.to_thread(shutil.rmtree, fresh, True)
        listed.unlink(missing_ok=True)


def _leave_what_is_there(fresh: Path, target: Path, rootfs: Path) -> None:
    """A distribution that the tree has in this version stays as it is; one in another version goes. Blocking."""
    known = {_name(path): path for path in target.glob("*.dist-info") if not path.is_symlink()}
    for about in list(fresh.glob("*.dist-info")):
        old = known.get(_name(about))
        if old is None:
            continue
        here, which = (fresh, about) if old.name == about.name else (target, old)
        for file in _recorded(which):
            parent = (
                places.inside(rootfs, (here / file).parent.relative_to(rootfs).as_posix())
                if here == target
                else (here / file).parent
            )
            path = parent / Path(file).name
            if path.is_symlink() or path.is_file():
                path.unlink()
        shutil.rmtree(which, ignore_errors=True)


def _name(about: Path) -> str:
    return re.sub(r"[-_.]+", "-", about.name.removesuffix(".dist-info").rpartition("-")[0]).lower()


def _recorded(about: Path) -> list[str]:
    """Files of a distribution below the directory that it is in; its scripts are elsewhere."""
    try:
        lines = (about / "RECORD").read_text().splitlines()
    except OSError:
        return []
    names = [line.rsplit(",", 2)[0].strip('"') for line in lines]
    return [name for name in names if name and not name.startswith("/") and ".." not in name.split("/")]
