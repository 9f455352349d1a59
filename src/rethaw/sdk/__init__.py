"""The SDK: agent definitions, images, and clients of a Rethaw server. Names load when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.agents import Agent, agent
    from rethaw.sdk.asession import AsyncSession
    from rethaw.sdk.client import Client
    from rethaw.sdk.images import Image
    from rethaw.sdk.session import Session

__all__ = ["Agent", "AsyncClient", "AsyncSession", "Client", "Image", "Session", "agent"]

_WHERE = {
    "Agent": "agents",
    "agent": "agents",
    "AsyncClient": "aclient",
    "AsyncSession": "aclient",
    "Client": "client",
    "Image": "images",
    "Session": "client",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import os
    from importlib import import_module

    if "RETHAW_SOCKET" in os.environ and name in ("Agent", "Image", "agent"):  # their light form in sandboxes
        return getattr(import_module("rethaw"), name)
    return getattr(import_module(f"rethaw.sdk.{_WHERE[name]}"), name)
