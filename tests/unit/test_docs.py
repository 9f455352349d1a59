"""The documents say what the code does: every command, option and setting is described, every example can be read."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rethaw import LocalContext
from rethaw.cli.app import build
from rethaw.cli.arguments import prepared
from rethaw.cli.table import COMMANDS
from rethaw.gateway import providers
from rethaw.model.enums import EventType
from rethaw.sdk.agents import find
from rethaw.server.config import SETTINGS
from rethaw.server.config_egress import EGRESS_SETTINGS
from rethaw.server.config_snapshots import S3_SETTINGS, SNAPSHOT_SETTINGS

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(p for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(where, text) of every code block of `language`."""
    for path in DOCS:
        body = path.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", body, re.DOTALL | re.MULTILINE):
            yield f"{path.relative_to(ROOT)}:{body.count(chr(10), 0, match.start()) + 1}", match[1]


def test_command_line_is_described_as_it_is() -> None:
    subprocess.run([sys.executable, ROOT / "scripts/cli_docs.py", "--check"], check=True)
    for command in COMMANDS:
        assert f"### rethaw {command.name}" in text("cli.md")


def test_every_setting_is_described() -> None:
    body = text("configuration.md")
    settings = {**SETTINGS, **SNAPSHOT_SETTINGS, **S3_SETTINGS, **EGRESS_SETTINGS}
    for setting, variable in settings.items():
        assert f"| `{setting}` | `{variable}` |" in body
    described = set(re.findall(r"^\| `(\w+)` \| `[A-Z0-9_]+` \|", body, re.MULTILINE))
    assert described == set(settings)
    for field in providers._FIELDS:  # pyright: ignore[reportPrivateUsage]
        assert re.search(rf"^\| `{field}` \|", body, re.MULTILINE), field


def test_every_event_is_described() -> None:
    body = text("concepts.md")
    assert [kind.value for kind in EventType if f"`{kind.value}`" not in body] == []


def test_every_variable_that_is_read_is_described() -> None:
    body = text("configuration.md")
    internal = {"RETHAW_FAULTS"}  # tests only
    for path in (ROOT / "src").rglob("*.py"):
        if "testing" in path.parts or "guest" in path.parts:
            continue
        for name in re.findall(r"""(?:environ\.get\(|environ\[|env\.get\()["'](RETHAW_\w+)""", path.read_text()):
            assert name in internal or name in body, f"{path}: {name}"


@pytest.mark.parametrize(("where", "code"), [*blocks("python")], ids=lambda v: v if ":" in v and "\n" not in v else "")
def test_python_examples_are_python(where: str, code: str) -> None:
    ast.parse(code, filename=where)


@pytest.mark.parametrize(
    ("where", "code"), [b for b in blocks("python") if "@rethaw.agent" in b[1]], ids=lambda v: v.split("\n")[0]
)
def test_agents_of_the_docs_are_found(where: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / "documented_agent.py"
    file.write_text(code)
    several = re.findall(r"^(?:async )?def (\w+)\(ctx\b", code, re.MULTILINE)
    for found in [find(file, name) for name in several] if len(several) > 1 else [find(file)]:
        assert found.spec(found.package().digest).entry == f"documented_agent.py::{found.function.__name__}"


def test_every_python_example_is_run_by_a_test() -> None:
    """A file by its name, where a test or a page that is typed whole names it; what only shows a call by `page.run`."""
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)}
    shown = [lit for one in tests.values() for lit in re.findall(r"page\.run\([\"'](.+?)[\"'][,)]", one)]
    here = Path(__file__).read_text()
    typed = "".join(block for _, block in blocks("sh"))
    for where, code in blocks("python"):
        page = f'"{where.split(":")[0]}"'
        opened = any(page in text for text in tests.values())
        if named := re.match(r"# (\w+\.py)\n", code):
            told = [f"from {named[1][:-3]} import" in one for _, one in blocks("python") if one.startswith("# test_")]
            run = named[1].startswith("test_") or any(named[1] in text for text in (here, *tests.values()))
            assert run or any(told) or (opened and named[1] in typed), where
        else:
            assert opened and any(lit.encode().decode("unicode_escape") in code for lit in [*shown, *_BLOCKS]), where


_BLOCKS = ("def compare(session", "keep_snapshots=")  # run whole by tests/e2e/test_forks.py, test_docs_pages.py


def test_tests_of_the_docs_pass(tmp_path: Path) -> None:
    """Those that stand there as a file of their own, beside the other files that are named. (The ones that want a server
    are in tests/e2e/test_testing_plugin.py.)"""
    tests = 0
    for _, code in blocks("python"):
        if "rethaw_server" not in code and (named := re.match(r"# (\w+\.py)\n", code)):
            (tmp_path / named[1]).write_text(code)
            tests += code.count("\ndef test_") if named[1].startswith("test_") else 0
    assert tests
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", tmp_path, tmp_path],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"{tests} passed" in done.stdout


def test_steps_of_the_docs_run_locally(tmp_path: Path) -> None:
    (code,) = [code for _, code in blocks("python") if code.startswith("# steps.py")]
    (tmp_path / "steps.py").write_text(code)
    ctx = LocalContext()
    assert ctx.run(find(tmp_path / "steps.py"), n=2) == 2
    assert ctx.outbox == ["step 0", "step 1"]


def commands(code: str) -> Iterator[list[str]]:
    for whole in code.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\([^)]*\)", "s_1", whole.split(" #")[0]).split("|")[-1 if "| rethaw" in whole else 0]
        words = shlex.split(line.removeprefix("$ ").split(" > ")[0].split(" 2> ")[0], comments=True)
        while words and (words[0] in ("sudo", "exec") or words[0].startswith("--preserve-env") or "=" in words[0]):
            words.pop(0)
        if words and Path(words[0]).name == "rethaw":
            yield words[1:]


@pytest.mark.parametrize(
    ("where", "code"), [b for kind in ("sh", "console", "bash") for b in blocks(kind)], ids=lambda v: v.split("\n")[0]
)
def test_shell_examples_are_commands(where: str, code: str) -> None:
    app = build()
    for words in commands(code):
        if words not in ([], ["--help"]):
            app.parse_args(prepared(words), exit_on_error=False, print_error=False)


def test_links_lead_somewhere() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        for block in re.findall(r"`([^`\n]+)`|^(?:sudo )?(make [a-z-]+)$", path.read_text(), re.MULTILINE):
            for name in re.findall(r"\bmake ([a-z-]+)", " ".join(block)):
                assert name in targets, f"{path.relative_to(ROOT)}: make {name}"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page is in it, every link and anchor leads somewhere, every name of the reference exists."""
    done = subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    built = {page.relative_to(tmp_path / "site").with_suffix(".md") for page in (tmp_path / "site").rglob("*.html")}
    pages = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")} - {Path("adr/README.md")}
    assert pages <= built
    config = (ROOT / "mkdocs.yml").read_text()
    decisions = (ROOT / "docs/adr/README.md").read_text()
    for page in pages:
        assert f"({page.name})" in decisions if page.parent.name == "adr" else f"- {page}" in config, page
    reference = (tmp_path / "site/reference.html").read_text()
    for name in ("Context.receive", "Agent.start", "Sessions.fork", "WaitTimeout", "Image.pip_install"):
        assert f"{name}</span>" in reference or f'.{name}"' in reference, name
