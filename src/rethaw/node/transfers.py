"""Snapshots into and out of one file: `model.ports.Carrier` on a node."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from rethaw.images.spec import blobs
from rethaw.model.errors import EngineMismatch, ImageError, InvalidInput, RethawError
from rethaw.model.image_types import ImageSpec
from rethaw.model.types import AgentSpec, SnapshotInfo
from rethaw.node.parts import Parts

_BROKEN = "export the snapshot again, with a Rethaw of this version"
_CODE_LIMIT = 8 << 20  # of an agent's code, as an archive, and of what its image takes from uploads


class Transfers:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def _code(self, digest: str) -> Path:
        return self._parts.data_dir / "code" / f"{digest}.tar.gz"

    async def export(self, info: SnapshotInfo, described: dict[str, Any], target: Path) -> None:
        code = described["agent"].get("code")
        extra = dict(described)
        if code:
            data = self._code(code).read_bytes()
            if len(data) > _CODE_LIMIT:
                raise InvalidInput(
                    f"the code of agent {described['agent']['name']} takes {len(data)} bytes, {_CODE_LIMIT} fit",
                    remedy="leave data out of the agent's directory",
                )
            extra["code"] = base64.b64encode(data).decode()
        extra["uploads"] = await asyncio.to_thread(self._uploads, described)
        await self._parts.store.export(info, extra, target)

    def _uploads(self, described: dict[str, Any]) -> dict[str, str]:
        """What the image takes from uploads, as far as it fits into the file's head: the smallest first. What does not fit
        has to be where the file is imported, or its image has."""
        code = described["agent"].get("code")
        room = _CODE_LIMIT - (self._code(code).stat().st_size if code else 0)
        image = ImageSpec.model_validate(described["agent"].get("image") or {}, strict=False)
        paths = {digest: self._code(digest) for digest in blobs(image)}
        out: dict[str, str] = {}
        for digest, path in sorted(paths.items(), key=lambda one: one[1].stat().st_size if one[1].exists() else 0):
            if path.exists() and (room := room - path.stat().st_size) >= 0:
                out[digest] = base64.b64encode(path.read_bytes()).decode()
        return out

    async def take_in(self, snapshot: str, source: Path) -> tuple[SnapshotInfo, AgentSpec, dict[str, Any], str]:
        """See the port. Whatever would keep it from being restored here is said now."""
        parts = self._parts
        written, found = await parts.store.take_in(snapshot, source)
        try:
            info, agent, args = _parsed(found.info, found.extra)
            update = {
                "id": snapshot, "path": written.path, "digest": written.digest, "sections": written.sections,
                "raw_bytes": written.raw_bytes, "stored_bytes": written.stored_bytes, "uploaded_ms": None,
                "unusable": None, "pinned": False,
            }  # fmt: skip
            if agent.code is not None:
                self._keep(agent.code, found.extra.get("code"), "code")
            carried = cast("dict[str, Any]", found.extra.get("uploads") or {})
            for digest in blobs(agent.image):
                if digest in carried:
                    self._keep(digest, carried[digest], "image's files")
            engine = parts.engines.of(info.engine)
            if not await engine.fits(info.engine_build, info.cpu):
                raise EngineMismatch(
                    f"this snapshot needs the {info.engine} build {info.engine_build[:12]}, this node has "
                    f"{(await engine.build())[:12]}",
                    remedy=f"put that build as {parts.data_dir}/engines/{info.engine_build}/runsc",
                    build=info.engine_build,
                )
            await self._image(info, agent)
        except BaseException:
            await parts.store.delete(snapshot)
            raise
        return info.model_copy(update=update), agent, args, found.info["session"]

    def _keep(self, digest: str, text: Any, what: str) -> None:
        try:
            data = base64.b64decode(str(text or ""), validate=True)
        except binascii.Error:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise InvalidInput(f"the file lacks the agent's {what}", remedy=_BROKEN)
        path = self._code(digest)
        if not path.exists():
            partial = path.with_name(f".{path.name}.import")
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial.write_bytes(data)
            partial.rename(path)

    async def _image(self, info: SnapshotInfo, agent: AgentSpec) -> None:
        images = self._parts.images
        if await images.rootfs(info.image) is not None:
            return
        missing = [digest for digest in blobs(agent.image) if not self._code(digest).exists()]
        try:
            built = await images.ensure(agent.image, lambda _: None)
        except ImageError as error:
            if not missing:
                raise
            raise ImageError(
                f"the image of this snapshot takes files that an export has no room for, and they are not here: {missing[0]}",
                remedy="build the image here first: rethaw image build, or start the agent once",
            ) from error
        digest, _ = await images.compose(built, self._code(agent.code) if agent.code else None)
        if digest != info.image:
            raise ImageError(
                f"this snapshot was taken on the image {info.image[:12]}, its specification gives {digest[:12]} here",
                remedy="copy that image into the data directory; packages have changed since it was built",
            )


def _parsed(info: dict[str, Any], extra: dict[str, Any]) -> tuple[SnapshotInfo, AgentSpec, dict[str, Any]]:
    try:
        return (
            SnapshotInfo.model_validate(info, strict=False),
            AgentSpec.model_validate(extra["agent"], strict=False),
            dict(extra["args"]),
        )
    except (ValidationError, KeyError, TypeError, ValueError, RethawError) as error:
        first = str(error).splitlines()[0]
        raise InvalidInput(f"the file describes no session of this version ({first})", remedy=_BROKEN) from error
