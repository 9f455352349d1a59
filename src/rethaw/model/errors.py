"""Every error Rethaw raises. One root; each message says what was wrong, with which value, and what to do.

Standard library only, Python >= 3.9: the guest imports this module.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost every sandbox's PID 1 memory and time
if TYPE_CHECKING:
    from typing import Any, Dict, Optional  # noqa: UP035 - the guest may run Python 3.9


class RethawError(Exception):
    """Root of all errors raised by Rethaw.

    `code` is stable and machine-readable (it travels over HTTP), `status` the HTTP status that fits,
    `exit_code` what the CLI exits with, `remedy` what the reader can do, `details` the values involved.
    """

    code: str = "error"
    status: int = 500
    exit_code: int = 1

    def __init__(self, message: str = "", *, remedy: Optional[str] = None, **details: Any) -> None:  # noqa: UP045
        super().__init__(message)
        self.message: str = message
        self.remedy: Optional[str] = remedy  # noqa: UP045
        self.details: Dict[str, Any] = details  # noqa: UP006

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class InvalidInput(RethawError):
    """A value from outside does not fit."""

    code, status, exit_code = "invalid_input", 422, 2


class NotFound(RethawError):
    """A name or id that nothing here carries."""

    code, status, exit_code = "not_found", 404, 4


class AmbiguousId(RethawError):
    """A prefix that fits more than one id."""

    code, status, exit_code = "ambiguous_id", 409, 4


class Conflict(RethawError):
    """The thing exists already, or is in a state that does not allow this."""

    code, status, exit_code = "conflict", 409, 5


class SessionEnded(Conflict):
    """The session has ended: nothing reaches it any more."""

    code, status = "session_ended", 410


class PortClosed(RethawError):
    """Nothing listens on that port of the sandbox."""

    code, status, exit_code = "port_closed", 502, 6


class KeyReused(Conflict):
    """An idempotency key came back with other arguments."""

    code = "key_reused"


class Unauthorized(RethawError):
    """The token is missing or wrong."""

    code, status, exit_code = "unauthorized", 401, 3


class Forbidden(RethawError):
    """A link that is forged, has expired or is for something else."""

    code, status, exit_code = "forbidden", 403, 3


class TooLarge(RethawError):
    """A payload over its limit."""

    code, status, exit_code = "too_large", 413, 2


class Fenced(RethawError):
    """The writer's generation is not the session's any more: another life owns the session now."""

    code, status, exit_code = "fenced", 409, 5


class Unavailable(RethawError):
    """A part Rethaw needs (database, node, server) does not answer right now."""

    code, status, exit_code = "unavailable", 503, 6


class WaitTimeout(RethawError, TimeoutError):
    """A wait, receive or result ran out of its time."""

    code, status, exit_code = "wait_timeout", 408, 7


class EngineError(RethawError):
    """An engine failed to boot, save, restore or destroy a sandbox."""

    code, status, exit_code = "engine_failed", 500, 8


class EngineUnusable(EngineError):
    """The engine cannot run here: it is missing, too old, or its probe guest did not come back."""

    code = "engine_unusable"


class EngineMismatch(EngineError):
    """A snapshot needs an engine build, CPU feature or image that is not here. Raised before any page is read."""

    code, status = "engine_mismatch", 409


class QuiesceTimeout(EngineError):
    """The guest did not become quiet in time; it was left running."""

    code = "quiesce_timeout"


class ImageError(RethawError):
    """An image could not be built or is not what it should be."""

    code, status, exit_code = "image_failed", 422, 9


class SnapshotUnusable(RethawError):
    """A snapshot's bytes are missing or damaged. Names the snapshot and the file."""

    code, status, exit_code = "snapshot_unusable", 409, 10


class StorageFull(RethawError):
    """No room left on the disk or in the staging area."""

    code, status, exit_code = "storage_full", 507, 11


class KeyMissing(RethawError):
    """A snapshot is encrypted with a key that is not configured. Names the key's id and the setting."""

    code, status, exit_code = "key_missing", 409, 10


class ObjectMissing(RethawError):
    """An object is not in its tier. Names the object and the tier."""

    code, status, exit_code = "object_missing", 404, 10


class ObjectDamaged(RethawError):
    """An object is there but has another length or content than it should. Names the object and the tier."""

    code, status, exit_code = "object_damaged", 409, 10


class TierUnavailable(Unavailable):
    """A tier of the snapshot store does not take or give objects right now: down, too slow, or it refuses the
    credentials. Names the object and the tier; the same call may work later."""

    code = "tier_unavailable"


class ChannelBroken(RethawError):
    """The byte stream to a guest ended or carried a malformed frame."""

    code, exit_code = "channel_broken", 1


class ProviderError(RethawError):
    """A model provider is unknown or not configured (the provider's own answers pass through, they are no errors)."""

    code, status, exit_code = "provider", 424, 12


class SessionFailed(RethawError):
    """A session ended without a result. `reason` is a `rethaw.model.enums.Reason` value."""

    code, status, exit_code = "session_failed", 409, 1


class ChildFailed(SessionFailed):
    """A child ended without a result. `details` has its id as `child`, and `state`, `reason` and `detail`."""

    code = "child_failed"


class NoRetry(RethawError):
    """Raised by an agent: it has failed, and trying again would not help. Its retries are not used."""

    code, status, exit_code = "no_retry", 409, 1


def by_code(code: str) -> type:
    """The error class that carries `code`; `RethawError` itself for an unknown one."""
    stack = [RethawError]
    while stack:
        cls = stack.pop()
        if cls.code == code:
            return cls
        stack.extend(cls.__subclasses__())
    return RethawError
