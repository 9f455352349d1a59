"""The engines of a node, all of them, whichever is the default."""

from __future__ import annotations

import os
from pathlib import Path

from rethaw.engines.gvisor.engine import GvisorEngine
from rethaw.engines.microvm.engine import QemuEngine
from rethaw.engines.several import Engines


def microvm_assets(data_dir: Path) -> Path:
    """Where kernel and disks of microVMs lie: with the images where several servers share those, else with the engines."""
    shared = os.environ.get("RETHAW_IMAGES")
    return Path(shared) / "microvm" if shared else data_dir / "engines" / "microvm"


def engines_of(data_dir: Path, default: str = "gvisor", *, assets: Path | None = None) -> Engines:
    """`default` comes first. Nothing is started or looked for before an engine is used. `assets`: see `microvm_assets`."""
    engines = [GvisorEngine(data_dir), QemuEngine(data_dir, assets or microvm_assets(data_dir))]
    return Engines(sorted(engines, key=lambda engine: engine.name != default))
