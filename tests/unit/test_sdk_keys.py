"""Keys are refused where an environment is defined: snapshots keep it."""

from __future__ import annotations

import pytest

import rethaw
from rethaw import Image
from rethaw.cli.main import main
from rethaw.model.errors import InvalidInput
from rethaw.sdk.keys import looks_like_one

# Put together here, so that no scanner of this repository takes them for real.
KEYS = [
    ("ANYTHING", "sk-" + "ant-api03-abcdefghijklmnop"),
    ("X", "AKIA" + "IOSFODNN7EXAMPLE"),
    ("GH", "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2"),
    ("URL", "https://user:" + "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2" + "@example.com/x"),
    ("PEM", "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE"),
    ("MY_API_KEY", "9f86d081884c7d659a2feaa0c55ad015"),
    ("SERVICE_TOKEN", "xT7pQ2vL9mK4wR8zB3nD"),
    ("DB_PASSWORD", "t6Rk9PzW2qLm8XvB"),
    ("clientSecretless_SECRET", "dGhpcyBpcyBub3QgYSByZWFsIHNlY3JldCAxMjM0NQ=="),
]  # fmt: skip
HARMLESS = [
    ("OPENAI_API_KEY", "rethaw"), ("MODEL", "gpt-5-mini-2026-01-01"), ("MAX_TOKENS", "4096"), ("TOKEN_LIMIT", "128000"),
    ("CACHE_KEY", "my-cache-production-v2-2026"), ("KEYBOARD", "us-intl-9f86d081884c7d659a2f"), ("PATH", "/usr/local/bin:/bin"),
    ("GIT_SHA", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"), ("TOKEN_FILE", "/run/secrets/token"), ("A_SECRET", ""),
    ("SORT_KEY", "created_at,updated_at,name"), ("NUMBER_KEY", "1234567890123456789"), ("TOKENIZER", "cl100k_base_2024_01_01"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), KEYS)
def test_a_key_is_refused_wherever_an_environment_is_defined(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidInput, match=rf"{name} looks like a key.*key_env.*RETHAW_NOT_SECRET={name}") as caught:
        Image.debian().env({name: value})
    assert value not in str(caught.value)
    with pytest.raises(InvalidInput, match="looks like a key"):
        rethaw.agent(name="agent", env={name: value})(print)
    assert main(["run", "--dry-run", "--image", "base", "-e", f"{name}={value}", "--", "true"]) == 2
    said = capsys.readouterr()
    assert f"{name} looks like a key" in said.err and value not in said.err + said.out
    monkeypatch.setenv("RETHAW_NOT_SECRET", f"OTHER, {name}")
    assert Image.debian().env({name: value}).spec.env == {name: value}
    monkeypatch.delenv("RETHAW_NOT_SECRET")
    monkeypatch.setenv("RETHAW_SOCKET", "/run/x")  # the agent's file is imported in its sandbox as well
    Image.debian().env({name: value})


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_what_is_no_key_passes(name: str, value: str) -> None:
    assert not looks_like_one(name, value)
    Image.debian().env({name: value})
