"""The command line as its user sees it: what a failure may look like, and who runs it."""

from __future__ import annotations

import pwd
import subprocess
import sys
from pathlib import Path

from rethaw.testing.server import RunningServer


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One clear line on stderr with each of `words`, nothing on stdout, and the exit code."""
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rethaw: ")]
    assert len(lines) == 1, (done.stdout, done.stderr)
    assert done.stdout == ""
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert done.returncode == code, (done.returncode, lines[0])


def as_nobody(
    server: RunningServer, *args: str, cwd: Path, env: dict[str, str], timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """The command run by an unprivileged user, with nothing in its environment but `env`."""
    nobody = pwd.getpwnam("nobody")
    return subprocess.run(
        [sys.executable, "-m", "rethaw.cli.main", *args],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **env},
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
    )
