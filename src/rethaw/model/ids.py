"""Ids: a short prefix that says what it is, then 20 time-ordered base32 characters. Generations are plain UUIDs."""

from __future__ import annotations

import os
import threading
import time
import uuid

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """A new id such as `s_01k3...`: 48 bits of milliseconds, 52 random bits, sortable by age.

    Prefixes: `s` session, `x` exchange, `snap` snapshot, `m` message, `sig` signal, `n` node, `sb` sandbox, `c` callback.
    """
    global _last
    with _lock:
        now = max(int(time.time() * 1000), _last)
        _last = now
    value = (now << 52) | (int.from_bytes(os.urandom(7), "big") & ((1 << 52) - 1))
    out: list[str] = []
    for _ in range(20):
        out.append(_ALPHABET[value & 31])
        value >>= 5
    return f"{prefix}_{''.join(reversed(out))}"


def is_whole(text: str, prefix: str) -> bool:
    """Whether `text` has the form of an id, with nothing cut off."""
    body = text.removeprefix(prefix + "_")
    return len(body) == 20 and len(text) > 20 and not body.strip(_ALPHABET)


def new_generation() -> str:
    """A fresh generation: the fence of one boot or restore."""
    return str(uuid.uuid4())
