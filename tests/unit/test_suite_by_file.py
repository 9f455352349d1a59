"""How `make test` deals the tests out: they were dealt one by one for a while, and every file's servers were started twice."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("tests/unit/test_guest_http1.py", "tests/unit/test_guest_names.py")


def test_all_tests_of_a_file_go_to_one_process() -> None:
    command = re.search(r"^\t\$\(PY\) (-m pytest -n .*?) -m ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command is not None
    words = [word if word != "auto" else "2" for word in command[1].split()]
    done = subprocess.run(
        [sys.executable, *words, "-v", "-p", "no:cacheprovider", *FILES],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    dealt = set(re.findall(r"^\[(gw\d+)\].*?(tests/unit/\w+\.py)::", done.stdout, re.MULTILINE))
    assert len(dealt) == 2 and {name for _, name in dealt} == set(FILES), dealt
    assert len({worker for worker, _ in dealt}) == 2, dealt
