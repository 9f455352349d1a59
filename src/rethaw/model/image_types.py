"""What travels of images. Sizes in bytes, times in seconds, `at` in UTC, unless said otherwise."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from rethaw.model.wire import Wire


class ImageStep(Wire):
    """One thing done to an image, in its order. `blob` is the digest of an uploaded tar.gz, unpacked at `target`."""

    kind: Literal["apt", "pip", "npm", "run", "add"]
    words: tuple[str, ...] = ()  # packages, requirements, or one shell command; of "add" the machine it is for, if any
    env: dict[str, str] = Field(default_factory=dict[str, str])  # of "run"
    blob: str | None = None
    target: str | None = None
    workdir: str | None = None  # of "run"; None: /

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler):  # no return type: the schema stays that of the fields
        """Without a directory as before there were any: sessions are found by these bytes."""
        out = handler(self)
        if out.get("workdir") is None:
            out.pop("workdir", None)
        return out

    def said(self) -> str:
        """For people."""
        if self.kind == "add":
            return f"add {(self.blob or '')[:12]} to {self.target}"
        return f"{self.kind} {' '.join(self.words)}"


class ImageSpec(Wire):
    """What an image is made of: the base with `apt`, then `pip`, then `steps`. Its digest (images.spec_digest) names it;
    equal specs are one image."""

    suite: str = "bookworm"
    apt: tuple[str, ...] = ()  # on top of the base image's packages
    pip: tuple[str, ...] = ()  # requirement specifiers, installed for the image's own python3
    env: dict[str, str] = Field(default_factory=dict[str, str])
    steps: tuple[ImageStep, ...] = ()
    python: str | None = None  # the interpreter that runs the agent; None: the image's own python3
    workdir: str | None = None  # that agents start in unless they say otherwise
    oci: str | None = None  # digest of an uploaded image of another tool, in place of Debian, apt and pip

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler):  # no return type: the schema stays that of the fields
        """A spec without steps is written as before there were any: sessions and templates are found by these bytes."""
        out = handler(self)
        for name in ("steps", "python", "workdir", "oci"):
            if not out.get(name):
                out.pop(name, None)
        return out


class ImageInfo(Wire):
    """An image that was built here, or a tree of files that it stands on. `kind`: "image"; of trees "base" (a Debian), "oci"
    (another tool's image), "pip" or "step" (a layer on another tree), "runtime" (the private interpreter), "composed" (what a
    sandbox boots: an image, Rethaw's own modules and an agent's code). `own_bytes`: that no other tree shares; of an image
    those of its layers."""

    digest: str
    kind: str
    made_of: str  # in words
    own_bytes: int
    built_s: float
    used_at: datetime


class ImageBuilt(Wire):
    """An image that is there. `built`: it was not before."""

    digest: str  # of its spec
    built: bool
    seconds: float
    lines: tuple[str, ...] = ()  # what the builder said


class ImageDetail(Wire):
    """An image or tree, and who needs it: sessions that have not ended, and snapshots."""

    info: ImageInfo
    spec: ImageSpec | None = None  # of an image
    layers: tuple[ImageInfo, ...] = ()  # of an image, the lowest first
    composed: tuple[str, ...] = ()  # digests of what sandboxes boot that is made of it
    sessions: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()


class ImageRemoved(Wire):
    """`digests`: of the image and of the trees that nothing else stands on; `bytes`: that this freed, about."""

    digests: tuple[str, ...]
    bytes: int
