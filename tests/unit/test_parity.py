"""Every end-to-end suite runs on both engines, whoever writes the next one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What `make test-long` does not run again with RETHAW_ENGINE=qemu, and why.
ON_ONE_ENGINE = {
    "microvm": "names its engines itself",
    "oci_layers": "unpacks images, without a sandbox",
    "package_wheel": "is about what is in the wheel",
}


def test_a_suite_runs_on_both_engines_or_says_why_not() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    found = re.search(r"^ON_QEMU := (.*)$", makefile, re.MULTILINE)
    assert found is not None
    both = found[1].split()
    suites = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests/e2e").glob("test_*.py"))
    assert sorted([*both, *ON_ONE_ENGINE]) == suites
