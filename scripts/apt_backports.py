"""Print an apt source (deb822) for a suite's backports, made from this machine's own entry for the suite.

No mirror is named here: URIs, architectures and keys are those that the machine already uses for SUITE main, in
*.sources (deb822) or *.list (one line) form. Exit status 3 when the machine has no such entry. Standard library only.

    python3 scripts/apt_backports.py bookworm [ETC_APT]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

KEPT = ("Architectures", "Signed-By", "Trusted")  # what of the machine's entry the new one repeats
_OPTION = {"arch": "Architectures", "signed-by": "Signed-By", "trusted": "Trusted"}


def deb822(text: str) -> list[dict[str, str]]:
    """The stanzas of a .sources file, field names in title case, continuation lines kept."""
    stanzas: list[dict[str, str]] = []
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        last = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and last:
                fields[last] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                last = name.strip().title()
                fields[last] = value.strip()
        if fields:
            stanzas.append(fields)
    return stanzas


def one_line(text: str) -> list[dict[str, str]]:
    """The entries of a .list file in the same form."""
    entries: list[dict[str, str]] = []
    for raw in text.splitlines():
        match = re.match(r"(deb|deb-src)\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.*)", raw.split("#")[0].strip())
        if match is None:
            continue
        kind, options, uri, suite, components = match.groups()
        entry = {"Types": kind, "Uris": uri, "Suites": suite, "Components": components}
        for option in (options or "").split():
            name, _, value = option.partition("=")
            if name in _OPTION:
                entry[_OPTION[name]] = value.replace(",", " ")
        entries.append(entry)
    return entries


def entries(etc: Path) -> list[dict[str, str]]:
    """Every apt source of this machine."""
    out: list[dict[str, str]] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.is_file() and path.suffix in (".list", ".sources"):
            text = path.read_text(encoding="utf-8", errors="replace")
            out += one_line(text) if path.suffix == ".list" else deb822(text)
    return out


def _is(entry: dict[str, str], suite: str) -> bool:
    return (
        "deb" in entry.get("Types", "").split()
        and suite in entry.get("Suites", "").split()
        and "main" in entry.get("Components", "").split()
        and entry.get("Enabled", "yes").lower() not in ("no", "false", "0", "off")
    )


def source(found: list[dict[str, str]], suite: str) -> str | None:
    """The text of the new .sources file, None when no entry of `found` serves `suite` main."""
    for entry in found:
        if _is(entry, suite):
            lines = [f"Types: deb\nURIs: {entry['Uris']}\nSuites: {suite}-backports\nComponents: main"]
            lines += [f"{name}: {entry[name]}".replace(": \n", ":\n") for name in KEPT if entry.get(name)]
            return "\n".join(lines) + "\n"
    return None


def main(argv: list[str]) -> int:
    suite, etc = argv[0], Path(argv[1] if len(argv) > 1 else "/etc/apt")
    found = entries(etc)
    if any(_is(entry, f"{suite}-backports") for entry in found):
        return 0  # nothing to add
    text = source(found, suite)
    if text is None:
        sys.stderr.write(f"no source for {suite} main in {etc}\n")
        return 3
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
