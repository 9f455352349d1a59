"""What becomes of a pack of files in the sandbox that it is brought to."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from rethaw.guest import carry
from rethaw.node import carry as node
from rethaw.node import inside


def packed(wanted: list[str], removed: list[str]) -> bytes:
    """As `inside` makes it."""
    told = b"".join(os.fsencode(p) + b"\0" for p in [*removed, "", *wanted])
    program = [sys.executable, "-I", "-S", "-X", "utf8", "-c", Path(inside.__file__).read_text(), "pack"]
    return subprocess.run(program, input=told, capture_output=True, check=True).stdout


def test_both_ends_mean_the_same() -> None:
    assert carry.REMOVED == node.REMOVED == inside.REMOVED


def test_files_directories_links_and_what_is_gone(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "d" / "e").mkdir(parents=True)
    (old / "d" / "file").write_bytes(b"x" * 100_000)
    (old / "d" / "odd \udcff name").write_bytes(b"odd")
    (old / "d" / "link").symlink_to("nowhere")
    (old / "was-dir").write_bytes(b"a file now")
    (old / "d" / "file").chmod(0o600)
    os.utime(old / "d" / "e", (5, 5))
    for path in ("gone/deep", "was-dir/below", "d"):
        (new / str(old).lstrip("/") / path).mkdir(parents=True)
    (new / str(old).lstrip("/") / "d" / "file").write_bytes(b"of the image")
    (new / "kept").write_bytes(b"kept")
    names = ["d", "d/e", "d/file", "d/link", "d/odd \udcff name", "missing", "was-dir"]
    data = packed([f"{old}/{n}" for n in names], [f"{old}/gone", f"{old}/never-was"])
    assert carry.unpack(io.BytesIO(data), str(new)) == 6
    there = new / str(old).lstrip("/")
    assert (there / "d" / "file").read_bytes() == b"x" * 100_000
    assert (there / "d" / "file").stat().st_mode & 0o777 == 0o600
    assert (there / "d" / "odd \udcff name").read_bytes() == b"odd"
    assert (there / "d" / "link").readlink() == Path("nowhere")
    assert (there / "d" / "e").stat().st_mtime == 5
    assert (there / "was-dir").read_bytes() == b"a file now"
    assert not (there / "gone").exists() and (new / "kept").read_bytes() == b"kept"


def test_an_empty_pack_is_one(tmp_path: Path) -> None:
    data = packed([], [])
    assert [m.name for m in tarfile.open(fileobj=io.BytesIO(data)).getmembers()] == [carry.REMOVED]  # noqa: SIM115
    assert carry.unpack(io.BytesIO(data), str(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []
