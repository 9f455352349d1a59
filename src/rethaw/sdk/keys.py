"""Finds keys among environment variables: what is in an agent's environment is in the log and in every snapshot."""

from __future__ import annotations

import math
import os
import re
from collections import Counter

from rethaw.model.errors import InvalidInput

ALLOWED = "RETHAW_NOT_SECRET"  # names, between commas, that are no keys whatever they look like
_FORMS = re.compile(
    r"""sk-[A-Za-z0-9_-]{16,} | (?:AKIA|ASIA)[0-9A-Z]{16} | gh[opsur]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,}
    | glpat-[A-Za-z0-9_-]{16,} | xox[abeprs]-[A-Za-z0-9-]{10,} | AIza[0-9A-Za-z_-]{35} | npm_[A-Za-z0-9]{30,}
    | hf_[A-Za-z0-9]{20,} | pypi-[A-Za-z0-9_-]{40,} | -----BEGIN\ [A-Z\ ]*PRIVATE\ KEY-----
    | eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}""",
    re.VERBOSE,
)
_NAME = re.compile(
    r"(?:^|_)(?:(?:API|ACCESS|SECRET|PRIVATE)?KEYS?|TOKENS?|SECRETS?|CREDENTIALS?)(?:_|$)|PASSWORD|PASSWD"
)
_VALUE = re.compile(r"[A-Za-z0-9+/=_.~-]{16,}")
_BITS = 3.3  # a character, as random text of 16 or more has; 32 random hexadecimal digits have about 3.6
_WORD = re.compile(r"[a-z]{9}|[A-Z]{9}")  # no chance, but a word


def looks_like_one(name: str, value: str) -> bool:
    """Whether `value` has the form of a known kind of key, or is random text under a name that says so."""
    if _FORMS.search(value):
        return True
    if not _NAME.search(name.upper()) or not _VALUE.fullmatch(value):
        return False
    digits = sum(c.isdigit() for c in value)
    return 3 <= digits < len(value) and not _WORD.search(value) and _entropy(value) >= _BITS


def check(variables: dict[str, str]) -> None:
    """Raises InvalidInput naming the first variable that looks like a key; never its value."""
    known = {name.strip() for name in os.environ.get(ALLOWED, "").split(",")}
    for name, value in variables.items():
        if name not in known and looks_like_one(name, value):
            raise InvalidInput(
                f"environment variable {name} looks like a key, and snapshots keep what is in the environment",
                remedy=f"give it to the server: key_env in [providers.NAME] of its rethaw.toml; or {ALLOWED}={name} if it is none",
            )


def _entropy(text: str) -> float:
    """Bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())
