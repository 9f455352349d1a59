"""For tests of agents and of Rethaw itself: a scripted model provider, a real server in a temporary place, crashes.

Names load when they are first used: the provider needs aiohttp, the server nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rethaw.testing.agents import AgentServer
    from rethaw.testing.model import ScriptedModel
    from rethaw.testing.provider import Call, ProviderRequest, Reply, ScriptedProvider, TokenUsage, by_turn, in_order
    from rethaw.testing.server import RunningServer

__all__ = [
    "AgentServer", "Call", "ProviderRequest", "Reply", "RunningServer", "ScriptedModel", "ScriptedProvider", "TokenUsage",
    "by_turn", "in_order",
]  # fmt: skip
_WHERE = {"AgentServer": "agents", "RunningServer": "server", "ScriptedModel": "model"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rethaw.testing.{_WHERE.get(name, 'provider')}"), name)
