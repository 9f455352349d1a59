"""What the routes talk to."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethaw.api.links import Links
from rethaw.control.control import Control
from rethaw.control.snapshots import Catalog
from rethaw.log.store import Log
from rethaw.model.dialing import Dialing
from rethaw.model.errors import NotFound
from rethaw.model.image_types import ImageSpec
from rethaw.model.looking import Looking
from rethaw.model.ports import Carrier, Images
from rethaw.model.terminal import Terminals
from rethaw.model.types import AgentSpec

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Rooms:
    """`crash_hook(session, "node" | "db")` kills that part of the server; `doctor_hook()` probes its engines."""

    control: Control
    log: Log
    catalog: Catalog
    crash_hook: Callable[[str, str], Awaitable[None]]
    doctor_hook: Callable[[], Awaitable[Any]]
    blobs_dir: Path
    heartbeat_s: float
    looking: Looking | None = None  # None: no node in this process
    carrier: Carrier | None = None
    images: Images | None = None
    node: str = ""
    terminals: Terminals | None = None
    cpu: Callable[[str], float | None] | None = None  # CPU seconds that a session's sandbox has used here
    usage: Callable[[], Awaitable[dict[str, tuple[float, int]]]] | None = None  # that and memory bytes, of all of them
    dialing: Dialing | None = None
    links: Links | None = None

    def has_blob(self, digest: str) -> bool:
        return _DIGEST.fullmatch(digest) is not None and (self.blobs_dir / f"{digest}.tar.gz").is_file()

    def must_have(self, agent: AgentSpec) -> None:
        """Raises NotFound for an upload that `agent` names and that is not here."""
        if agent.code is not None and not self.has_blob(agent.code):
            raise NotFound(f"there is no code {agent.code}", remedy="upload it to /v1/blobs first")
        self.must_have_image(agent.image)

    def must_have_image(self, image: ImageSpec) -> None:
        """Raises NotFound for an upload that `image` names and that is not here."""
        if image.oci is not None and not self.has_blob(image.oci):
            raise NotFound(f"there is no image {image.oci}", remedy="upload it to /v1/blobs first")
        for step in image.steps:
            if step.blob is not None and not self.has_blob(step.blob):
                raise NotFound(f"there are no files {step.blob} for the image", remedy="upload them to /v1/blobs first")
