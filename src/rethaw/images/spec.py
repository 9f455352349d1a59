"""Names images by what they are made of."""

from __future__ import annotations

import hashlib
import json
import platform
import re

from rethaw.model.errors import InvalidInput
from rethaw.model.image_types import ImageSpec, ImageStep

FORMAT = 1  # of the root filesystems; a change builds every image anew
BASE_PACKAGES = ("ca-certificates", "git", "python3", "ripgrep")  # all that is ever installed outside of a sandbox
SUITES = {"bookworm": "3.11"}  # suite: version of its python3
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9]+)?(?:=[A-Za-z0-9.+:~-]+)?")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:\[[A-Za-z0-9,._ -]*\])?\s*(?:[<>=!~].*)?(?:;.*)?")
_BLOB = re.compile(r"[0-9a-f]{64}")
_HASHES = re.compile(r"(?: --hash=[a-z0-9]+:[0-9a-f]+)+")
NPM = re.compile(r"(?:@[a-z0-9~][a-z0-9._~-]*/)?[A-Za-z0-9~][A-Za-z0-9._~-]*(?:@[A-Za-z0-9.^~<>=|*x +_-]+)?")
KERNELS = ("proc", "sys", "dev", "tmp", "run", ".rethaw")  # made anew in each sandbox
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

    if spec.python is not None and not re.fullmatch(r"/[A-Za-z0-9._/+-]+", spec.python):
        raise InvalidInput(
            f"{spec.python!r} is not the path of an interpreter", remedy="write it like /usr/bin/python3"
        )
    if spec.workdir is not None:
        _check_place(spec.workdir)
    if spec.oci is not None:
        if not _BLOB.fullmatch(spec.oci):
            raise InvalidInput(
                f"{spec.oci!r} is not the digest of a blob", remedy="upload the image to /v1/blobs first"
            )
        if spec.apt or spec.pip:
            raise InvalidInput("an image of another tool has no packages of the base", remedy="install them in steps")
    for step in spec.steps:
        _check_step(step)


def _check_place(place: str) -> None:
    if not place.startswith("/") or ".." in place.split("/") or "\0" in place:
        raise InvalidInput(f"{place!r} is not a place in an image", remedy="write an absolute path like /data")


def _check_step(step: ImageStep) -> None:
    if step.kind == "apt":
        check(ImageSpec(apt=step.words))
    elif step.kind == "pip":
        check(ImageSpec(env=step.env))
        for requirement in step.words:
            plain, _, hashes = requirement.partition(" --hash=")
            if hashes and not _HASHES.fullmatch(" --hash=" + hashes):
                raise InvalidInput(f"{requirement!r} is not a requirement", remedy='write it like "httpx>=0.27"')
            check(ImageSpec(pip=(plain,)))
    elif step.kind == "npm":
        for package in step.words:
            if not NPM.fullmatch(package):
                raise InvalidInput(f"{package!r} is not an npm package", remedy='write it like "typescript@5.4.5"')
    elif step.kind == "run":
        check(ImageSpec(env=step.env, workdir=step.workdir))
        if len(step.words) != 1 or not step.words[0].strip() or "\0" in step.words[0]:
            raise InvalidInput(f"{step.words!r} is not one shell command", remedy='write it like "make install"')
    else:
        if not _BLOB.fullmatch(step.blob or ""):
            raise InvalidInput(
                f"{step.blob!r} is not the digest of a blob", remedy="upload the files to /v1/blobs first"
            )
        target = step.target or ""
        _check_place(target)
        if target.split("/")[1] in KERNELS:
            raise InvalidInput(f"{target!r} is not of the image: it is made anew in each sandbox", remedy="use another")
        if step.words and step.words != (platform.machine(),):
            raise InvalidInput(
                f"files for {step.words[0]} do not fit this node, which is {platform.machine()}",
                remedy="build the image from a machine of the same kind",
            )


def blobs(spec: ImageSpec) -> tuple[str, ...]:
    """Digests of the uploads that it needs."""
    return tuple(blob for blob in (spec.oci, *(step.blob for step in spec.steps)) if blob is not None)


def all_steps(spec: ImageSpec) -> tuple[ImageStep, ...]:
    """What is done to the base, in its order: `apt`, `pip`, then `steps`."""
    first: list[ImageStep] = []
    if packages := sorted({*spec.apt} - {*BASE_PACKAGES}):
        first.append(ImageStep(kind="apt", words=tuple(packages)))
    if spec.pip:
        first.append(ImageStep(kind="pip", words=tuple(sorted(spec.pip))))
    return (*first, *spec.steps)


def base_digest(spec: ImageSpec) -> str:
    """sha256 hex of the lowest layer: Debian's suite with BASE_PACKAGES, or another tool's image."""
    if spec.oci is not None:
        return _digest(["oci", FORMAT, platform.machine(), spec.oci])
    return _debian_digest(spec.suite, ())


def _debian_digest(suite: str, packages: tuple[str, ...]) -> str:
    return _digest(["base", FORMAT, platform.machine(), suite, sorted({*BASE_PACKAGES, *packages})])


def runtime_digest(suite: str) -> str:
    """sha256 hex of the tree with the private interpreter."""
    return _digest(["runtime", FORMAT, platform.machine(), suite])


def layers(spec: ImageSpec) -> list[str]:
    """sha256 hex of each tree on the way, the lowest first: each is built of the one before, and cached."""
    found = [base_digest(spec)]
    if {*spec.apt} - {*BASE_PACKAGES}:
        found.append(_debian_digest(spec.suite, spec.apt))
    if spec.pip:
        found.append(_digest(["pip", FORMAT, found[-1], sorted(spec.pip)]))
    before: list[str] = list(spec.pip)
    for step in spec.steps:
        what: list[object] = [step.kind, list(step.words), sorted(step.env.items()), step.blob, step.target]
        if step.workdir is not None:
            what.append(step.workdir)
        if step.kind == "pip":  # resolved together with those before it
            what.append(list(before))
            before += step.words
            if spec.python is not None:
                what.append({"python": spec.python})
        found.append(_digest(["step", FORMAT, found[-1], what]))
    return found


def tree_digest(spec: ImageSpec) -> str:
    """sha256 hex of the root filesystem without the environment: what is built and cached."""
    return layers(spec)[-1]


def spec_digest(spec: ImageSpec) -> str:
    """sha256 hex that names an image. Order of packages does not matter, that of steps does."""
    python = [spec.python] if spec.python else []
    workdir = [{"workdir": spec.workdir}] if spec.workdir else []
    return _digest(["image", tree_digest(spec), sorted(spec.env.items()), *python, *workdir])
