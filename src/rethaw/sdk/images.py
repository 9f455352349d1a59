"""What an agent's sandbox is made of, written as a chain: `Image.debian().apt_install("jq").pip_install("openai")`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rethaw.model.errors import InvalidInput

if TYPE_CHECKING:
    from rethaw.model.types import ImageSpec

SUITES = ("bookworm",)
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.:=~_-]*", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Image:
    """An image's recipe; immutable, each method returns a new one. Equal recipes are one image on the server.

    The base is Debian with python3, git, ca-certificates and ripgrep.
    """

    suite: str = "bookworm"
    apt: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @classmethod
    def debian(cls, suite: str = "bookworm") -> Image:
        """Debian `suite`. Raises InvalidInput for one that cannot be built."""
        if suite not in SUITES:
            raise InvalidInput(f"there is no image of Debian {suite!r}", remedy=f"use {' or '.join(SUITES)}")
        return cls(suite=suite)

    def apt_install(self, *packages: str) -> Image:
        """Debian packages on top."""
        for name in packages:
            if not _PACKAGE.fullmatch(name):
                raise InvalidInput(f"{name!r} is not a Debian package name", remedy="pass one name per argument")
        return replace(self, apt=(*self.apt, *packages))

    def pip_install(self, *requirements: str) -> Image:
        """Python packages for the image's own python3, as requirement specifiers ("openai>=2")."""
        for text in requirements:
            if not text.strip() or text.lstrip().startswith("-") or "\n" in text:
                raise InvalidInput(f"{text!r} is not a requirement", remedy='write it like "openai>=2"')
        return replace(self, pip=(*self.pip, *(text.strip() for text in requirements)))

    def env(self, variables: dict[str, str] | None = None, /, **more: str) -> Image:
        """Environment variables of everything that runs in it. No secrets: snapshots keep them."""
        merged = {**dict(self.environment), **checked_env(variables or {}), **checked_env(more)}
        return replace(self, environment=tuple(sorted(merged.items())))

    @property
    def bare_of_packages(self) -> bool:
        """True when nothing was installed that pydantic could come with."""
        return not self.pip and not any(name.startswith("python3-") for name in self.apt)

    @property
    def spec(self) -> ImageSpec:
        """The wire form."""
        from rethaw.model.types import ImageSpec

        return ImageSpec(suite=self.suite, apt=self.apt, pip=self.pip, env=dict(self.environment))


def checked_env(variables: dict[str, str]) -> dict[str, str]:
    """`variables`, or InvalidInput naming the one that no process could be given."""
    for name, value in variables.items():
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is not an environment variable's name", remedy="use letters, digits and _")
        if not isinstance(value, str) or "\0" in value:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidInput(f"environment variable {name} = {value!r} is not text", remedy="pass a string")
    return dict(variables)
