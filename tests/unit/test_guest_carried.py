"""Files of a former life, unpacked where the program will look for them."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rethaw.guest import carried


class Node:
    """Answers as the node does, `size` bytes at a time."""

    def __init__(self, tar: bytes, size: int) -> None:
        self.tar, self.size, self.asked = tar, size, 0

    def call(self, op: str, body: bytes) -> bytes:
        assert op == "carried"
        offset = json.loads(body)["offset"]
        data = self.tar[offset : offset + self.size]
        self.asked += 1
        ok = {"data": base64.b64encode(data).decode(), "end": offset + len(data) == len(self.tar)}
        return json.dumps({"ok": ok}).encode()


def tar_of(*members: tuple[str, Any]) -> bytes:
    """bytes: a file; str: a link; int: a directory of that mode."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, what in members:
            info = tarfile.TarInfo(name)
            info.uid, info.gid, info.mtime = os.getuid(), os.getgid(), 1_700_000_000
            if isinstance(what, bytes):
                info.size, info.mode = len(what), 0o640
                tar.addfile(info, io.BytesIO(what))
            else:
                info.type = tarfile.SYMTYPE if isinstance(what, str) else tarfile.DIRTYPE
                info.linkname, info.mode = (what, 0o777) if isinstance(what, str) else ("", what)
                tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize("size", [100, 4096, 1 << 20])
def test_what_stands_in_the_way_is_replaced_and_never_followed(tmp_path: Path, size: int) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "was_directory" / "full").mkdir(parents=True)
    (root / "was_file").write_text("old")
    outside.write_text("untouched")
    (root / "was_link").symlink_to(outside)
    (root / "stays").mkdir()
    (root / "stays" / "of_the_image").write_text("image")
    node = Node(
        tar_of(
            ("was_directory", b"now a file"), ("was_file", 0o750), ("was_file/in_it", b"x" * 5000), ("was_link", b"own"),
            ("stays", 0o700), ("no/parent/here", "../target"), ("ümlaut\udcff", b""),
        ),
        size,
    )  # fmt: skip
    assert carried.put(carried.Source(node), str(root)) == 7  # type: ignore[arg-type]
    assert (root / "was_directory").read_text() == "now a file"
    assert (root / "was_directory").stat().st_mode & 0o777 == 0o640
    assert (root / "was_file" / "in_it").read_text() == "x" * 5000
    assert not (root / "was_link").is_symlink() and (root / "was_link").read_text() == "own"
    assert outside.read_text() == "untouched"
    assert (root / "stays").stat().st_mode & 0o777 == 0o700
    assert (root / "stays" / "of_the_image").read_text() == "image"
    assert (root / "no" / "parent" / "here").readlink() == Path("../target")
    assert (root / "ümlaut\udcff").exists()
    assert node.asked >= len(node.tar) // size


def test_nothing_to_put_is_fine(tmp_path: Path) -> None:
    assert carried.put(carried.Source(Node(tar_of(), 512)), str(tmp_path)) == 0  # type: ignore[arg-type]
