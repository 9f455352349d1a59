"""rethaw.toml and the environment over it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rethaw.model.errors import InvalidInput, NotFound
from rethaw.server.config import DEFAULT_DATA_DIR, load
from rethaw.server.up import prepare_data_dir


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(text: str, name: str = "rethaw.toml") -> Path:
    path = Path(name).absolute()
    path.write_text(text)
    return path


def test_nothing_is_needed() -> None:
    config = load(env={})
    assert config.data_dir == DEFAULT_DATA_DIR and (config.host, config.port) == ("127.0.0.1", 7420)
    assert config.database_url is None and config.public_url is None and config.log_level == logging.INFO
    assert config.url_at(7420) == "http://127.0.0.1:7420" and config.source is None
    assert {"openai", "anthropic"} <= set(config.providers.names())


def test_file_then_environment_then_options() -> None:
    path = written('data_dir = "/a"\nlisten = "0.0.0.0:80"\nlog_level = "DEBUG"\npublic_url = "https://x.example/"')
    config = load(env={})
    assert config.source == path and config.data_dir == Path("/a") and config.log_level == logging.DEBUG
    assert config.url_at(80) == "http://127.0.0.1:80" and config.public_url == "https://x.example"
    assert load(env={"RETHAW_DATA_DIR": "/b"}).data_dir == Path("/b")
    assert load(env={"RETHAW_DATA_DIR": "/b"}, overrides={"data_dir": "/c"}).data_dir == Path("/c")
    assert load(env={"DATABASE_URL": "postgresql://u:p@h/d"}).database_url == "postgresql://u:p@h/d"
    assert load(env={"RETHAW_LISTEN": "[::1]:0"}).host == "::1"


def test_which_file() -> None:
    written('data_dir = "/here"')
    named = written('data_dir = "/named"', "other.toml")
    assert load(env={"RETHAW_CONFIG": str(named)}).data_dir == Path("/named")
    assert load("rethaw.toml", env={"RETHAW_CONFIG": str(named)}).data_dir == Path("/here")
    for path, env, said in (("no.toml", {}, "--config"), (None, {"RETHAW_CONFIG": "no.toml"}, "RETHAW_CONFIG")):
        with pytest.raises(NotFound, match=f"{said}.*no.toml"):
            load(path, env=env)


def test_prices() -> None:
    written('[prices."gpt-5*"]\ninput = 0.25\ncached = 0.025\noutput = "2.00"')
    price = load(env={}).prices.of("gpt-5-mini")
    assert price is not None and str(price.of(1_000_000, 1_000_000, 1_000_000)) == "2.025"
    assert load(env={}).prices.of("other") is None


def test_providers() -> None:
    written('[providers.mine]\nbase_url = "http://h:1/v1"\nauth = "none"\n[providers.openai]\nkey_env = "K"')
    providers = load(env={"K": "secret"}).providers
    assert providers.get("mine").base_url == "http://h:1/v1" and providers.get("openai").auth_value == "Bearer secret"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data_dir = 1", "data_dir = 1 is not text"),
        ('data_dir = "relative"', "data_dir = 'relative'"),
        ('data_dir = "/"', "data_dir = '/'"),
        ('data_dir = "/etc/hostname/x"', None),
        ('listen = "7420"', "listen = '7420' is not HOST:PORT"),
        ('listen = "h:65536"', "listen = 'h:65536'"),
        ('listen = "a b:1"', "listen"),
        ('listen = ":1"', "listen"),
        ('log_level = "loud"', "log_level = 'loud' is not a log level; use one of debug"),
        ('engine = "xen"', "engine = 'xen' is not an engine; use one of gvisor, qemu"),
        ('public_url = "example.com"', "public_url = 'example.com'"),
        ('database_url = "mysql://root:hunter2@h"', "database_url is not a PostgreSQL URL"),
        ("dta_dir = 1", "'dta_dir' is not a setting; known: data_dir"),
        ("x = ", "is not TOML"),
        ("providers = 1", "providers is not a table"),
        ('[providers.openai]\nbase_url = "h"', "base_url = 'h' in [providers.openai]"),
        ("[prices.gpt-5-mini]\ninput = 1", '[prices."gpt-5-mini"] has no output'),
        ("[prices.gpt-5.1]\ninput = 1\noutput = 2", "put the model into quotes"),
        ("[providers.mine]", "base_url = None in [providers.mine]"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(text: str, said: str | None) -> None:
    path = written(text)
    if said is None:
        assert load(env={}).data_dir == Path("/etc/hostname/x")  # whether it can be made is found at the start
        return
    with pytest.raises(InvalidInput) as caught:
        load(env={})
    assert str(path) in str(caught.value) and said in str(caught.value) and caught.value.remedy
    assert "hunter2" not in str(caught.value)


def test_the_environment_is_named_too() -> None:
    for name, value in {
        "RETHAW_LISTEN": "x",
        "RETHAW_LOG_LEVEL": "x",
        "DATABASE_URL": "x",
        "RETHAW_DATA_DIR": "x",
    }.items():
        with pytest.raises(InvalidInput, match=name):
            load(env={name: value})


def test_a_file_that_is_no_text_is_named() -> None:
    Path("rethaw.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match=r"rethaw\.toml is not TOML"):
        load(env={})


def test_exports_that_a_kill_cut_off_are_removed_at_the_next_start(tmp_path: Path) -> None:
    for name in ("export-x1", "import-x2"):
        (tmp_path / "code" / name).mkdir(parents=True)
        (tmp_path / "code" / name / "file").write_bytes(b"half")
    code = tmp_path / "code" / f"{'0' * 64}.tar.gz"
    code.write_bytes(b"code")
    prepare_data_dir(tmp_path).close()
    assert list((tmp_path / "code").iterdir()) == [code]
