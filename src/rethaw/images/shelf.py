"""The images of a node, as its API shows, builds and removes them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rethaw.images.builder import ImageStore
from rethaw.images.spec import check, layers, spec_digest, tree_digest
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.image_types import ImageBuilt, ImageDetail, ImageInfo, ImageRemoved, ImageSpec

_SHOWN = 12  # characters of a digest in a text
_LEAST = 4  # characters that name an image


class Shelf:
    """`model.ports.Images` over the trees of `store`."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    async def build(self, spec: ImageSpec, progress: Callable[[str], None] | None = None) -> ImageBuilt:
        check(spec)
        lines: list[str] = []

        def told(line: str) -> None:
            lines.append(line)
            if progress is not None:
                progress(line)

        started = time.monotonic()
        await self._store.ensure(spec, told)
        took = round(time.monotonic() - started, 2)
        return ImageBuilt(digest=spec_digest(spec), built=bool(lines), seconds=took, lines=tuple(lines))

    def digest(self, spec: ImageSpec) -> str:
        return spec_digest(spec)

    async def list(self) -> list[ImageInfo]:
        def look() -> list[ImageInfo]:
            trees = self._trees()
            return [*self._images(trees), *trees.values()]

        found = await asyncio.to_thread(look)
        return sorted(found, key=lambda image: image.used_at, reverse=True)

    async def find(self, digest: str) -> ImageDetail:
        return await asyncio.to_thread(self._find, digest)

    async def remove(self, digest: str) -> ImageRemoved:
        found = await self.find(digest)
        gone = await asyncio.to_thread(self._going, found)
        trees = await asyncio.to_thread(self._trees)
        await self._store.remove(gone)
        freed = sum(trees[one].own_bytes for one in gone if one in trees)
        return ImageRemoved(digests=tuple(dict.fromkeys((found.info.digest, *gone))), bytes=freed)

    # ------------------------------------------------------------------ blocking

    def _trees(self) -> dict[str, ImageInfo]:
        out: dict[str, ImageInfo] = {}
        for path in self._store.home.glob("*/manifest.json"):
            try:
                out[path.parent.name] = _info(path)
            except (OSError, ValueError, KeyError, TypeError):  # removed meanwhile, or of another version
                continue
        return out

    def _specs(self) -> dict[str, ImageSpec]:
        out: dict[str, ImageSpec] = {}
        for path in self._store.records.glob("*.json"):
            try:
                out[path.stem] = ImageSpec.model_validate_json(path.read_text())
            except (OSError, ValueError):
                continue
        return out

    def _images(self, trees: dict[str, ImageInfo]) -> list[ImageInfo]:
        """Those of which the tree is there."""
        return [_of(digest, spec, trees) for digest, spec in self._specs().items() if tree_digest(spec) in trees]

    def _find(self, text: str) -> ImageDetail:
        trees, specs = self._trees(), self._specs()
        images = {one.digest: one for one in self._images(trees)}
        if len(text) < _LEAST or set(text) - set("0123456789abcdef"):
            raise InvalidInput(f"{text[:80]!r} does not name an image", remedy="see `rethaw image ls`")
        found = [digest for digest in images if digest.startswith(text)]
        found = found or [digest for digest in trees if digest.startswith(text)]
        if not found:
            raise NotFound(f"there is no image {text}", remedy="see `rethaw image ls`")
        if len(found) > 1:
            raise InvalidInput(f"{text} begins several images: {', '.join(sorted(found))}", remedy="write more of it")
        (digest,) = found
        if digest in images:
            spec = specs[digest]
            below = tuple(trees[one] for one in layers(spec) if one in trees)
            return ImageDetail(
                info=images[digest], spec=spec, layers=below, composed=tuple(self._composed("image", digest))
            )
        composed = [digest] if trees[digest].kind == "composed" else self._composed("tree", digest)
        return ImageDetail(info=trees[digest], composed=tuple(composed))

    def _composed(self, key: str, digest: str) -> list[str]:
        out: list[str] = []
        for path in self._store.home.glob("*/manifest.json"):
            try:
                about: dict[str, Any] = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if about.get("kind") == "composed" and about.get(key) == digest:
                out.append(path.parent.name)
        return out

    def _going(self, found: ImageDetail) -> list[str]:
        """Trees that go with it; of an image its record goes as well. Nothing has a parent that is not recorded, so what
        no other image stands on is needed by nobody."""
        if found.spec is None:
            return list(dict.fromkeys((found.info.digest, *found.composed)))
        (self._store.records / f"{found.info.digest}.json").unlink(missing_ok=True)
        kept = {one for spec in self._specs().values() for one in layers(spec)}
        bases = set(layers(ImageSpec()))
        return [*found.composed, *(one for one in reversed(layers(found.spec)) if one not in kept | bases)]


def _info(path: Path) -> ImageInfo:
    about: dict[str, Any] = json.loads(path.read_text())
    return ImageInfo(
        digest=path.parent.name,
        kind=str(about["kind"]),
        made_of=made_of(about),
        own_bytes=int(about["own_bytes"]),
        built_s=float(about["built_s"]),
        used_at=datetime.fromtimestamp(path.stat().st_mtime, UTC),
    )


def _of(digest: str, spec: ImageSpec, trees: dict[str, ImageInfo]) -> ImageInfo:
    below = [trees[one] for one in layers(spec) if one in trees]
    return ImageInfo(
        digest=digest,
        kind="image",
        made_of=in_words(spec),
        own_bytes=sum(one.own_bytes for one in below),
        built_s=round(sum(one.built_s for one in below), 1),
        used_at=below[-1].used_at,
    )


def in_words(spec: ImageSpec) -> str:
    """What an image is made of."""
    said = (
        [f"image {spec.oci[:_SHOWN]}"] if spec.oci else [" ".join(["Debian", spec.suite, *(f"+{n}" for n in spec.apt)])]
    )
    said += [f"pip {' '.join(spec.pip)}"] if spec.pip else []
    return ", ".join([*said, *(step.said() for step in spec.steps)])


def made_of(about: dict[str, Any]) -> str:
    """What a tree's manifest says, in words."""
    if about["kind"] == "base":
        return " ".join(["Debian", str(about["suite"]), *(f"+{name}" for name in about.get("apt", ()))])
    if about["kind"] == "pip":
        return "pip " + " ".join(str(one) for one in about.get("pip", ()))
    if about["kind"] == "oci":
        return f"image {str(about['blob'])[:_SHOWN]}"
    if about["kind"] == "runtime":
        return f"Python of Debian {about['suite']} for images without"
    if about["kind"] == "step":
        step: dict[str, Any] = about["step"]
        return " ".join([str(step["kind"]), *(str(word) for word in step.get("words", ()))])
    code = str(about.get("code") or "")
    return f"image {str(about['image'])[:_SHOWN]}" + (f" with code {code[:_SHOWN]}" if code else "")
