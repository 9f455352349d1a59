"""`Client().images`: images of the server's node."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from rethaw.model.types import ImageBuilt, ImageInfo, ImageSpec
from rethaw.sdk.calls import Call

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.client import Client
    from rethaw.sdk.images import Image

_BUILD_S = 3600.0  # a step may take an hour


def _build(spec: ImageSpec) -> Call[ImageBuilt]:
    content = b'{"image":%b}' % spec.model_dump_json().encode()
    return Call("POST", "/v1/images", ImageBuilt.model_validate_json, content=content, wait_s=_BUILD_S)


def _list() -> Call[list[ImageInfo]]:
    def read(body: bytes) -> list[ImageInfo]:
        found = cast("list[dict[str, Any]]", json.loads(body)["images"])
        return [ImageInfo.model_validate_json(json.dumps(one)) for one in found]

    return Call("GET", "/v1/images", read)


class Images:
    """What agents' sandboxes are made of, on the server."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def build(self, image: Image) -> ImageBuilt:
        """Build `image` now, so that no first start waits for it. Raises ImageError with the last lines of a failing step."""
        added = image.uploads()
        for digest, data in added:
            if not self._client.blobs.has(digest):
                self._client.blobs.put(data)
        return self._client.run(_build(image.spec_of([digest for digest, _ in added])))

    def list(self) -> list[ImageInfo]:
        """The trees that are there: bases, layers, and what sandboxes boot; the last used first."""
        return self._client.run(_list())


class AsyncImages:
    """`Images` with await."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def build(self, image: Image) -> ImageBuilt:
        """Build `image` now; see `Images.build`."""
        added = image.uploads()
        for digest, data in added:
            if not await self._client.blobs.has(digest):
                await self._client.blobs.put(data)
        return await self._client.run(_build(image.spec_of([digest for digest, _ in added])))

    async def list(self) -> list[ImageInfo]:
        """The trees that are there, the last used first."""
        return await self._client.run(_list())
