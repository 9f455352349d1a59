"""Rethaw: AI agents that survive anything.

Names load when they are first used, so that `import rethaw` in a sandbox needs only the standard library.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's constant, without importing typing
if TYPE_CHECKING:
    from typing import Any

    from rethaw.guest.acontext import AsyncContext
    from rethaw.guest.children import AsyncChild, Child
    from rethaw.guest.context import Context
    from rethaw.guest.local import AsyncLocalContext, LocalContext
    from rethaw.guest.protocol import Message, Signal
    from rethaw.guest.waiting import Fork, Timer
    from rethaw.model import errors
    from rethaw.model.errors import (
        AmbiguousId,
        ChannelBroken,
        ChildFailed,
        Conflict,
        EngineError,
        EngineMismatch,
        EngineUnusable,
        Fenced,
        ImageError,
        InvalidInput,
        KeyReused,
        NoRetry,
        NotFound,
        ProviderError,
        QuiesceTimeout,
        RethawError,
        SessionFailed,
        SnapshotUnusable,
        StorageFull,
        TooLarge,
        Unauthorized,
        Unavailable,
        WaitTimeout,
    )
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.agents import Agent, agent
    from rethaw.sdk.asession import AsyncSession
    from rethaw.sdk.client import Client
    from rethaw.sdk.images import Image
    from rethaw.sdk.limits import Budget, Retries
    from rethaw.sdk.session import Session

_ERRORS = (
    "AmbiguousId", "ChannelBroken", "ChildFailed", "Conflict", "EngineError", "EngineMismatch", "EngineUnusable", "Fenced",
    "ImageError", "InvalidInput", "KeyReused", "NoRetry", "NotFound", "ProviderError", "QuiesceTimeout", "RethawError",
    "SessionFailed", "SnapshotUnusable", "StorageFull", "TooLarge", "Unauthorized", "Unavailable", "WaitTimeout",
)  # fmt: skip
_WHERE = {
    "Agent": "rethaw.sdk.agents",
    "agent": "rethaw.sdk.agents",
    "AsyncChild": "rethaw.guest.children",
    "AsyncClient": "rethaw.sdk.aclient",
    "AsyncContext": "rethaw.guest.acontext",
    "AsyncLocalContext": "rethaw.guest.local",
    "AsyncSession": "rethaw.sdk.asession",
    "Budget": "rethaw.sdk.limits",
    "Child": "rethaw.guest.children",
    "Client": "rethaw.sdk.client",
    "Context": "rethaw.guest.context",
    "Fork": "rethaw.guest.waiting",
    "Image": "rethaw.sdk.images",
    "LocalContext": "rethaw.guest.local",
    "Message": "rethaw.guest.protocol",
    "Retries": "rethaw.sdk.limits",
    "Session": "rethaw.sdk.session",
    "Signal": "rethaw.guest.protocol",
    "Timer": "rethaw.guest.waiting",
    **dict.fromkeys(_ERRORS, "rethaw.model.errors"),
}
_IN_GUEST = (
    "Agent",
    "agent",
    "Budget",
    "Image",
    "Retries",
)  # these have a light form in sandboxes, where the SDK is not

__all__ = [
    "Agent", "AmbiguousId", "AsyncChild", "AsyncClient", "AsyncContext", "AsyncLocalContext", "AsyncSession", "Budget", "ChannelBroken", "Child",
    "ChildFailed", "Client", "Conflict",
    "Context", "EngineError", "EngineMismatch", "EngineUnusable", "Fenced", "Fork", "Image", "ImageError", "InvalidInput",
    "KeyReused", "LocalContext", "Message", "NoRetry", "NotFound", "ProviderError", "QuiesceTimeout", "RethawError", "Retries", "Session", "SessionFailed",
    "Signal", "SnapshotUnusable", "StorageFull", "Timer", "TooLarge", "Unauthorized", "Unavailable", "WaitTimeout",
    "__version__", "agent", "errors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib
    import os

    if name == "errors":
        return importlib.import_module("rethaw.model.errors")
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'rethaw' has no attribute {name!r}")
    inside = "RETHAW_SOCKET" in os.environ
    if inside and name in _IN_GUEST:
        where = "rethaw.guest.definitions"
    try:
        value = getattr(importlib.import_module(where), name)
    except ModuleNotFoundError as error:
        if inside and where.startswith("rethaw.sdk"):
            raise AttributeError(f"rethaw.{name} is not available inside a sandbox") from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
