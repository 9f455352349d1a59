"""What was found in snapshots, for a reader."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rethaw.model.looking import FileChange, FileEntry
    from rethaw.sdk.looking import Difference, LogSide

_TYPES = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "link": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "device": stat.S_IFCHR,
}
_SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def escaped(path: str) -> str:
    """A path on one line, as `ls -b` shows it: odd bytes and control characters by their number."""
    out: list[str] = []
    for char in path:
        if char == "\\":
            out.append("\\\\")
        elif char.isprintable():
            out.append(char)
        else:
            out.append("".join(f"\\x{byte:02x}" for byte in os.fsencode(char)))
    return "".join(out)


def listing(found: Sequence[FileEntry]) -> Iterator[str]:
    """One line a file."""
    width = max((len(str(entry.size)) for entry in found), default=1)
    for entry in found:
        mode = stat.filemode(_TYPES[entry.kind] | entry.mode)
        at = datetime.fromtimestamp(entry.mtime_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S")
        points_to = f" -> {escaped(entry.target)}" if entry.target is not None else ""
        yield f"{mode}  {entry.size:>{width}}  {at}  {escaped(entry.path)}{points_to}"


def difference(found: Difference, *, with_files: bool) -> Iterator[str]:
    """Files first, then the logs."""
    for name, one in (("before", found.before), ("after", found.after)):
        yield f"{name:<6}  {one.id}  {one.session}  line {one.line}  seq {one.seq}"
    if with_files:
        yield ""
        yield from changes(found.files)
    common = found.common
    for name, side in found.log.items():
        if side.upto > side.after or common is None:
            yield ""
            yield from log_lines(name, side, alone=common is None)
    if common is not None and all(side.upto <= side.after for side in found.log.values()):
        yield ""
        yield "no events between them"


def changes(files: Sequence[FileChange]) -> Iterator[str]:
    """One line a change; of a directory that came or went only itself, with what was in it."""
    from rethaw.sdk.sizes import human_bytes

    if not files:
        yield "no file differs"
        return
    whole = {one.path: one for one in files if one.kind == "directory" and one.change != "changed"}
    inside: dict[str, list[FileChange]] = {}
    shown: list[FileChange] = []
    for one in files:
        top = _topmost(one.path, whole, one.change)
        if top is None:
            shown.append(one)
        else:
            inside.setdefault(top, []).append(one)
    for one in shown:
        content = [c for c in inside.get(one.path, []) if c.kind != "directory"]
        size = one.size_after if one.size_after is not None else one.size_before
        if one.path in whole:
            total = sum((c.size_after if c.size_after is not None else c.size_before) or 0 for c in content)
            many = f"{len(content)} file{'' if len(content) == 1 else 's'}"
            said = f"/  ({many}, {human_bytes(total)})" if content else "/"
        elif one.change == "changed":
            said = f"  {', '.join(one.what)}"
            if one.size_before != one.size_after:
                said += f"  {human_bytes(one.size_before or 0)} -> {human_bytes(one.size_after or 0)}"
        else:
            said = f"  {human_bytes(size or 0)}" if one.kind == "file" else f"  {one.kind}"
        yield f"{_SIGNS[one.change]} {escaped(one.path)}{said}"
    counts = {name: sum(1 for one in files if one.change == name) for name in _SIGNS}
    yield ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _topmost(path: str, whole: dict[str, FileChange], change: str) -> str | None:
    """The highest directory above `path` that came or went with it."""
    top: str | None = None
    above = path
    while (above := above.rpartition("/")[0]) in whole and whole[above].change == change:
        top = above
    return top


def log_lines(name: str, side: LogSide, *, alone: bool) -> Iterator[str]:
    """What one side's log has."""
    where = f"all of {side.session} up to {side.upto}" if alone else f"events ({side.after}, {side.upto}]"
    yield f"{name}: {where}"
    calls = "1 model call" if side.model_calls == 1 else f"{side.model_calls} model calls"
    yield f"  {calls}, {side.input_tokens} tokens in, {side.output_tokens} out"
    for kind, count in sorted(side.events.items(), key=lambda item: (-item[1], item[0])):
        yield f"  {count:>5}  {kind}"
