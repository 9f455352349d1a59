"""The images of a node, as its API shows and builds them."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import Any

from rethaw.images.builder import ImageStore
from rethaw.images.spec import check, spec_digest
from rethaw.model.types import ImageBuilt, ImageInfo, ImageSpec

_SHOWN = 12  # characters of a digest in a text


class Shelf:
    """`model.ports.Images` over the trees of `store`."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    async def build(self, spec: ImageSpec) -> ImageBuilt:
        check(spec)
        lines: list[str] = []
        started = time.monotonic()
        await self._store.ensure(spec, lines.append)
        took = round(time.monotonic() - started, 2)
        return ImageBuilt(digest=spec_digest(spec), built=bool(lines), seconds=took, lines=tuple(lines))

    async def list(self) -> list[ImageInfo]:
        found = await asyncio.to_thread(self._list)
        return sorted(found, key=lambda image: image.used_at, reverse=True)

    def _list(self) -> list[ImageInfo]:
        out: list[ImageInfo] = []
        for path in self._store.home.glob("*/manifest.json"):
            try:
                about: dict[str, Any] = json.loads(path.read_text())
                out.append(
                    ImageInfo(
                        digest=path.parent.name,
                        kind=str(about["kind"]),
                        made_of=made_of(about),
                        own_bytes=int(about["own_bytes"]),
                        built_s=float(about["built_s"]),
                        used_at=datetime.fromtimestamp(path.stat().st_mtime, UTC),
                    )
                )
            except (OSError, ValueError, KeyError, TypeError):  # removed meanwhile, or of another version
                continue
        return out


def made_of(about: dict[str, Any]) -> str:
    """What a tree's manifest says, in words."""
    if about["kind"] == "base":
        return " ".join(["Debian", str(about["suite"]), *(f"+{name}" for name in about.get("apt", ()))])
    if about["kind"] == "pip":
        return "pip " + " ".join(str(one) for one in about.get("pip", ()))
    if about["kind"] == "step":
        step: dict[str, Any] = about["step"]
        return " ".join([str(step["kind"]), *(str(word) for word in step.get("words", ()))])
    code = str(about.get("code") or "")
    return f"image {str(about['image'])[:_SHOWN]}" + (f" with code {code[:_SHOWN]}" if code else "")
