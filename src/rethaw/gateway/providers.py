"""Model providers: where they are, how they authenticate, which of their endpoints are model calls."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from rethaw.model.errors import InvalidInput, ProviderError

Format = Literal["openai", "anthropic", "raw"]
_FORMATS = ("openai", "anthropic", "raw")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELDS = {"base_url", "key_env", "key", "auth", "format", "model_calls", "proxy"}

# (method, path glob) of the endpoints that generate: these alone are gated by snapshots and held
_MODEL_CALLS: dict[str, tuple[str, ...]] = {
    "openai": ("/v1/chat/completions", "/v1/responses", "/v1/completions"),
    "anthropic": ("/v1/messages",),
    "raw": ("*",),
}
_BUILT_IN: dict[str, dict[str, Any]] = {
    "openai": {
        "base_url": "https://api.openai.com",
        "key_env": "OPENAI_API_KEY",
        "auth": "bearer",
        "format": "openai",
    },
    "anthropic": {
        "base_url": "https://api.anthropic.com",
        "key_env": "ANTHROPIC_API_KEY",
        "auth": "x-api-key",
        "format": "anthropic",
    },
}


@dataclass(frozen=True)
class Provider:
    """One provider. `base_url` without trailing slash; `auth_header` None when the provider takes no key."""

    name: str
    base_url: str
    format: Format
    auth_header: str | None
    auth_value: str | None  # None while no key is known
    key_source: str  # for messages: where the key is looked for
    model_calls: tuple[str, ...]
    proxy: str | None = None

    def url(self, path: str, query: str) -> str:
        """The upstream URL. A `base_url` that ends in /v1, as clients write it, is not doubled."""
        base = self.base_url
        if base.endswith("/v1") and (path == "/v1" or path.startswith("/v1/")):
            base = base[: -len("/v1")]
        return base + path + (f"?{query}" if query else "")

    def is_model_call(self, method: str, path: str) -> bool:
        """Whether the endpoint generates (POST to one of `model_calls`)."""
        return method == "POST" and any(fnmatch.fnmatchcase(path, glob) for glob in self.model_calls)

    @property
    def ready(self) -> bool:
        return self.auth_header is None or self.auth_value is not None


class Providers:
    """All providers of a node by name."""

    def __init__(self, providers: Iterable[Provider]) -> None:
        self._by_name = {p.name: p for p in providers}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Mapping[str, Any]] | None = None, env: Mapping[str, str] | None = None
    ) -> Providers:
        """From the `[providers.NAME]` tables of rethaw.toml over the built-in ones, keys from `env` (the process's
        own by default). Raises InvalidInput naming the table and field that does not fit."""
        env = os.environ if env is None else env
        config = config or {}
        tables: dict[str, dict[str, Any]] = {name: dict(table) for name, table in _BUILT_IN.items()}
        for name, table in config.items():
            tables[name] = {**tables.get(name, {}), **_checked(name, table)}
        return cls(_provider(name, table, env) for name, table in tables.items())

    def names(self) -> list[str]:
        return sorted(self._by_name)

    def get(self, name: str) -> Provider:
        """The provider, with its key. Raises ProviderError naming what is missing and the remedy."""
        provider = self._by_name.get(name)
        if provider is None:
            raise ProviderError(
                f"there is no provider {name!r} (known: {', '.join(self.names())})",
                remedy=f"add [providers.{name}] with base_url to rethaw.toml on the server",
                provider=name,
                missing="provider",
            )
        if not provider.ready:
            raise ProviderError(
                f"provider {name!r} has no key",
                remedy=f"set {provider.key_source} where the server runs, or key_env in [providers.{name}], and restart",
                provider=name,
                missing="key",
            )
        return provider

    def format_of(self, name: str) -> Format | None:
        """The wire format of a provider, ready or not; None for an unknown one."""
        provider = self._by_name.get(name)
        return provider.format if provider else None


def _checked(name: str, table: object) -> dict[str, Any]:
    where = f"[providers.{name}]"
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} is not a provider name", remedy="use lower-case letters, digits, - and _")
    if not isinstance(table, Mapping):
        raise InvalidInput(f"{where} is not a table", remedy=f'write {where} and base_url = "https://..." below it')
    fields = cast("Mapping[str, Any]", table)
    unknown = sorted(set(fields) - _FIELDS)
    if unknown:
        raise InvalidInput(
            f"{where} has an unknown field {unknown[0]!r}", remedy=f"known: {', '.join(sorted(_FIELDS))}"
        )
    return dict(fields)


def _provider(name: str, table: Mapping[str, Any], env: Mapping[str, str]) -> Provider:
    where = f"[providers.{name}]"

    def text(field: str) -> str | None:
        value = table.get(field)
        if value is not None and not isinstance(value, str):
            raise InvalidInput(f"{field} = {value!r} in {where} is not text", remedy="write it in quotes")
        return value

    base_url = text("base_url")
    if not base_url or not re.fullmatch(r"https?://[^\s/?#@\\]+(/[^\s?#\\]*)?", base_url):
        raise InvalidInput(
            f"base_url = {base_url!r} in {where} is not a base URL",
            remedy='write it like "https://host/path", without query, user or password',
        )
    fmt = text("format") or "raw"
    if fmt not in _FORMATS:
        raise InvalidInput(f"format = {fmt!r} in {where} is unknown", remedy=f"use one of {', '.join(_FORMATS)}")
    auth = text("auth") or ("x-api-key" if fmt == "anthropic" else "bearer")
    kind, _, custom = auth.partition(":")
    if auth not in ("bearer", "x-api-key", "none") and not (kind == "header" and _HEADER.fullmatch(custom)):
        raise InvalidInput(
            f"auth = {auth!r} in {where} is unknown", remedy="use bearer, x-api-key, header:NAME or none"
        )
    key_env = text("key_env")
    key = text("key") or (env.get(key_env) if key_env else None) or None
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise InvalidInput(
            f"the key of {where} has spaces or other characters that a header cannot carry",
            remedy=f"check {key_env or 'key'}",
        )
    globs = table.get("model_calls", _MODEL_CALLS[fmt])
    if isinstance(globs, str) or not all(isinstance(g, str) for g in globs):
        raise InvalidInput(f"model_calls = {globs!r} in {where} is not a list", remedy='write ["/path/*", ...]')
    header = {"bearer": "Authorization", "x-api-key": "x-api-key", "none": None}.get(auth, custom)
    value = None if key is None else f"Bearer {key}" if auth == "bearer" else key
    return Provider(
        name=name,
        base_url=base_url.rstrip("/"),
        format=fmt,
        auth_header=header,
        auth_value=value,
        key_source=key_env or f"key in [providers.{name}]",
        model_calls=tuple(cast("Iterable[str]", globs)),
        proxy=text("proxy"),
    )
