"""Rethaw: AI agents that survive anything."""

__version__ = "0.1.0"
