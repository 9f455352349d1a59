"""Which files of a directory travel: patterns as in .gitignore."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# What never belongs into an image, unless a "!pattern" takes it back.
DEFAULT = (
    ".git/", "__pycache__/", "*.pyc", ".venv/", "venv/", "node_modules/", ".env", ".env.*", ".DS_Store",
    ".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".rethawignore",
)  # fmt: skip
FILES = (".rethawignore", ".gitignore")  # of the directory's top; the first that is there counts


class Rules:
    """The last pattern that fits decides. `*` and `?` stay within a name, `**` does not; a pattern with a slash (but at its
    end) is of the top, one without fits in every directory; one that ends in a slash fits directories; "!" takes back."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._rules: list[tuple[re.Pattern[str], bool, bool]] = []
        for line in patterns:
            text = line.rstrip()
            if not text or text.startswith("#"):
                continue
            keeps = text.startswith("!")
            text = text[1:] if keeps else text.removeprefix("\\")
            directory = text.endswith("/")
            text = text.rstrip("/")
            anywhere = "/" not in text
            self._rules.append((re.compile(_regex(text.lstrip("/"), anywhere)), directory, keeps))

    def ignores(self, name: str, directory: bool) -> bool:
        """Whether `name`, relative to the top, stays behind. What is below an ignored directory is not asked for."""
        out = False
        for pattern, directories, keeps in self._rules:
            if (directory or not directories) and pattern.fullmatch(name):
                out = not keeps
        return out


def of(directory: Path, more: Iterable[str]) -> Rules:
    """The rules of `directory`: the defaults, its own file, then `more`."""
    own: list[str] = []
    for name in FILES:
        if (directory / name).is_file():
            own = (directory / name).read_text(errors="replace").splitlines()
            break
    return Rules([*DEFAULT, *own, *more])


def _regex(text: str, anywhere: bool) -> str:
    out, i = "(?:.*/)?" if anywhere else "", 0
    while i < len(text):
        if text.startswith("**/", i):
            out += "(?:.*/)?"
            i += 3
        elif text.startswith("**", i):
            out += ".*"
            i += 2
        elif text[i] == "*":
            out += "[^/]*"
            i += 1
        elif text[i] == "?":
            out += "[^/]"
            i += 1
        elif text[i] == "[" and (end := text.find("]", i + 2)) > 0:
            inner = text[i + 1 : end].replace("\\", "\\\\")
            out += f"[{'^' + inner[1:] if inner[0] in '!^' else inner}]"
            i = end + 1
        else:
            out += re.escape(text[i])
            i += 1
    return out
