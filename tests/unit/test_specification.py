"""SPECIFICATION.md names only tests and benchmarks that exist, and no promise goes without."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SPECIFICATION.md").read_text()


def test_every_named_test_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 30
    missing = [f"{file}::{name}" for file, name in named if not defines(ROOT / file, name)]
    assert not missing, missing


def defines(file: Path, name: str) -> bool:
    return file.exists() and re.search(rf"^(async )?def {name}\(", file.read_text(), re.MULTILINE) is not None


def test_every_named_benchmark_exists() -> None:
    assert all((ROOT / file).exists() for file in re.findall(r"`(benchmarks/\w+\.py)`", TEXT))


def test_ten_promises_each_with_a_test() -> None:
    promises = re.split(r"^\*\*(\d+)\. ", TEXT, flags=re.MULTILINE)[1:]
    numbers, texts = promises[::2], promises[1::2]
    assert numbers == [str(n) for n in range(1, 11)]
    assert all("`tests/" in text for text in texts)
