"""What needs no sandbox of looking inside: comparing trees and pasts, unpacking archives that mean harm, odd names."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rethaw.cli.looking import changes, escaped
from rethaw.control.compare import shared
from rethaw.model.errors import Conflict, InvalidInput, Unavailable
from rethaw.model.looking import FileChange
from rethaw.node import compare
from rethaw.sdk.looking import unpack

FOUND = compare.Found("file", 0o644, 4, 1_000, 0, 0, 1_000)


def tree(own: dict[str, compare.Found | None], image: dict[str, compare.Found] | None = None) -> compare.Tree:
    return compare.Tree(own, image or {})


def but(**values: Any) -> compare.Found:
    return dataclasses.replace(FOUND, **values)


def test_only_contents_tell_where_size_and_time_cannot() -> None:
    before = tree(
        {"/same": FOUND, "/touched": FOUND, "/rewritten": FOUND, "/reset": FOUND, "/mode": FOUND, "/grown": FOUND}
    )
    after = tree(
        {
            "/same": FOUND,
            "/touched": but(mtime_ns=2_000, ctime_ns=2_000),
            "/rewritten": but(mtime_ns=2_000, ctime_ns=2_000),
            "/reset": but(ctime_ns=2_000),
            "/mode": but(mode=0o600, ctime_ns=2_000),
            "/grown": but(size=9, mtime_ns=2_000),
        }
    )
    found = compare.trees(before, after)
    assert {path: doubt.unsure for path, doubt in found.items()} == {
        "/touched": True, "/rewritten": True, "/reset": True, "/mode": True, "/grown": False,
    }  # fmt: skip
    hashes = {"/touched": ("a", "a"), "/rewritten": ("a", "b"), "/reset": ("-", "-"), "/mode": ("a", "a")}
    settled = {one.path: one.what for one in compare.settle(found, hashes)}
    assert settled == {"/grown": ("content",), "/mode": ("mode",), "/reset": ("content",), "/rewritten": ("content",)}


def test_two_images_are_no_difference_and_what_was_done_to_them_is(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/issue").write_text("1234")
    (tmp_path / "etc/other").write_text("x")
    (tmp_path / "proc").mkdir()
    image = compare._image(tmp_path)  # pyright: ignore[reportPrivateUsage]
    assert sorted(image) == ["/etc", "/etc/issue", "/etc/other"]
    rows = [{"path": path, **dataclasses.asdict(found)} for path, found in image.items() if path != "/etc/other"]
    rows[1]["mtime_ns"] += 1
    rows.append({"path": "/run/rethaw", **dataclasses.asdict(but(kind="directory"))})
    out = "\n".join(json.dumps(row) for row in rows).encode()
    mine = compare.above(out, tmp_path)
    assert mine.own == {
        "/etc/issue": compare.Found(**{k: v for k, v in rows[1].items() if k != "path"}),
        "/etc/other": None,
    }
    found = compare.trees(tree({}, {"/usr/other": FOUND}), mine)
    assert {path: (doubt.before is None, doubt.after is None) for path, doubt in found.items()} == {
        "/etc/issue": (True, False)
    }


def test_the_common_point_of_two_pasts() -> None:
    one = {("s_1", 1): 40, ("s_1", 2): 55}
    assert shared(one, {("s_1", 1): 40, ("s_1", 2): 70}) == ("s_1", 2, 55)
    assert shared(one, {("s_1", 1): 30, ("s_1", 3): 90}) == ("s_1", 1, 30)
    assert shared(one, {("s_1", 1): 40, ("s_2", 3): 90}) == ("s_1", 1, 40), "a fork"
    assert shared(one, {("s_9", 1): 40}) is None


def test_a_directory_that_came_is_one_line() -> None:
    def added(path: str, kind: Any = "file", size: int = 0) -> FileChange:
        return FileChange(path, "added", kind, None, size)

    files = [
        added("/a", "directory"), added("/a/b", "directory"), added("/a/b/1", size=1024), added("/a/2", size=1024),
        FileChange("/a-b", "removed", "file", 5, None), FileChange("/c", "changed", "file", 1, 2, ("content", "mode")),
        added("/empty", "directory"), added("/l", "link"),
    ]  # fmt: skip
    lines = list(changes(files))
    assert lines[0].startswith("+ /a/  (2 files, 2") and lines[1].startswith("- /a-b  5 B")
    assert lines[2].startswith("~ /c  content, mode  1 B -> 2 B") and lines[3:5] == ["+ /empty/", "+ /l  link"]
    assert lines[5] == "6 added, 1 removed, 1 changed"


def test_names_are_shown_on_one_line() -> None:
    assert escaped("/ü/\udcff\n\x1b[2J\\") == "/ü/\\xff\\x0a\\x1b[2J\\\\"


# ---------------------------------------------------------------- archives


def archive(*members: tuple[str, bytes, Any]) -> io.BytesIO:
    """(name, type, content or link target) each."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, value in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o4755
            if kind == tarfile.REGTYPE:
                info.size = len(value)
            else:
                info.linkname = value or ""
            tar.addfile(info, io.BytesIO(value) if kind == tarfile.REGTYPE else None)
    out.seek(0)
    return out


FILE, DIR, LINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE


def test_an_archive_is_unpacked_with_modes_and_links(tmp_path: Path) -> None:
    odd = os.fsdecode(b"top/\xff\n")
    source = archive(
        ("top", DIR, None), ("top/f", FILE, b"data"), (odd, FILE, b"odd"), ("top/l", LINK, "f"),
        ("top/dev", tarfile.CHRTYPE, None), ("top/hard", tarfile.LNKTYPE, "/etc/passwd"),
    )  # fmt: skip
    left_out = unpack(source, tmp_path / "new")
    assert (tmp_path / "new/f").read_bytes() == b"data" and (tmp_path / "new/f").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "new" / os.fsdecode(b"\xff\n")).read_bytes() == b"odd"
    assert (tmp_path / "new/l").readlink() == Path("f")
    assert len(left_out) == 2 and not (tmp_path / "new/hard").exists()
    with pytest.raises(Conflict, match="exists already"):
        unpack(archive(("top", DIR, None)), tmp_path / "new")


@pytest.mark.parametrize(
    "members",
    [
        [("top/../../evil", FILE, b"x")],
        [("/top/evil", FILE, b"x")],
        [("top", DIR, None), ("top/..", DIR, None)],
        [("top", LINK, "OUT"), ("top/evil", FILE, b"x")],
        [("top", DIR, None), ("top/l", LINK, "OUT"), ("top/l/evil", FILE, b"x")],
        [("top", DIR, None), ("top/f", FILE, b"1"), ("top/f", FILE, b"2")],
    ],
)
def test_an_archive_that_means_harm_writes_nothing_elsewhere(tmp_path: Path, members: list[Any]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    spelled = [(name, kind, str(outside) if value == "OUT" else value) for name, kind, value in members]
    with pytest.raises(InvalidInput):
        unpack(archive(*spelled), tmp_path / "new")
    assert list(outside.iterdir()) == [] and not (tmp_path / "evil").exists()


def test_links_are_not_made_through_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    source = archive(("top", DIR, None), ("top/l", LINK, str(outside)), ("top/l/evil", LINK, "/etc/passwd"))
    assert len(unpack(source, tmp_path / "new")) == 1
    assert list(outside.iterdir()) == []


def test_an_archive_that_is_cut_off_is_said(tmp_path: Path) -> None:
    whole = archive(("top", FILE, b"x" * 100_000)).getvalue()
    with pytest.raises(Unavailable, match="not a whole archive"):
        unpack(io.BytesIO(whole[:50_000]), tmp_path / "new")
