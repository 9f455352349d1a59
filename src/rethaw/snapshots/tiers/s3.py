"""A tier in an S3-compatible bucket, through obstore.

Each call ends within its time: `timeout_s` for each 8 MiB begun that it moves, retries included. obstore retries 5xx, lost
connections and cut bodies with a growing pause; this module adds the bound around it and says what went wrong in
Rethaw's own errors. Bodies are signed, so what arrives damaged is refused by the other side.

Objects up to 16 MiB are one request. Larger ones are multipart uploads, which become visible by their last request; one
that a crash cuts off leaves parts that only a lifecycle rule of the bucket removes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import obstore
from obstore import exceptions
from obstore.store import S3Store

from rethaw.model.errors import RethawError, TierUnavailable
from rethaw.snapshots.tiers import base
from rethaw.snapshots.tiers.base import Found, Source
from rethaw.snapshots.tiers.settings import S3Settings

_PART = 8 << 20
_SINGLE = 16 << 20
_CONCURRENT_PARTS = 4
_RETRIES = 4
_RANGE = re.compile(r"\b416\b|InvalidRange|[Rr]ange")
_T = TypeVar("_T")


def _store(settings: S3Settings) -> S3Store:
    timeout = timedelta(seconds=settings.timeout_s)
    keys: dict[str, str] = {}
    if settings.access_key_id and settings.secret_access_key:
        keys = {"access_key_id": settings.access_key_id, "secret_access_key": settings.secret_access_key}
        if settings.session_token:
            keys["session_token"] = settings.session_token
    if settings.endpoint:
        # Both names: the environment's AWS_ENDPOINT_URL_S3 would go over the first.
        keys |= {"endpoint": settings.endpoint, "aws_endpoint_url_s3": settings.endpoint}
    return S3Store(
        settings.bucket,
        region=settings.region,
        virtual_hosted_style_request=False,
        disable_bulk_delete=True,  # not every service has it
        client_options={
            "allow_http": bool(settings.endpoint and settings.endpoint.startswith("http://")),
            "timeout": timeout * 1.1,  # the bound of `_call` comes first and says it better
            "connect_timeout": min(timeout, timedelta(seconds=5)),
        },
        retry_config={
            "max_retries": _RETRIES,
            "retry_timeout": timeout,
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": min(timeout, timedelta(seconds=5))},
        },
        **keys,  # pyright: ignore[reportArgumentType]
    )


class S3Tier:
    """The objects of a bucket below `settings.prefix`."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._prefix = f"{settings.prefix}/" if settings.prefix else ""
        self._store = _store(settings)
        self.label = settings.label

    async def put(self, name: str, data: Source) -> None:
        key = self._prefix + base.check_name(name)
        size = await asyncio.to_thread(base.source_size, data)
        if size <= _SINGLE:
            whole = (
                data
                if isinstance(data, bytes)
                else await asyncio.to_thread(lambda: b"".join(base.chunks(data, _SINGLE)))
            )
            await self._call(
                name, obstore.put_async(self._store, key, whole, use_multipart=False), self._deadline(size)
            )
            return
        problem: list[RethawError] = []

        def parts() -> Iterator[bytes]:
            try:
                yield from base.chunks(data, _PART)
            except RethawError as error:
                problem.append(error)
                raise

        try:
            await self._call(
                name,
                obstore.put_async(
                    self._store,
                    key,
                    parts(),
                    use_multipart=True,
                    chunk_size=_PART,
                    max_concurrency=_CONCURRENT_PARTS,
                ),
                self._deadline(size),
            )
        except Exception as error:
            if problem:
                raise problem[0] from error
            raise

    async def get(self, name: str, offset: int, length: int) -> bytes:
        base.check_range(offset, length)
        key = self._prefix + base.check_name(name)
        deadline = self._deadline(length)
        if length == 0:  # no request can ask for nothing
            await self._long_enough(name, offset, length, deadline)
            return b""
        try:
            data = bytes(
                await self._call(name, obstore.get_range_async(self._store, key, start=offset, length=length), deadline)
            )
        except TierUnavailable as error:
            # obstore has no error of its own for a range beyond the end.
            if error.details["reason"] == "answer" and _RANGE.search(str(error.__cause__)):
                await self._long_enough(name, offset, length, deadline)
            raise
        if len(data) != length:
            await self._long_enough(name, offset, length, deadline)
            raise self._unavailable(
                name,
                f"gave {len(data)} bytes of {length}",
                "try again; if it stays so, look for a proxy between",
                "answer",
            )
        return data

    async def _long_enough(self, name: str, offset: int, length: int, deadline: float) -> None:
        size = (await self._call(name, obstore.head_async(self._store, self._prefix + name), deadline))["size"]
        if offset + length > size:
            raise base.too_short(name, self.label, size, offset, length)

    async def size(self, name: str) -> int:
        key = self._prefix + base.check_name(name)
        return (await self._call(name, obstore.head_async(self._store, key)))["size"]

    async def list(self, prefix: str) -> Sequence[Found]:
        folder = base.check_prefix(prefix)
        pages = obstore.list(self._store, prefix=self._prefix + folder, chunk_size=1000)  # pyright: ignore[reportUnknownMemberType]
        found: list[Found] = []
        while page := await self._call(f"{folder}/*", _next(pages)):
            found += (
                Found(
                    item["path"].removeprefix(self._prefix),
                    item["size"],
                    item["last_modified"].timestamp(),
                    item["e_tag"] or f"{item['last_modified'].timestamp()}-{item['size']}",
                )
                for item in page
            )
        return sorted(found, key=lambda f: f.name)

    async def delete(self, name: str) -> None:
        key = self._prefix + base.check_name(name)
        try:
            await self._call(name, obstore.delete_async(self._store, key))
        except base.ObjectMissing:
            return

    def _deadline(self, size: int = 0) -> float:
        """By asyncio's clock, for a call that begins now and moves `size` bytes."""
        return asyncio.get_running_loop().time() + self._settings.timeout_s * max(1, -(-size // _PART))

    async def _call(self, name: str, call: Awaitable[_T], deadline: float | None = None) -> _T:
        try:
            async with asyncio.timeout_at(deadline or self._deadline()):
                return await call
        except TimeoutError as error:
            raise self._unavailable(
                name,
                f"did not answer within {self._settings.timeout_s:g} s for each 8 MiB",
                "check the network, or raise snapshots.s3.timeout",
                "timeout",
            ) from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._no_bucket(name) from error
            raise base.missing(name, self.label) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise self._refused(name, error) from error
        except (exceptions.BaseError, OSError) as error:
            # Listings come without errors of their own kind.
            if "NoSuchBucket" in str(error):
                raise self._no_bucket(name) from error
            if re.search(r"status code: 40[13]", str(error)):
                raise self._refused(name, error) from error
            raise self._unavailable(
                name, f"does not work: {_said(error)}", "it is tried again later; check the service", "answer"
            ) from error

    def _no_bucket(self, name: str) -> TierUnavailable:
        return self._unavailable(name, "has no such bucket", "create it, or correct its name", "bucket")

    def _refused(self, name: str, error: Exception) -> TierUnavailable:
        return self._unavailable(
            name,
            f"refuses the credentials: {_said(error)}",
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what that key may do",
            "credentials",
        )

    def _unavailable(self, name: str, what: str, remedy: str, reason: str) -> TierUnavailable:
        return TierUnavailable(
            f"object {name}: {self.label} {what}", remedy=remedy, object=name, tier=self.label, reason=reason
        )


async def _next(pages: obstore.ListStream[Sequence[obstore.ObjectMeta]]) -> Sequence[obstore.ObjectMeta]:
    try:
        return await pages.__anext__()
    except StopAsyncIteration:
        return []


def _said(error: Exception) -> str:
    """One line of what the client says: without the dump of its structures, and of an XML body only what it says."""
    text = " ".join(str(error).split("Debug source:")[0].split())
    head = text.split("<?xml")[0].removeprefix("Generic S3 error: ").rstrip(": ")
    found = [m[1] for tag in ("Code", "Message") if (m := re.search(rf"<{tag}>(.*?)</{tag}>", text))]
    said = ": ".join([head, *found])
    return said if len(said) <= 400 else f"{said[:400]}..."
