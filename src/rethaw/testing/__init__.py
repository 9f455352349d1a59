"""For tests of agents and of Rethaw itself: a scripted model provider, a real server in a temporary place, crashes.

Names load when they are first used: the provider needs aiohttp, the server nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rethaw.testing.provider import Call, ProviderRequest, Reply, ScriptedProvider, TokenUsage, by_turn, in_order
    from rethaw.testing.server import RunningServer

__all__ = ["Call", "ProviderRequest", "Reply", "RunningServer", "ScriptedProvider", "TokenUsage", "by_turn", "in_order"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = "server" if name == "RunningServer" else "provider"
    return getattr(import_module(f"rethaw.testing.{home}"), name)
