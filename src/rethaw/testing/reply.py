"""What a scripted provider answers: texts and tool calls, and every way in which a provider fails."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rethaw.model.errors import InvalidInput
from rethaw.testing.conversation import ProviderRequest

Cut = Literal["rst", "close"]


@dataclass(frozen=True)
class TokenUsage:
    """Token counts to report. `cached` is part of `input`."""

    input: int
    output: int
    cached: int = 0


@dataclass(frozen=True)
class Reply:
    """One answer. Times in seconds; a streamed answer is cut into `chunks` pieces of its text (None: about 12
    characters each), with `chunk_s` before each piece but the first.

    Counts of events (`cut_after`, `malformed_after`, `error_after`) are server-sent events already written in full;
    a not streamed answer is cut after half of its bytes.
    """

    text: str = ""
    tool_calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
    refusal: str | None = None
    usage: TokenUsage | None = None  # None: made up from lengths
    model: str | None = None  # None: as asked for
    truncated: bool = False  # ended by the token limit
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])  # unknown fields on top of the answer
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    first_byte_s: float = 0.0  # before the response head
    chunk_s: float = 0.0
    chunks: int | None = None
    ragged: bool = False  # write the stream in 7-byte pieces, whatever its events
    gzip: bool = False  # when not streamed and the client accepts it

    status: int = 200  # anything else: an error in the provider's form
    message: str | None = None
    error_type: str | None = None
    retry_after: float | None = None
    cut: Cut | None = None
    cut_after: int = 0  # 0: before the response head
    malformed_after: int | None = None
    error_after: int | None = None  # an error event in the middle of the stream
    hang: bool = False  # never answer (until the client goes away)
    hold: Callable[[], bool] | None = None  # a streamed answer stops after its first piece until this says True
    raw: bytes | None = None  # the whole body, for other endpoints
    content_type: str = "application/json"

    def with_(self, **changes: Any) -> Reply:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def rate_limited(cls, retry_after: float | None = 1.0, **more: Any) -> Reply:
        return cls(status=429, retry_after=retry_after, **more)

    @classmethod
    def overloaded(cls, retry_after: float | None = None, **more: Any) -> Reply:
        """Anthropic's 529."""
        return cls(status=529, retry_after=retry_after, **more)

    @classmethod
    def server_error(cls, status: int = 500, **more: Any) -> Reply:
        return cls(status=status, **more)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reply:
        """A reply from JSON, field by field; `usage` as {input, output, cached}, `raw` as text."""
        known = set(cls.__dataclass_fields__) - {"hold"}  # a function is not JSON
        if unknown := set(data) - known:
            raise InvalidInput(
                f"a reply has no field {sorted(unknown)[0]!r}", remedy=f"fields: {', '.join(sorted(known))}"
            )
        fields = dict(data)
        if fields.get("usage") is not None:
            fields["usage"] = TokenUsage(**fields["usage"])
        if isinstance(fields.get("raw"), str):
            fields["raw"] = fields["raw"].encode()
        return cls(**fields)


Answer = Reply | str
Script = Callable[[ProviderRequest], Answer | Awaitable[Answer]]


def in_order(replies: Sequence[Answer | Script]) -> Script:
    """Each call takes the next of `replies`, whatever it asks."""
    left = list(replies)
    total = len(left)

    def script(request: ProviderRequest) -> Answer | Awaitable[Answer]:
        if not left:
            return Reply(status=400, message=f"the script had {total} replies and this is call {request.n}")
        item = left.pop(0)
        return item(request) if callable(item) else item

    return script


def by_turn(replies: Sequence[Answer | Script]) -> Script:
    """Reply number k goes to a conversation in which the model answered k times already. A pure function of the
    conversation: a call that is issued again gets the same answer."""
    items = list(replies)

    def script(request: ProviderRequest) -> Answer | Awaitable[Answer]:
        k = request.assistant_turns
        if k >= len(items):
            return Reply(status=400, message=f"the script has {len(items)} turns and the model answered {k} times")
        item = items[k]
        return item(request) if callable(item) else item

    return script


def matching(rules: Sequence[tuple[str, Answer | Script]]) -> Script:
    """The first rule whose pattern (regular expression) is found in the conversation's last text."""
    compiled = [(re.compile(pattern, re.DOTALL), item) for pattern, item in rules]

    def script(request: ProviderRequest) -> Answer | Awaitable[Answer]:
        for pattern, item in compiled:
            if pattern.search(request.last_text):
                return item(request) if callable(item) else item
        return Reply(status=400, message=f"no rule of the script fits {request.last_text[:80]!r}")

    return script


def echo(request: ProviderRequest) -> Reply:
    """Says what the user said, with the number of turns so far."""
    return Reply(f"{request.assistant_turns}: {request.last_text}")


async def answer(script: Script, request: ProviderRequest) -> Reply:
    """What `script` says to `request`."""
    result = script(request)
    if inspect.isawaitable(result):
        result = await result
    return Reply(result) if isinstance(result, str) else result


def pieces(text: str, chunks: int | None, size: int = 12) -> list[str]:
    """`text` in `chunks` parts of about equal length (at most one a character), or in parts of `size`."""
    if not text:
        return []
    if chunks is not None:
        size = -(-len(text) // max(1, min(chunks, len(text))))
    return [text[i : i + size] for i in range(0, len(text), size)]
