"""What is packed for the sandbox: the file, what it imports from beside it, nothing else, always the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from rethaw.model.errors import InvalidInput, NotFound
from rethaw.sdk.package import pack


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_only_what_is_imported(tmp_path: Path) -> None:
    (tmp_path / "secret.env").write_text("KEY=1")
    tree(
        tmp_path,
        agent="import os, tools.web\nfrom lib import a\ndef f():\n    from late import x\nimport rethaw",
        late="x = 1",
        unused="",
        rethaw="shadow = 1",
        os="",
        tools__web="from . import text\nfrom .deep.er import z",
        tools__text="",
        tools__unused="",
        tools__deep__er="z = 1\nfrom ... import agent_like",
    )
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/__init__.py").write_text("from .b import q")
    (tmp_path / "lib/a.py").write_text("")
    (tmp_path / "lib/b.py").write_text("q = 1")
    (tmp_path / "lib/c.py").write_text("")
    assert pack(tmp_path / "agent.py").files == (
        "agent.py",
        "late.py",
        "lib/__init__.py",
        "lib/a.py",
        "lib/b.py",
        "os.py",  # Python would import this one too: it lies beside the file
        "tools/deep/er.py",
        "tools/text.py",
        "tools/web.py",
    )


def test_equal_files_have_equal_bytes(tmp_path: Path) -> None:
    digests: set[str] = set()
    for number, name in enumerate(("a", "b")):
        root = tree(tmp_path / name, agent="import helper", helper="x = 1")
        os.utime(root / "helper.py", (number, number))
        (root / "helper.py").chmod(0o600 + number * 0o55)
        package = pack(root / "agent.py")
        digests.add(package.digest)
        assert package.digest == hashlib.sha256(package.data).hexdigest()
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(package.data))) as tar:
            assert [(m.name, m.mode, m.uid, m.mtime) for m in tar] == [
                ("agent.py", 0o644, 0, 0),
                ("helper.py", 0o644, 0, 0),
            ]
    assert len(digests) == 1
    (tmp_path / "b/helper.py").write_text("x = 2")
    assert pack(tmp_path / "b/agent.py").digest not in digests


def test_cycles_end(tmp_path: Path) -> None:
    tree(tmp_path, agent="import b", b="import agent")
    assert pack(tmp_path / "agent.py").files == ("agent.py", "b.py")


def test_what_is_no_python_is_named_with_its_line(tmp_path: Path) -> None:
    tree(tmp_path, agent="import helper", helper="x = 1\ny = = 2\n")
    with pytest.raises(InvalidInput, match=r"helper\.py:2 is not Python"):
        pack(tmp_path / "agent.py")
    with pytest.raises(NotFound):
        pack(tmp_path / "nothing.py")
