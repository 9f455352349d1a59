"""Exchanges and responses between rows and types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rethaw.log import encoding
from rethaw.model.enums import ExchangeState
from rethaw.model.errors import InvalidInput
from rethaw.model.types import Chunk, Exchange, RequestMeta, ResponseHead, Usage
from rethaw.model.wire import Wire

COLUMNS = "id, session, attempt, line, seq, meta, request_bytes, state, epoch, owner, usage, head, received"


def dump(value: Wire | None) -> str | None:
    """JSON of a wire type in ASCII, so that any string fits into a text column."""
    return None if value is None else json.dumps(value.model_dump(), separators=(",", ":"))


def exchange_of(row: Sequence[Any]) -> Exchange:
    """From the columns of the view exchange_rows."""
    ident, session, attempt, line, seq, meta, request_bytes, state, epoch, owner, usage, head, received = row
    return Exchange(
        id=ident, session=session, attempt=attempt, line=line, seq=seq, request_bytes=request_bytes,
        meta=RequestMeta.model_validate(json.loads(meta)), state=ExchangeState(state), epoch=epoch, owner=owner,
        head=None if head is None else ResponseHead.model_validate(json.loads(head)), received=received,
        usage=None if usage is None else Usage.model_validate(json.loads(usage)),
    )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Consecutive chunks as one row."""

    start: int
    size: int
    codec: int
    data: bytes
    lens: list[int]
    ats: list[int]


def batch(chunks: Sequence[Chunk], after: int) -> Batch:
    """`chunks` without what lies before `after`, as one row. Raises InvalidInput when they leave a gap."""
    kept: list[Chunk] = []
    expected = chunks[0].offset if chunks else 0
    for chunk in chunks:
        if chunk.offset != expected:
            raise InvalidInput(f"a response chunk at {chunk.offset} does not follow the one that ends at {expected}")
        expected += len(chunk.data)
        if expected > after:
            cut = max(0, after - chunk.offset)
            kept.append(Chunk(offset=chunk.offset + cut, data=chunk.data[cut:], at_us=chunk.at_us) if cut else chunk)
    data = b"".join(c.data for c in kept)
    codec, stored = encoding.pack(data)
    start = kept[0].offset if kept else expected
    return Batch(start, len(data), codec, stored, [len(c.data) for c in kept], [c.at_us for c in kept])


def chunks_of(start: int, data: bytes, lens: Sequence[int], ats: Sequence[int], offset: int) -> list[Chunk]:
    """The chunks of one row that reach beyond `offset`, the first one cut there."""
    out: list[Chunk] = []
    pos = 0
    for length, at in zip(lens, ats, strict=True):
        begin = max(pos, offset - start)
        if begin < pos + length:
            out.append(Chunk(offset=start + begin, data=data[begin : pos + length], at_us=at))
        pos += length
    return out
