"""`Client().images`: images of the server's node."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import httpx2

from rethaw.model.errors import Unavailable
from rethaw.model.image_types import ImageBuilt, ImageDetail, ImageInfo, ImageRemoved, ImageSpec
from rethaw.sdk.calls import Call, error_of, path
from rethaw.sdk.sse import Parser, ServerEvent
from rethaw.sdk.transport import QUIET_S, Target

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.client import Client
    from rethaw.sdk.images import Image

_BUILD_S = 3600.0  # a step may take an hour


def _build(spec: ImageSpec) -> Call[ImageBuilt]:
    content = b'{"image":%b}' % spec.model_dump_json().encode()
    return Call("POST", "/v1/images", ImageBuilt.model_validate_json, content=content, wait_s=_BUILD_S)


def _follow(target: Target, spec: ImageSpec) -> dict[str, Any]:
    """Keyword arguments of `stream`."""
    out = target.request(_build(spec))
    timeout = httpx2.Timeout(target.timeout_s, read=QUIET_S)
    return {**out, "params": {"follow": "true"}, "timeout": timeout}


def _take(found: ServerEvent, log: Callable[[str], None], target: Target) -> ImageBuilt | None:
    if found.event == "line":
        log(str(json.loads(found.data)))
    elif found.event == "built":
        return ImageBuilt.model_validate_json(found.data)
    elif found.event == "error":
        status = int(json.loads(found.data).get("status", 500))
        raise error_of(status, found.data, url=target.url, token_source=target.source)
    return None


def _cut(target: Target) -> Unavailable:
    return Unavailable(f"{target.url} ended in the middle of the build", remedy="build it again: what was done is kept")


def _list() -> Call[list[ImageInfo]]:
    def read(body: bytes) -> list[ImageInfo]:
        found = cast("list[dict[str, Any]]", json.loads(body)["images"])
        return [ImageInfo.model_validate_json(json.dumps(one)) for one in found]

    return Call("GET", "/v1/images", read)


def _inspect(digest: str) -> Call[ImageDetail]:
    return Call("GET", path("images", digest), ImageDetail.model_validate_json)


def _remove(digest: str) -> Call[ImageRemoved]:
    return Call("DELETE", path("images", digest), ImageRemoved.model_validate_json, wait_s=_BUILD_S)


class Images:
    """What agents' sandboxes are made of, on the server."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def upload(self, image: Image) -> ImageSpec:
        """Send what `image` takes from this machine, as far as the server has not got it. Its wire form."""
        added = image.uploads()
        for digest, data in added:
            if not self._client.blobs.has(digest):
                self._client.blobs.put(data)
        return image.spec_of([digest for digest, _ in added])

    def build(self, image: Image, log: Callable[[str], None] | None = None) -> ImageBuilt:
        """Build `image` now, so that no first start waits for it. `log` is told each line as it comes; then the build ends
        with this call, else it goes on without. Raises ImageError with the last lines of a failing step."""
        spec = self.upload(image)
        if log is None:
            return self._client.run(_build(spec))
        target, parser = self._client.target, Parser()
        try:
            with self._client.http.stream(**_follow(target, spec)) as response:
                if response.status_code >= 400:
                    raise error_of(response.status_code, response.read(), url=target.url, token_source=target.source)
                for chunk in response.iter_bytes():
                    for found in parser.feed(chunk):
                        if (built := _take(found, log, target)) is not None:
                            return built
        except httpx2.HTTPError as error:
            raise target.unavailable(error) from error
        raise _cut(target)

    def list(self) -> list[ImageInfo]:
        """Images (kind "image") and the trees that they stand on, the last used first."""
        return self._client.run(_list())

    def inspect(self, digest: str) -> ImageDetail:
        """One, by the beginning of its digest: its layers, and the sessions and snapshots that need it."""
        return self._client.run(_inspect(digest))

    def remove(self, digest: str) -> ImageRemoved:
        """Remove an image, and the layers that no other stands on. Raises Conflict while a session or snapshot needs it."""
        return self._client.run(_remove(digest))


class AsyncImages:
    """`Images` with await."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def upload(self, image: Image) -> ImageSpec:
        """Send what the server has not got; see `Images.upload`."""
        added = image.uploads()
        for digest, data in added:
            if not await self._client.blobs.has(digest):
                await self._client.blobs.put(data)
        return image.spec_of([digest for digest, _ in added])

    async def build(self, image: Image, log: Callable[[str], None] | None = None) -> ImageBuilt:
        """Build `image` now; see `Images.build`."""
        spec = await self.upload(image)
        if log is None:
            return await self._client.run(_build(spec))
        target, parser = self._client.target, Parser()
        try:
            async with self._client.http.stream(**_follow(target, spec)) as response:
                if response.status_code >= 400:
                    raise error_of(
                        response.status_code, await response.aread(), url=target.url, token_source=target.source
                    )
                async for chunk in response.aiter_bytes():
                    for found in parser.feed(chunk):
                        if (built := _take(found, log, target)) is not None:
                            return built
        except httpx2.HTTPError as error:
            raise target.unavailable(error) from error
        raise _cut(target)

    async def list(self) -> list[ImageInfo]:
        """Images and the trees that they stand on, the last used first."""
        return await self._client.run(_list())

    async def inspect(self, digest: str) -> ImageDetail:
        """One, by the beginning of its digest; see `Images.inspect`."""
        return await self._client.run(_inspect(digest))

    async def remove(self, digest: str) -> ImageRemoved:
        """Remove an image; see `Images.remove`."""
        return await self._client.run(_remove(digest))
