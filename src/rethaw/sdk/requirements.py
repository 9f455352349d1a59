"""Requirement files, as far as an image takes them."""

from __future__ import annotations

from pathlib import Path

from rethaw.model.errors import InvalidInput, NotFound

_REMEDY = "an image takes names with versions, and hashes; write the others as steps of Image.run"


def read(path: Path, above: tuple[Path, ...] = ()) -> list[str]:
    """The requirements of `path` and of what it includes by -r, one a line. Raises InvalidInput naming the line."""
    if not path.is_file():
        raise NotFound(f"there is no file {str(path)!r}", remedy="name the requirements file")
    if path in above:
        raise InvalidInput(f"{path} includes itself", remedy="remove one of the lines -r")
    out: list[str] = []
    text = path.read_text().replace("\\\n", " ")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition(" #")[0].split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] in ("-r", "--requirement") and len(words) == 2:
            out += read((path.parent / words[1]).resolve(), (*above, path))
            continue
        hashes = [word for word in words if word.startswith("--hash=")]
        rest = " ".join(word for word in words if not word.startswith("--hash="))
        if rest.startswith(("-", ".", "/")) or "://" in rest or " --" in rest or " @ " in rest:
            raise InvalidInput(f"{path}:{number}: {line.strip()!r} cannot be taken", remedy=_REMEDY)
        out.append(" ".join([rest, *hashes]))
    return out
