"""When a provider says "later": what counts as that, and when to try again."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Sequence
from datetime import UTC

from rethaw.gateway.usage import decode, header

BACKOFF_S = 1.0  # first pause when the provider names none
BACKOFF_MAX_S = 60.0
PEEK = 64 << 10  # of a 429's body, to see whether waiting helps at all
# Said with 429, but no waiting mends them: the account must be looked after
_HOPELESS = (b"insufficient_quota", b"billing_hard_limit_reached", b"billing_not_active", b"access_terminated")


def retry_after(headers: Sequence[tuple[str, str]]) -> float | None:
    """Seconds that the provider asks to wait (retry-after-ms, or retry-after in seconds or as a date); None if it does
    not say, or nothing that can be understood."""
    ms = header(headers, "retry-after-ms")
    value = header(headers, "retry-after")
    try:
        if ms is not None:
            return _sane(float(ms) / 1000)
        if value is None:
            return None
        try:
            return _sane(float(value))
        except ValueError:
            when = email.utils.parsedate_to_datetime(value)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            return _sane(max(0.0, when.timestamp() - time.time()))
    except (ValueError, TypeError, OverflowError):
        return None


def _sane(value: float) -> float | None:
    return value if 0 <= value < 1e9 else None


def says_later(status: int, headers: Sequence[tuple[str, str]]) -> bool:
    """429 and 529, and 503 with a time; unless the provider says that trying again is of no use."""
    if (header(headers, "x-should-retry") or "").lower() == "false":
        return False
    return status in (429, 529) or (status == 503 and retry_after(headers) is not None)


def hopeless(headers: Sequence[tuple[str, str]], body: bytes) -> bool:
    """Whether the beginning of a 429's body says that waiting does not help."""
    plain = decode(body, header(headers, "content-encoding")) or b""
    return any(word in plain for word in _HOPELESS)


def pause(tries: int, asked: float | None) -> float:
    """Seconds until the next try: what the provider asked for, else 1, 2, 4 .. 60."""
    return asked if asked is not None else min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** min(tries - 1, 10))


def jitter(pause_s: float) -> float:
    """Some seconds more at random, so that many sessions do not come back at once."""
    return random.uniform(0, min(1.0, 0.1 * pause_s + 0.02))
