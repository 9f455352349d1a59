"""Run in a build sandbox by the interpreter that packages are installed for (standard library only, 3.9 or newer). Read as
text by `rethaw.images.pypi`.

    installing.py pip HOME ARGUMENTS...   pip of the directory HOME, which the node put there for the build
    installing.py compile SINCE           byte code for what was installed after the file SINCE was made
"""

# ruff: noqa: PTH103, PTH116, PTH123
from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import sysconfig

# What Debian's own packages bring is left alone, and counts as absent: packages go to /usr/local, and come first there.
DEBIANS = "/usr/lib/python3/dist-packages"


def run_pip(home: str, arguments: list[str]) -> None:
    import runpy

    sys.path[:] = [home, *(place for place in sys.path if place != DEBIANS)]
    sys.argv[:] = ["pip", *arguments]
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


def compile_since(since: str) -> None:
    """Checked against nothing later: sources in an image never change, and their dates differ from build to build."""
    begun = os.stat(since).st_ctime
    found: list[str] = []
    for place in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        for directory, _, files in os.walk(place):
            paths = [os.path.join(directory, name) for name in files if name.endswith(".py")]  # noqa: PTH118
            found += [path for path in paths if os.lstat(path).st_ctime >= begun]
    workers = min(os.cpu_count() or 1, 8, 1 + len(found) // 100)
    children: list[int] = []
    for number in range(workers):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for path in found[number::workers]:
                    compile_one(path)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("byte code could not be written")


def compile_one(path: str) -> None:
    import marshal

    cached = importlib.util.cache_from_source(path)
    # A package may ship a file that is no Python of this version (a template, a test).
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
        with open(path, "rb") as file:
            source = file.read()
        header = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + importlib.util.source_hash(source)
        with contextlib.suppress(OSError), open(cached, "rb") as file:
            if file.read(16) == header:
                return
        code = compile(source, path, "exec", dont_inherit=True)
        os.makedirs(os.path.dirname(cached), exist_ok=True)  # noqa: PTH120
        with open(cached, "wb") as file:
            file.write(header + marshal.dumps(code))


if __name__ == "__main__":
    if sys.argv[1] == "pip":
        run_pip(sys.argv[2], sys.argv[3:])
    else:
        compile_since(sys.argv[2])
