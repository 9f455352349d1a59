"""Where the token lives, who may read it, and whom it is for."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from rethaw.model.errors import InvalidInput, RethawError
from rethaw.sdk import credentials
from rethaw.sdk.credentials import Credentials, User


def test_saved_for_oneself_and_found_again(home: Path) -> None:
    path = credentials.save("http://127.0.0.1:1234", "secret")
    assert path == home / ".config/rethaw/credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert credentials.load() == Credentials("http://127.0.0.1:1234", "secret", str(path))
    credentials.save("http://127.0.0.1:1234", "other")
    assert credentials.load().token == "other"
    assert [p.name for p in path.parent.iterdir()] == ["credentials.json"]


def test_nothing_there(home: Path) -> None:
    assert credentials.load() == Credentials()


def test_environment_goes_first(home: Path) -> None:
    credentials.save("http://127.0.0.1:1", "file")
    found = credentials.load({"HOME": str(home), "RETHAW_URL": "http://h:2/", "RETHAW_TOKEN": "env"})
    assert (found.url, found.token) == ("http://h:2", "env")


def test_a_token_is_only_for_its_own_server(home: Path) -> None:
    credentials.save("http://127.0.0.1:1", "file")
    found = credentials.load({"HOME": str(home), "RETHAW_URL": "http://elsewhere:2"})
    assert found.url == "http://elsewhere:2" and found.token is None and "127.0.0.1:1" in found.source


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"url": "x", "token": "y"}', "\udcff"])
def test_a_damaged_file_is_named(home: Path, text: str) -> None:
    path = credentials.path_in(home)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidInput, match=r"credentials\.json"):
        credentials.load()


@pytest.mark.parametrize("url", ["x", "ftp://h", "http://", "http://h:port", "http://h:99999"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(InvalidInput, match="RETHAW_URL"):
        credentials.load({"RETHAW_URL": url})


@pytest.mark.root
def test_for_the_person_behind_sudo_as_that_person(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:  # up to pytest's own root; a level more with several workers
        parent.chmod(parent.stat().st_mode | 0o011)
    home = tmp_path / "them"
    home.mkdir()
    nobody = User("nobody", 65534, 65534, home)
    with pytest.raises(RethawError, match="cannot be written as nobody"):
        credentials.save("http://h:1", "t", nobody)  # not their directory: root would have managed
    os.chown(home, nobody.uid, nobody.gid)
    path = credentials.save("http://h:1", "t", nobody)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (65534, 65534, 0o600)
    assert json.loads(path.read_text()) == {"url": "http://h:1", "token": "t"}


@pytest.mark.root
def test_a_link_that_a_user_planted_is_not_followed_by_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:  # up to pytest's own root; a level more with several workers
        parent.chmod(parent.stat().st_mode | 0o011)
    roots = tmp_path / "roots"
    roots.mkdir(mode=0o700)
    home = tmp_path / "them"
    (home / ".config").mkdir(parents=True)
    (home / ".config/rethaw").symlink_to(roots)
    for path in (home, home / ".config"):
        os.chown(path, 65534, 65534)
    with pytest.raises(RethawError):
        credentials.save("http://h:1", "t", User("nobody", 65534, 65534, home))
    assert list(roots.iterdir()) == []


@pytest.mark.root
def test_invoking_user_is_sudos(monkeypatch: pytest.MonkeyPatch) -> None:
    assert credentials.invoking_user({"SUDO_USER": "nobody", "HOME": "/root"}).uid == 65534
    assert credentials.invoking_user({"SUDO_USER": "no-such-user", "HOME": "/x"}).home == Path("/x")
    assert credentials.invoking_user({"SUDO_USER": "root", "HOME": "/x"}).uid == 0
