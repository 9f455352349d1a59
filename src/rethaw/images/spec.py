"""Names images by what they are made of."""

from __future__ import annotations

import hashlib
import json
import platform
import re

from rethaw.model.errors import InvalidInput
from rethaw.model.types import ImageSpec

FORMAT = 1  # of the root filesystems; a change builds every image anew
BASE_PACKAGES = ("ca-certificates", "git", "python3", "ripgrep")
SUITES = {"bookworm": "3.11"}  # suite: version of its python3
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+)?")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:\[[A-Za-z0-9,._ -]*\])?\s*(?:[<>=!~].*)?(?:;.*)?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check(spec: ImageSpec) -> None:
    """Raises InvalidInput naming the first value that cannot be part of an image."""
    if spec.suite not in SUITES:
        raise InvalidInput(f"{spec.suite!r} is not a known suite", remedy=f"use {' or '.join(sorted(SUITES))}")
    for package in spec.apt:
        if not _PACKAGE.fullmatch(package):
            raise InvalidInput(f"{package!r} is not a Debian package name", remedy='write it like "curl"')
    for requirement in spec.pip:
        if not _REQUIREMENT.fullmatch(requirement) or "\n" in requirement:
            raise InvalidInput(f"{requirement!r} is not a requirement", remedy='write it like "httpx>=0.27"')
    for name, value in spec.env.items():
        if not _ENV_NAME.fullmatch(name) or "\0" in value:
            raise InvalidInput(f"{name!r} is not an environment variable", remedy="use letters, digits and _")


def base_digest(spec: ImageSpec) -> str:
    """sha256 hex of the Debian layer: suite and packages."""
    packages = sorted({*BASE_PACKAGES, *spec.apt})
    return _digest(["base", FORMAT, platform.machine(), spec.suite, packages])


def tree_digest(spec: ImageSpec) -> str:
    """sha256 hex of the root filesystem without the environment: what is built and cached."""
    base = base_digest(spec)
    return _digest(["pip", FORMAT, base, sorted(spec.pip)]) if spec.pip else base


def spec_digest(spec: ImageSpec) -> str:
    """sha256 hex that names an image. Order of packages does not matter."""
    return _digest(["image", tree_digest(spec), sorted(spec.env.items())])
