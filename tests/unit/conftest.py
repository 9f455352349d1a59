"""Fixtures of the unit tests."""

from store_fixtures import swept

__all__ = ["swept"]
