"""The steps that make trees: Debian, Python packages, byte code. Each raises ImageError with its last lines."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import marshal
import os
import platform
import re
import shutil
import signal
import sys
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
DIST_PACKAGES = "usr/local/lib/python{}/dist-packages"
# Files of /etc. No name server: an empty resolv.conf would make the resolver wait for one on loopback.
NAMES = {
    "hosts": "127.0.0.1 localhost agent\n::1 localhost ip6-localhost ip6-loopback\n",
    "hostname": "agent\n",
    "resolv.conf": "# there is no network here; HTTP goes through $HTTP_PROXY\noptions timeout:1 attempts:1\n",
}
_GLIBC_MINOR = {"bookworm": 36}  # newest manylinux tag that the suite's libc takes


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


async def debian(suite: str, packages: tuple[str, ...], rootfs: Path, progress: Callable[[str], None]) -> None:
    """A minimal Debian with the base packages and `packages` in `rootfs` (made)."""
    if os.geteuid() != 0:
        raise ImageError("only root can build an image", remedy="start the server as root")
    found = await asyncio.to_thread(mirrors.find, suite)
    include = ",".join(sorted({*BASE_PACKAGES, *packages}))
    what = f"building Debian {suite} with {include}"
    argv = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={include}"]
    argv += [f"--aptopt={option}" for option in found.options]
    argv += [f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED]
    argv += [f"--dpkgopt=path-include={pattern}" for pattern in _INCLUDED]

    def told(line: str) -> None:
        # Of mmdebstrap's hundreds of lines only its own steps are news; "I: " marks them.
        if re.match(r"(I|W|E): ", line):
            progress(f"debian: {line[3:]}")

    if packages:
        # A misspelt name would be found after half a minute of unpacking.
        trial = rootfs.with_name("trial")
        await run(what, [*argv, "--simulate", suite, str(trial), *found.sources], lambda _: None)
        await asyncio.to_thread(shutil.rmtree, trial, True)
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


def installer(suite: str, target: Path) -> list[str]:
    """argv of an installer that can install for another Python than its own."""
    version = SUITES[suite]
    machine = platform.machine()
    if importlib.util.find_spec("pip") is not None:
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(_GLIBC_MINOR[suite], 4, -1)]
        platforms += [
            f"manylinux2014_{machine}",
            f"manylinux2010_{machine}",
            f"manylinux1_{machine}",
            f"linux_{machine}",
        ]
        argv = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile"]
        argv += [
            "--progress-bar=off",
            "--root-user-action=ignore",
            "--implementation=cp",
            f"--python-version={version}",
        ]
        argv += [f"--abi=cp{version.replace('.', '')}", "--abi=abi3", "--abi=none"]
        argv += [f"--platform={name}" for name in platforms]
        return [*argv, "--only-binary=:all:", f"--target={target}"]
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is not None:
        where = f"{machine}-manylinux_2_{_GLIBC_MINOR[suite]}"
        argv = [uv, "pip", "install", f"--python-version={version}", f"--python-platform={where}"]
        return [*argv, "--only-binary=:all:", f"--target={target}"]
    raise ImageError("neither pip nor uv is here to install Python packages", remedy=f"{sys.executable} -m ensurepip")


async def python_packages(
    suite: str, requirements: tuple[str, ...], rootfs: Path, progress: Callable[[str], None]
) -> None:
    """Install wheels for the tree's own python3. Nothing of them is executed on the host."""
    target = rootfs / DIST_PACKAGES.format(SUITES[suite])
    target.mkdir(parents=True, exist_ok=True)
    argv = installer(suite, target)
    progress(f"pip: installing {' '.join(requirements)}")

    def told(line: str) -> None:
        if line.startswith(("Downloading", "Installing", "Successfully", "ERROR", "Resolved", "Installed")):
            progress(f"pip: {line}")

    await run(f"installing {' '.join(requirements)}", [*argv, *requirements], told, pip_env())
    await asyncio.to_thread(scripts, target / "bin", rootfs / "usr/local/bin")
    await byte_compile(rootfs, target)


def pip_env() -> dict[str, str]:
    return {**os.environ, "PYTHONNOUSERSITE": "1"}


def scripts(source: Path, target: Path) -> None:
    """Console scripts name the host's interpreter; give them the tree's, and a place on PATH. Blocking."""
    if not source.is_dir():
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        data = path.read_bytes()
        if data.startswith(b"#!") and b"python" in data.partition(b"\n")[0]:
            data = b"#!/usr/bin/python3\n" + data.partition(b"\n")[2]
        goal = target / path.name
        goal.unlink(missing_ok=True)
        goal.write_bytes(data)
        goal.chmod(0o755)
    shutil.rmtree(source)


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
