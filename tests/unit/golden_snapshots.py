"""Snapshots that this version of the store made once and every later one must read: tests/golden/snapshots-v1.

Run as a program, it writes them, for a new version of the format: `python tests/unit/golden_snapshots.py DIRECTORY`. Those
that are there are never made anew: a reader that cannot read them has broken somebody's data.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import sys
from pathlib import Path

from store_fixtures import KERNEL, KEY, MEMORY, Content, home_of, keyring, save, store_in

from rethaw.snapshots.keys import Keyring
from rethaw.snapshots.pages import PAGE

GOLDEN = Path(__file__).parents[1] / "golden" / "snapshots-v1"
PARENTS = {"snap_g0": None, "snap_g1": "snap_g0", "snap_g2": "snap_g1", "snap_g3": "snap_g0", "snap_g4": None}
RINGS = {"clear": Keyring(), "sealed": keyring(KEY)}


def rough(name: str, size: int = PAGE) -> bytes:
    """Bytes that do not compress, the same for ever."""
    return hashlib.shake_256(name.encode()).digest(size)


def smooth(name: str) -> bytes:
    """A page that compresses."""
    return b"".join(b"%s: line %d of a page of text\n" % (name.encode(), n) for n in range(200))[:PAGE]


def edited(page: bytes, at: int, text: bytes) -> bytes:
    return page[:at] + text + page[at + len(text) :]


def contents() -> dict[str, Content]:
    """By snapshot. Whole pages, deltas, deltas of pages that were deltas, twins, zeros, several packs, blobs of more than
    one frame, sections that are empty or of no whole number of pages, and one that shares nothing."""
    pages = [smooth(f"page {n}") for n in range(35)] + [bytes(PAGE)] * 3 + [rough(f"rough {n}") for n in range(3)]
    out: dict[str, Content] = {}

    def add(name: str, pages: list[bytes], end: bytes, kernel: bytes) -> None:
        out[name] = {
            MEMORY: b"".join(pages) + end,
            "second.img": b"".join(pages[2:4]),
            "empty.img": b"",
            KERNEL: kernel,
            "none": b"",
        }

    add("snap_g0", pages, b"odd end", b"kernel state " * 90_000)  # more than a MiB: two frames
    one = list(pages)
    one[4] = edited(one[4], 800, b"a few words")
    one[39] = edited(one[39], 0, b"changed!")
    one[20] = smooth("another page")
    one.insert(10, rough("inserted"))
    add("snap_g1", one, b"odd end", b"kernel state one")
    two = list(one)
    two[4] = edited(two[4], 1600, b"some more")
    two[6] = two[7] = two[30]
    two[36] = edited(two[36], 8, b"no more zeros")
    two[25] = bytes(PAGE)
    del two[12:15]
    add("snap_g2", two, b"", b"")
    three = list(pages)
    three[5] = edited(three[5], 0, b"a fork of the first")
    add("snap_g3", three, b"another odd end", b"kernel state three")
    add("snap_g4", [rough("alone")], b"", b"alone")
    return out


async def make(directory: Path) -> None:
    expected = {
        snapshot: {name: hashlib.sha256(data).hexdigest() for name, data in sections.items()}
        for snapshot, sections in contents().items()
    }
    for kind, ring in RINGS.items():
        work = directory / f".{kind}"
        work.mkdir(parents=True)
        store = store_in(work, keys=ring)
        digests: dict[str, str] = {}
        for snapshot, content in contents().items():
            paged = (MEMORY, "second.img", "empty.img")
            image = "alone" if snapshot == "snap_g4" else "image"
            info = await save(store, content, snapshot=snapshot, parent=PARENTS[snapshot], paged=paged, image=image)
            digests[snapshot] = info.digest
        shutil.copytree(home_of(work), directory / kind)
        store.close()
        shutil.rmtree(work)
        (directory / f"{kind}.json").write_text(json.dumps({"digests": digests, "sha256": expected}, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(make(Path(sys.argv[1])))
