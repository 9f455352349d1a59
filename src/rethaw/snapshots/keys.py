"""Encryption at rest: AES-256-GCM over each frame, under a key of its own for each pack.

    master key      32 bytes from the configuration; its id is the first 8 bytes of a SHA-256 over it, in hex
    pack's key      HKDF-SHA256(master key, info = b"rethaw pack " + pack id)
    nonce           the frame's number in its pack, 12 bytes big-endian
    bound data      pack id + the same 12 bytes: a frame that was moved or renamed does not open
    sealed frame    ciphertext + 16 bytes of tag, so `OVERHEAD` bytes longer than the frame

A nonce must never come twice under one key. So a pack id is used for one pack only (ids are random), and a writer that
starts a pack anew takes a new id. What a pack needs to be opened is the key's id, which its header keeps in clear.

After a rotation the old keys stay configured until no snapshot needs them; nothing is written under them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from rethaw.model.errors import InvalidInput, KeyMissing, SnapshotUnusable

KEY_BYTES = 32
OVERHEAD = 16
MAX_FRAMES = 1 << 32  # far below what one key may seal, far above what one pack holds
ENVIRONMENT = "RETHAW_SNAPSHOT_KEY"
_MAX_KEY_FILE = 4096
_REMEDY = "write 32 bytes raw, 64 hexadecimal digits or base64; make one with: head -c 32 /dev/urandom"


def key_id(key: bytes) -> str:
    """The public name of a key: 16 hexadecimal digits that say nothing about it."""
    return hashlib.sha256(b"rethaw snapshot key\0" + key).hexdigest()[:16]


def parse_key(data: bytes, where: str) -> bytes:
    """The 32 bytes that `data` holds: raw, or 64 hexadecimal digits, or base64. Raises InvalidInput naming `where`,
    never the key."""
    if len(data) == KEY_BYTES:
        return data
    text = data.strip()
    if re.fullmatch(rb"[0-9A-Fa-f]{64}", text):
        return bytes.fromhex(text.decode())
    try:
        key = base64.b64decode(text.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidInput(f"{where} holds no key ({len(data)} bytes)", remedy=_REMEDY)
    return key


def read_key(path: Path, where: str) -> bytes:
    """The key in the file `path`, which the setting `where` names. Raises InvalidInput naming both."""
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_KEY_FILE)
    except OSError as error:
        raise InvalidInput(f"{where} = {str(path)!r} cannot be read: {error.strerror}", remedy=_REMEDY) from error
    return parse_key(data, f"{where} = {str(path)!r}")


@lru_cache(maxsize=256)
def _cipher(master: bytes, pack: str) -> AESGCM:
    derived = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"rethaw pack " + pack.encode()).derive(master)
    return AESGCM(derived)


def _nonce(frame: int) -> bytes:
    if not 0 <= frame < MAX_FRAMES:
        raise InvalidInput(f"frame number {frame} does not fit", remedy=f"a pack has at most {MAX_FRAMES} frames")
    return frame.to_bytes(12, "big")


class Keyring:
    """The key that new packs are sealed with, and older ones that can still be opened. `active` None: new packs are not
    encrypted. Threads may share it."""

    def __init__(self, active: bytes | None = None, old: Sequence[bytes] = ()) -> None:
        for key in (*([active] if active is not None else []), *old):
            if len(key) != KEY_BYTES:
                raise InvalidInput(f"a snapshot key has {len(key)} bytes, {KEY_BYTES} are needed", remedy=_REMEDY)
        self._keys = {key_id(key): key for key in (*old, *([active] if active is not None else []))}
        self._active = key_id(active) if active is not None else None

    @classmethod
    def load(
        cls, key_file: Path | None = None, old_files: Sequence[Path] = (), env: Mapping[str, str] | None = None
    ) -> Keyring:
        """From the files of `[snapshots]`; RETHAW_SNAPSHOT_KEY goes over `key_file`. Raises InvalidInput."""
        given = (os.environ if env is None else env).get("RETHAW_SNAPSHOT_KEY")
        if given:
            active = parse_key(given.encode(), f"{ENVIRONMENT} (environment)")
        else:
            active = read_key(key_file, "snapshots.encryption_key_file") if key_file is not None else None
        return cls(active, [read_key(path, "snapshots.old_key_files") for path in old_files])

    def reveal(self) -> dict[str, Any]:
        """All keys as JSON, for a process of ours; never for a log."""
        return {"active": self._active, "keys": {name: key.hex() for name, key in self._keys.items()}}

    def __repr__(self) -> str:
        return f"Keyring(active={self._active}, known={sorted(self._keys)})"

    @property
    def active(self) -> str | None:
        """Id of the key that `seal` uses, for the pack's header. None: packs are written in clear."""
        return self._active

    def knows(self, key: str) -> bool:
        return key in self._keys

    def seal(self, pack: str, frame: int, data: bytes | bytearray | memoryview) -> bytes:
        """Encrypt frame number `frame` of `pack` with the active key. At most once for each (pack, frame)."""
        if self._active is None:
            raise KeyMissing("there is no key to encrypt with", remedy="set snapshots.encryption_key_file")
        nonce = _nonce(frame)
        return _cipher(self._keys[self._active], pack).encrypt(nonce, data, pack.encode() + nonce)

    def open(self, key: str, pack: str, frame: int, data: bytes | bytearray | memoryview) -> bytes:
        """What `seal` was given. `key` is the id from the pack's header.

        Raises KeyMissing when that key is not configured, SnapshotUnusable when the bytes are not what was sealed.
        """
        self.require(key, pack)
        nonce = _nonce(frame)
        try:
            return _cipher(self._keys[key], pack).decrypt(nonce, data, pack.encode() + nonce)
        except InvalidTag as error:
            raise SnapshotUnusable(
                f"frame {frame} of pack {pack} does not open with the key {key}: its bytes are damaged",
                remedy="an older snapshot is used instead",
                file=pack,
                key=key,
            ) from error

    def require(self, key: str, pack: str) -> None:
        """Raises KeyMissing unless `key` is configured; `pack` is what needs it."""
        if key not in self._keys:
            raise KeyMissing(
                f"pack {pack} is encrypted with the key {key}, which is not configured",
                remedy=f"name its file in snapshots.encryption_key_file or snapshots.old_key_files (or {ENVIRONMENT})",
                key=key,
                pack=pack,
            )
