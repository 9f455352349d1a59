"""The command line itself: help, errors in one line, exit codes, the time it takes to start."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rethaw import __version__
from rethaw.cli.app import build
from rethaw.cli.main import main
from rethaw.cli.table import COMMANDS, GROUP_HELP, group_help, root_help

NOBODY = "http://127.0.0.1:1"  # nothing listens on port 1


@pytest.fixture(autouse=True)
def _elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETHAW_URL", NOBODY)
    monkeypatch.chdir(tmp_path)


def test_root_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"], ["help"]):
        assert main(args) == 0
        assert capsys.readouterr().out == root_help()
    for command in COMMANDS:
        assert f"  {command.name} " in root_help()


@pytest.mark.parametrize("group", GROUP_HELP)
def test_the_help_of_a_group_names_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([group], [group, "--help"], ["help", group]):
        assert main(args) == 0
        assert capsys.readouterr().out == group_help(group)
    for command in COMMANDS:
        if command.name.startswith(f"{group} "):
            assert f"  {command.name} " in group_help(group)


def test_help_of_a_command_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "queue", "set"]) == 0
    assert "rethaw queue set NAME" in capsys.readouterr().out


OPEN = ("run", "schedule create")  # what they do not know is the agent's


@pytest.mark.parametrize("name", [command.name for command in COMMANDS if command.name not in OPEN])
def test_every_command_tells_what_an_option_that_is_nearly_right_should_be(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*name.split(), "--jsno"]) == 2
    assert "there is no option '--jsno'; did you mean `--json`?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_help_has_an_example_and_json(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    name = command.name  # type: ignore[attr-defined]
    assert main([*name.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "--json" in out
    example = out.partition("For example:")[2].partition("╭")[0]
    assert f"rethaw {name}" in example
    assert all(len(line) <= 80 for line in out.splitlines())


def test_every_parameter_is_described() -> None:
    for command in COMMANDS:
        node = build()
        for word in command.name.split():
            node = node[word]
        doc = node.default_command.__doc__ or ""
        for argument in node.assemble_argument_collection():
            if argument.parameter.show is not False:
                name = argument.field_info.name
                assert argument.parameter.help or f"\n    {name}:\n" in doc, f"{command.name}: {name}"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["nope"], 2, "no command 'nope'"),
        (["evnts"], 2, "there is no command 'evnts'; did you mean `rethaw events`?"),
        (["help", "nope"], 2, "no command 'nope'; see `rethaw --help`"),
        (["queue", "shwo"], 2, "there is no command 'queue shwo'; did you mean `rethaw queue show`?"),
        (["queue", "--jsn"], 2, "there is no option '--jsn'; see `rethaw queue --help`"),
        (["--verion"], 2, "there is no option '--verion'; did you mean `--version`?"),
        (["ls", "--zzzz"], 2, "there is no option '--zzzz'; see `rethaw ls --help`"),
        (["ls", "--stat", "running"], 2, "there is no option '--stat'; did you mean `--state`?"),
        (["ls", "surplus"], 2, "'surplus' is one argument too many; see `rethaw ls --help`"),
        (["ls", "--limit"], 2, "--limit has no value; see `rethaw ls --help`"),
        (["rewind", "s_1"], 2, "--to is missing; see `rethaw rewind --help`"),
        (["ls", "--limit", "x"], 2, "--limit"),
        (["ls", "--limit", "0"], 2, "limit 0"),
        (["ls", "--state", "tired"], 2, "'tired' is not a state"),
        (["ls", "--since", "yore"], 2, "'yore' is not a time"),
        (["run", "--image", "base", "--queue", "a b", "--", "ls"], 2, "'a b' cannot be a queue's name"),
        (["run", "--image", "base", "--priority", "high", "--", "ls"], 2, "--priority"),
        (["run", "--image", "base", "--priority", "9999999", "--", "ls"], 2, "priority 9999999"),
        (["run", "--image", "base", "--delay", "soon", "--", "ls"], 2, "'soon' is not a duration"),
        (["run", "--image", "base", "--ttl", "0s", "--", "ls"], 2, "a ttl of 0 s"),
        (["run", "--image", "base", "--tag", "a,b", "--", "ls"], 2, "'a,b' cannot be a tag"),
        (["run", "--image", "base", "--concurrency-key", "", "--", "ls"], 2, "'' cannot be a concurrency key"),
        (["queue", "set", "q"], 2, "nothing to set"),
        (["queue", "set", "q", "--limit", "0"], 2, "--limit '0'"),
        (["queue", "set", "q", "--limit", "-1"], 2, "--limit '-1'"),
        (["queue", "set", "q", "--suspended", "maybe"], 2, "maybe"),
        (["queue", "show", "a/b"], 2, "'a/b' cannot be a queue's name"),
        (["show"], 2, "SESSION"),
        (["show", "a", "b"], 2, "rethaw show --help"),
        (["crash", "s_1", "moon"], 2, "moon"),
        (["snapshot", "ls"], 2, "rethaw snapshot ls --help"),
        (["rm"], 2, "no session is named"),
        (["run"], 2, "nothing to run"),
        (["run", "nothing.py"], 4, "no file 'nothing.py'"),
        (["run", "--image", "moon", "--", "ls"], 4, "no image 'moon'"),
        (["run", "--image", "base"], 2, "no command is given"),
        (["run", "--image", "base", "--memory", "x", "--", "ls"], 2, "'x' is not a size"),
        (["run", "--image", "base", "--env", "x", "--", "ls"], 2, "--env 'x'"),
        (["run", "--image", "base", "--durability", "x", "--", "ls"], 2, "durability 'x'"),
        (["send", "s_1", "{", "--json"], 6, NOBODY),
        (["events", "s_1", "--type", "odd"], 2, "'odd' is not a type of event"),
        (["ls"], 6, f"no Rethaw server answers at {NOBODY}; start it with `sudo rethaw up`"),
        (["up", "--listen", "x"], 2, "--listen = 'x'"),
        (["up", "--config", "nothing.toml"], 4, "nothing.toml"),
    ],
)
def test_errors_are_one_line_and_a_code(
    args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("rethaw: ") and said in err


def test_an_error_nobody_foresaw_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rethaw.cli.commands.look.client", lambda: 1 / 0)
    assert main(["ls"]) == 70
    assert capsys.readouterr().err == "rethaw: internal error: ZeroDivisionError: division by zero; RETHAW_DEBUG=1 shows where\n"  # fmt: skip
    monkeypatch.setenv("RETHAW_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["ls"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"
    assert main(["version", "--json"]) == 0
    assert capsys.readouterr().out == f'{{"client": "{__version__}", "server": null}}\n'


@pytest.mark.root
def test_up_and_doctor_say_that_they_need_root(tmp_path: Path) -> None:
    program = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); from rethaw.cli.main import main; sys.exit(main(sys.argv[1:]))"  # fmt: skip
    for args, said in (("up", "has to be root; run: sudo rethaw up"), ("doctor", "run: sudo rethaw doctor")):
        done = subprocess.run(
            [sys.executable, "-c", f"import rethaw.cli.app, rethaw.server.config, rethaw.sdk.client, rethaw.cli.commands.server, rethaw.cli.connect, rethaw.cli.daemon, encodings.idna; {program}", args],
            capture_output=True, text=True, env={**os.environ, "HOME": "/nonexistent", "RETHAW_URL": NOBODY}, cwd="/", check=False,
        )  # fmt: skip
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -c \"import sys; sys.argv = ['rethaw', '--help']; from rethaw.cli import main as m; m.root_help = lambda: 'x\\n' * 100000; sys.exit(m.main())\""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -n 1"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")


def test_help_comes_quickly() -> None:
    """It takes 35 ms of CPU time, which a busy machine lengthens little; the bound would catch loading any command."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "rethaw.cli.main", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(once() for _ in range(5)) < 0.15


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from rethaw.cli.main import main; main(['--help']); print([m for m in ('cyclopts', 'pydantic', 'httpx2', 'rich') if m in sys.modules])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
