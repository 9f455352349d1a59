"""The set-up's own programs, and what must not be in the files that it uses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.invalid/debian
Suites: {suites}
Components: main contrib
Enabled: {enabled}
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.invalid/debian-security
Suites: bookworm-security
Components: main
"""


def backports(etc: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts/apt_backports.py", "bookworm", etc],
        capture_output=True,
        text=True,
        check=False,
    )


def test_backports_from_deb822(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(
        DEB822.format(suites="bookworm bookworm-updates", enabled="yes")
    )
    assert backports(tmp_path).stdout == (
        "Types: deb\nURIs: http://mirror.invalid/debian\nSuites: bookworm-backports\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


def test_backports_from_one_line(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "# deb http://wrong.invalid bookworm main\ndeb-src http://wrong.invalid bookworm main\n"
        "deb [arch=amd64,arm64 signed-by=/k.gpg] https://mirror.invalid/d bookworm main contrib # note\n"
    )
    assert backports(tmp_path).stdout == (
        "Types: deb\nURIs: https://mirror.invalid/d\nSuites: bookworm-backports\nComponents: main\n"
        "Architectures: amd64 arm64\nSigned-By: /k.gpg\n"
    )


def test_backports_that_are_there_already(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/a.sources").write_text(
        DEB822.format(suites="bookworm bookworm-backports", enabled="yes")
    )
    done = backports(tmp_path)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(("suites", "enabled"), [("trixie", "yes"), ("bookworm", "no")])
def test_no_source_to_derive_from(tmp_path: Path, suites: str, enabled: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/a.sources").write_text(DEB822.format(suites=suites, enabled=enabled))
    done = backports(tmp_path)
    assert done.returncode == 3 and done.stdout == "" and "bookworm main" in done.stderr


def test_an_embedded_key_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    key = "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END PGP PUBLIC KEY BLOCK-----\n"
    text = f"Types: deb\nURIs: http://m.invalid\nSuites: bookworm\nComponents: main\n{key}"
    (tmp_path / "sources.list.d/a.sources").write_text(text)
    assert backports(tmp_path).stdout.endswith(key)


def test_contain_passes_the_exit_status_and_leaves_nothing(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    daemon = f"setsid sh -c 'echo $$ > {pid_file}; exec sleep 600' >/dev/null 2>&1 </dev/null & while ! [ -s {pid_file} ]; do sleep 0.02; done; exit 7"
    contain = (ROOT / "scripts/contain.py").read_text().replace("_GRACE_S = 10.0", "_GRACE_S = 0.5")
    (tmp_path / "contain.py").write_text(contain)
    done = subprocess.run(
        [sys.executable, tmp_path / "contain.py", "sh", "-c", daemon], capture_output=True, text=True, check=False, timeout=30
    )  # fmt: skip
    assert done.returncode == 7 and "left behind" in done.stderr and "sleep 600" in done.stderr
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()


def test_who_waited_for_an_orphan_to_be_gone_waited_for_ever() -> None:
    """`runsc delete` does: its sandbox, begun in the background, was left a zombie."""
    code = """
import os, sys, time
read, write = os.pipe()
if os.fork() == 0:
    orphan = os.fork()
    if orphan:
        os.write(write, str(orphan).encode())
    else:
        time.sleep(0.2)
    os._exit(0)
os.wait()
orphan, end = os.read(read, 20).decode(), time.monotonic() + 20
while os.path.exists("/proc/" + orphan) and time.monotonic() < end:
    time.sleep(0.02)
sys.exit(3 if not os.path.exists("/proc/" + orphan) else 1)
"""
    command = [sys.executable, ROOT / "scripts/contain.py", sys.executable, "-c", code]
    assert subprocess.run(command, check=False, timeout=60).returncode == 3


def test_contain_undoes_an_ignored_interrupt() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and children inherit that."""
    asked = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/contain.py", sys.executable, "-c", asked],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"


def test_contain_is_quick_when_there_is_nothing_to_end() -> None:
    started = time.monotonic()
    subprocess.run([sys.executable, ROOT / "scripts/contain.py", "true"], check=True)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["run.lock", "dev.lock"])
def test_locks_pin_every_package_by_hash_and_name_no_index(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    entries = re.split(r"\n(?=[a-z0-9])", text.strip())
    assert len(entries) > 20
    for entry in entries:
        assert re.match(r"[a-z0-9._\[\],-]+==\S+", entry), entry[:80]
        assert "--hash=sha256:" in entry, entry[:80]
    assert "://" not in text and "--index-url" not in text and "--find-links" not in text


def test_every_dependency_is_in_the_locks() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\s\[<>=!~;]", r)[0].lower().replace("_", "-").replace(".", "-") for r in requirements}

    def locked(name: str) -> set[str]:
        return set(
            re.findall(r"^([a-z0-9-]+)(?:\[[^\]]*\])?==", (ROOT / "requirements" / name).read_text(), re.MULTILINE)
        )

    assert names(project["project"]["dependencies"]) <= locked("run.lock")
    assert names(project["dependency-groups"]["dev"]) <= locked("dev.lock")
    assert locked("run.lock") <= locked("dev.lock")


def test_node_lock_names_no_host() -> None:
    text = (ROOT / "tests/node/package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    assert "://" not in text and all("integrity" in p for name, p in packages.items() if name)


def test_shell_scripts_parse() -> None:
    for script in (ROOT / "scripts/setup.sh", ROOT / "scripts/lock.sh", ROOT / ".ci/run"):
        subprocess.run(["bash", "-n", script], check=True)


def test_setup_refuses_what_it_does_not_know() -> None:
    done = subprocess.run([ROOT / "scripts/setup.sh", "everything"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "'everything' is not a level" in done.stderr


def test_no_check_of_the_set_up_depends_on_who_hangs_up_first() -> None:
    """`runsc help | grep -q` under pipefail found a fitting runsc too old, on a busy machine, once in a while."""
    for script in (*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"):
        lines = script.read_text().splitlines()
        assert [line for line in lines if re.search(r"\| *grep -\w*q", line)] == [], script.name
