"""What `rethaw init` writes passes its own tests, crashes included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rethaw.cli.main import main

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("runsc") is None, reason="needs root and runsc"),
]


def test_its_own_tests_pass(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "essayist")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest"], cwd=tmp_path / "essayist", capture_output=True, text=True, check=False
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout
