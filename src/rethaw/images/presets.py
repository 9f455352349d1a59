"""Settings for clients that find their model by a file and not by the environment. Every sandbox has them, where its image
says nothing itself."""

from __future__ import annotations

import os
from pathlib import Path

from rethaw.images import places
from rethaw.model.errors import ImageError

# Of all the places that Codex reads this is the weakest: ~/.codex/config.toml, a project's file and -c win over it.
_CODEX = b"""\
# Rethaw: the model is reached through the gateway of the sandbox, which has the key.
model_provider = "rethaw"
check_for_update_on_startup = false

[model_providers.rethaw]
name = "Rethaw"
base_url = "http://127.0.0.1:8484/openai/v1"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
supports_websockets = false

[analytics]
enabled = false
"""
FILES = {"etc/codex/config.toml": _CODEX}


def install(rootfs: Path, modified: int) -> None:
    """Write those that are not there into a tree; `modified`: their date. Blocking."""
    for name, data in FILES.items():
        directory, _, file = name.rpartition("/")
        try:
            path = places.inside(rootfs, directory) / file
        except ImageError:  # the image has something else there
            continue
        if not os.path.lexists(path):
            path.write_bytes(data)
            path.chmod(0o644)
            os.utime(path, (modified, modified))
