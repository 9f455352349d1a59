"""What makes trees on this machine: Debian, copies, byte code. Each raises ImageError with its last lines."""

from __future__ import annotations

import asyncio
import contextlib
import io
import marshal
import os
import re
import shutil
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path

from rethaw.images import mirrors
from rethaw.images.spec import BASE_PACKAGES, SUITES
from rethaw.model.errors import ImageError

STEP_TIMEOUT_S = 1800.0
_LAST_LINES = 12
_SLOW = "check the mirror, and that no command waits for input"
_EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*")
_INCLUDED = ("/usr/share/doc/*/copyright", "/usr/share/locale/locale.alias")
# Files of /etc. No name server is named: resolvers then ask 127.0.0.1, where guestd answers (rethaw.guest.names).
NAMES = {
    "hosts": "127.0.0.1 localhost agent\n::1 localhost ip6-localhost ip6-loopback\n",
    "hostname": "agent\n",
    "resolv.conf": "# there is no network here; HTTP goes through $HTTP_PROXY\noptions timeout:1 attempts:1\n",
}


async def run(
    what: str, argv: list[str], progress: Callable[[str], None], env: dict[str, str] | None = None, who: str = ""
) -> None:
    """Run a step in its own process group; its lines go to `progress`. `who`: what exits, for the message of a failure.
    Raises ImageError when it fails or takes longer than STEP_TIMEOUT_S."""
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise ImageError(f"{argv[0]} is not installed", remedy=f"apt install {argv[0]}") from None
    assert process.stdout is not None

    async def read(stream: asyncio.StreamReader) -> int:
        while chunk := await stream.readline():
            # Progress bars rewrite their line.
            line = chunk.decode(errors="replace").rstrip().rpartition("\r")[2]
            if line:
                lines.append(line)
                progress(line)
        return await process.wait()

    try:
        code = await asyncio.wait_for(read(process.stdout), STEP_TIMEOUT_S)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 10)
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, TimeoutError):
            raise ImageError(f"{what} took longer than {STEP_TIMEOUT_S:.0f}s", remedy=_SLOW) from None
        raise
    if code != 0:
        said = "\n  ".join(lines)
        raise ImageError(
            f"{what} failed ({who or argv[0]} exited with {code}):\n  {said}", remedy="correct it and try again"
        )


async def debian(suite: str, rootfs: Path, progress: Callable[[str], None]) -> None:
    """A minimal Debian with the base packages in `rootfs` (made). Their own scripts run as root here, in a chroot: nothing
    that a user names may be among them."""
    if os.geteuid() != 0:
        raise ImageError("only root can build an image", remedy="start the server as root")
    found = await asyncio.to_thread(mirrors.find, suite)
    include = ",".join(BASE_PACKAGES)
    what = f"building Debian {suite} with {include}"
    argv = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={include}"]
    argv += [f"--aptopt={option}" for option in found.options]
    argv += [f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED]
    argv += [f"--dpkgopt=path-include={pattern}" for pattern in _INCLUDED]

    def told(line: str) -> None:
        # Of mmdebstrap's hundreds of lines only its own steps are news; "I: " marks them.
        if re.match(r"(I|W|E): ", line):
            progress(f"debian: {line[3:]}")

    await run(what, [*argv, suite, str(rootfs), *found.sources], told)
    await asyncio.to_thread(_settle, rootfs)


def _settle(rootfs: Path) -> None:
    """What a sandbox without network and without an installer needs to be sane. Blocking."""
    for name, text in NAMES.items():
        _replace(rootfs / "etc" / name, text)
    for name in ("app", ".rethaw"):
        (rootfs / name).mkdir(exist_ok=True)
    for pattern in (
        "var/cache/apt/*",
        "var/lib/apt/lists/*",
        "var/cache/debconf/*-old",
        "var/log/*.log",
        "var/log/apt/*",
    ):
        for path in rootfs.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    """A new file, never a write into one that other trees share."""
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o644)


async def link_copy(source: Path, target: Path) -> None:
    """A tree of hard links to `source`."""
    await run(f"copying {source}", ["cp", "-al", "--", str(source), str(target)], lambda _: None)


async def byte_compile(rootfs: Path, directory: Path) -> None:
    """Compile what is under `directory` with the tree's python3: a read-only base cannot cache at run time.

    The byte code is checked against nothing later (its sources never change), which saves a look at each source."""
    inside = "/" + directory.relative_to(rootfs).as_posix()
    argv = ["chroot", str(rootfs), "/usr/bin/python3", "-I", "-S", "-m", "compileall", "-q", "-j", "1"]
    argv += ["--invalidation-mode", "unchecked-hash", inside]
    try:
        await run(f"compiling {inside}", argv, lambda _: None, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    except ImageError:
        # A package may ship a file that is no Python of this version (a template, a test): the rest is compiled.
        if not any(directory.rglob("*.pyc")):
            raise


_COMPILE = """
import importlib._bootstrap_external as b, importlib.util as u, marshal, sys
for name, data in marshal.load(sys.stdin.buffer):
    try:
        code = compile(data, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        marshal.dump((name, None), sys.stdout.buffer)
    else:
        pyc = bytes(b._code_to_hash_pyc(code, u.source_hash(data), False))
        marshal.dump((name, pyc), sys.stdout.buffer)
marshal.dump(None, sys.stdout.buffer)
"""


async def compile_apart(python: Path, rootfs: Path, directory: Path) -> None:
    """`byte_compile` by the python3 of another tree, `python`: one that a step has been at is not executed here."""

    def sources() -> bytes:
        found = [(f"/{p.relative_to(rootfs).as_posix()}", p.read_bytes()) for p in _python_files(directory)]
        return marshal.dumps(found, 4)

    def write(answer: bytes) -> None:
        stream = io.BytesIO(answer)
        while (one := marshal.load(stream)) is not None:
            name, data = one
            if data is not None:
                path = rootfs / str(name).lstrip("/")
                cache = path.parent / "__pycache__"
                cache.mkdir(exist_ok=True)
                goal = cache / f"{path.stem}.{tag}.pyc"
                goal.unlink(missing_ok=True)
                goal.write_bytes(data)

    version = next(v for v in SUITES.values() if (python / f"usr/lib/python{v}").is_dir())
    tag = f"cpython-{version.replace('.', '')}"
    argv = ["chroot", str(python), "/usr/bin/python3", "-I", "-S", "-c", _COMPILE]
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    out, _ = await process.communicate(await asyncio.to_thread(sources))
    if process.returncode != 0:
        raise ImageError(f"compiling {directory} failed (python3 exited with {process.returncode})")
    await asyncio.to_thread(write, out)


def _python_files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*.py") if p.is_file() and not p.is_symlink())
