"""A Python of our own for images that have none: Debian's, with its loader and libraries, in one directory.

Its program names that loader and finds its libraries beside it, whatever C library, loader cache or LD_LIBRARY_PATH the
image has. Nothing of it is on a program's PATH.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

from rethaw.images import build, mirrors
from rethaw.images.spec import SUITES

HOME = ".rethaw/python"
PYTHON = f"/{HOME}/bin/python3"
_PACKAGES = ("python3-minimal", "libpython{}-stdlib", "patchelf")
_BEHIND = ("test", "idlelib", "turtledemo", "ensurepip", "tkinter", "lib2to3", "pydoc_data", "config-")
_LIBRARIES = ("lib/*-linux-gnu*", "usr/lib/*-linux-gnu*")
# Of the debugger, the compiler's run time and the installer; nothing of Python needs them.
_NOT = ("libthread_db", "libstdc++", "libmemusage", "libpcprofile", "libc_malloc_debug", "libselinux", "libpcre")


async def make(suite: str, rootfs: Path, progress: Callable[[str], None]) -> None:
    """`rootfs`: packages of Debian, unpacked, with the interpreter in HOME. Raises ImageError."""
    version = SUITES[suite]
    found = await asyncio.to_thread(mirrors.find, suite)
    argv = ["mmdebstrap", "--mode=root", "--variant=extract", "--format=directory"]
    argv += [f"--include={','.join(_PACKAGES).format(version)}", *(f"--aptopt={option}" for option in found.options)]
    progress(f"unpacking Python {version} of Debian {suite}, once")
    what = f"unpacking the private Python {version}"
    await build.run(what, [*argv, suite, str(rootfs), *found.sources], lambda _: None)
    loader = await asyncio.to_thread(_gather, rootfs, version)
    program = f"/{HOME}/bin/python{version}"
    patch = ["chroot", str(rootfs), "/usr/bin/patchelf", "--set-interpreter", f"/{HOME}/lib/{loader}"]
    # RPATH and not RUNPATH: it counts before LD_LIBRARY_PATH, and for the libraries' own needs.
    await build.run(what, [*patch, "--force-rpath", "--set-rpath", f"/{HOME}/lib", program], lambda _: None)
    await build.byte_compile(rootfs, rootfs / HOME / "lib" / f"python{version}")


def _gather(rootfs: Path, version: str) -> str:
    """Copies of what belongs to the interpreter; the loader's name. Blocking."""
    home = rootfs / HOME
    (home / "bin").mkdir(parents=True)
    shutil.copy2(rootfs / f"usr/bin/python{version}", home / "bin")
    (home / "bin/python3").symlink_to(f"python{version}")

    def behind(directory: str, names: list[str]) -> set[str]:
        top = Path(directory).name == f"python{version}"
        return {
            name
            for name in names
            if (top and name.startswith(_BEHIND)) or not (Path(directory) / name).exists()  # links to what is not here
        }

    shutil.copytree(rootfs / f"usr/lib/python{version}", home / "lib" / f"python{version}", ignore=behind)
    for pattern in _LIBRARIES:
        found = list(rootfs.glob(f"{pattern}/*.so*"))
        linked = {
            path.readlink().name for path in found if path.is_symlink()
        }  # copied under the names that are asked for
        for path in found:
            if path.name not in linked and not path.name.startswith(_NOT) and path.is_file():
                shutil.copy2(path, home / "lib" / path.name)
    return next(path.name for path in (home / "lib").glob("ld-linux-*"))
