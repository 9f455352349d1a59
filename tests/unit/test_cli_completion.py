"""Completion scripts that shells take, with every command in them."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from rethaw.cli.main import main
from rethaw.cli.table import COMMANDS


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in COMMANDS:
        assert command.name.split()[-1] in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script.encode(), check=True)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("snapshot ver", ["verify"]),
        ("sus", ["suspend"]),
        ("ls --sta", ["--state"]),
        ("queue set reports --key", ["--key-limit"]),
        ("crash s_1 no", ["node"]),
    ],
)
def test_bash_completes(words: str, meant: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    line = f"rethaw {words}"
    typed = f"""
COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; COMP_LINE="{line}"; COMP_POINT={len(line)}
_rethaw; echo "${{COMPREPLY[@]}}"
"""
    asked = capsys.readouterr().out + typed
    done = subprocess.run(["bash", "-c", asked], check=True, capture_output=True, text=True)
    assert done.stdout.split() == meant


def test_the_users_own_shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert main(["completion", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shell"] == "fish"
    assert main(["completion", "tcsh"]) == 2
    assert "'tcsh'" in capsys.readouterr().err
