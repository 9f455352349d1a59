"""Pack an agent's file and the local modules that it imports into an archive for /app in its sandbox.

Found by reading the source (`ast`), never by running it. Only modules that lie beside the file, and only those that
are imported; the archive of equal files has equal bytes, so its digest names the code.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rethaw.model.errors import InvalidInput, NotFound

LIMIT = 64 << 20  # bytes of source in one package; more means that something else was imported by mistake


@dataclass(frozen=True)
class Package:
    """`data` is the tar.gz, `digest` its sha256 in hex, `main` the file's name in it, `files` all names, sorted, `sizes` in
    bytes of each."""

    data: bytes
    digest: str
    main: str
    files: tuple[str, ...]
    sizes: tuple[int, ...] = ()


def pack(file: Path | str) -> Package:
    """Raises NotFound when `file` is not there, InvalidInput when a file is not Python or all are too large."""
    path = Path(file).absolute()
    if not path.is_file():
        raise NotFound(f"there is no file {str(file)!r}", remedy="name the agent's Python file")
    contents = dict(sorted(collect(path).items()))
    total = sum(len(data) for data in contents.values())
    if total > LIMIT:
        raise InvalidInput(f"{file} and what it imports beside it has {total} bytes", remedy=f"the limit is {LIMIT}")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as out:
        out.write(raw.getvalue())
    data = packed.getvalue()
    return Package(
        data, hashlib.sha256(data).hexdigest(), path.name, tuple(contents), tuple(len(c) for c in contents.values())
    )


def collect(path: Path) -> dict[str, bytes]:
    """Name in the archive -> content, for `path` and every module beside it that it imports, however indirectly."""
    root = path.parent
    found: dict[str, bytes] = {}
    todo = [path]
    while todo:
        file = todo.pop()
        name = file.relative_to(root).as_posix()
        if name in found:
            continue
        found[name] = data = file.read_bytes()
        inside = file.relative_to(root).parent.parts
        for module in _imports(file, data, inside):
            todo.extend(_files(root, module))
    return found


def _imports(file: Path, data: bytes, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Dotted names that `file` may import, as tuples; relative ones resolved against its `package`."""
    try:
        tree = ast.parse(data, filename=str(file))
    except (SyntaxError, ValueError) as e:
        line = getattr(e, "lineno", None)
        raise InvalidInput(f"{file}{f':{line}' if line else ''} is not Python: {e}", remedy="correct it") from e
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = (*package[: len(package) - node.level + 1], *base)
            if base:
                yield base
            for alias in node.names:
                yield (*base, alias.name)  # a submodule, if there is one of that name


def _files(root: Path, module: tuple[str, ...]) -> Iterator[Path]:
    """The files beside the agent that importing `module` runs: packages on the way, then the module itself."""
    if not module or module[0] == "rethaw":
        return
    for depth in range(1, len(module) + 1):
        base = root.joinpath(*module[:depth])
        init = base / "__init__.py"
        plain = base.with_name(f"{base.name}.py")
        if init.is_file():
            yield init
        elif plain.is_file():
            yield plain
            return
        elif not base.is_dir():
            return
