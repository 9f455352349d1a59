"""Every program of docs/guides has an example that is there, pinned, tested and measured; what the pages quote is what the files say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rethaw.cli.imagefile import read
from rethaw.sdk.agents import find
from rethaw.server.config import load
from rethaw.testing.provider import load_script

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.guests import GUESTS, rows, written  # noqa: E402

PAGES = ROOT / "docs/guides"
EXAMPLES = ROOT / "examples/guides"
NAMES = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "index")


def test_every_example_has_a_page() -> None:
    assert sorted(p.name for p in EXAMPLES.iterdir() if p.name != "inside") == NAMES
    assert sorted(GUESTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_guide_has_what_it_names(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    named = set(re.findall(rf"examples/guides/{name}/[\w./-]+", page))
    assert named
    for file in named:
        assert (ROOT / file).exists(), file
    assert callable(load_script(str(EXAMPLES / name / "script.py")))
    assert f"[{name}]({name}.md)" in (PAGES / "index.md").read_text()
    tests = "".join(p.read_text() for p in (ROOT / "tests/e2e").glob("test_*.py"))
    assert f'guide("{name}"' in tests or f"guides/{name}/" in tests


@pytest.mark.parametrize("name", [n for n in NAMES if (EXAMPLES / n / "agent.py").exists()])
def test_versions_in_examples_are_pinned(name: str) -> None:
    image = find(EXAMPLES / name / "agent.py").options.image
    packages = [*image.pip, *(word for step in image.steps if step.kind in ("pip", "npm") for word in step.words)]
    for package in packages:
        assert re.search(r"==\d|@\d", package), package


@pytest.mark.parametrize("name", [n for n in NAMES if (EXAMPLES / n / "rethaw.toml").exists()])
def test_an_image_in_a_file_is_the_example_s(name: str) -> None:
    image = read(EXAMPLES / name / "rethaw.toml")
    assert image.spec == find(EXAMPLES / name / "agent.py").options.image.spec


def test_scripts_are_quoted_as_they_are() -> None:
    page = (PAGES / "index.md").read_text()
    for language, file in (("shell", "tasks.sh"), ("js", "tasks.js")):
        assert f"```{language}\n{(EXAMPLES / 'inside' / file).read_text()}```" in page


def test_the_configuration_without_a_key_is_one(tmp_path: Path) -> None:
    (table,) = re.findall(r"^```toml\n(.*?)^```$", (PAGES / "index.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "rethaw.toml").write_text(table)
    providers = load(tmp_path / "rethaw.toml", env={}).providers
    assert [providers.get(name).base_url for name in ("openai", "anthropic")] == ["http://127.0.0.1:9000"] * 2


def test_the_table_takes_what_was_measured() -> None:
    page = (PAGES / "index.md").read_text()
    numbers = {"pause_ms_p50": 71.4, "first_stored_mib": 9.04, "turn_stored_mib_p50": 0.55, "resume_ms_p50": 150.2}
    assert rows({"sqlite": numbers}) == ["| [sqlite](sqlite.md) | 71 | 9.0 | 0.6 | 150 |"]
    new = written(page, {"sqlite": numbers})
    assert rows({"sqlite": numbers})[0] in new.splitlines()
    assert len(new.splitlines()) == len(page.splitlines())
    with pytest.raises(ValueError, match="no row for 'other'"):
        written(page, {"other": numbers})
