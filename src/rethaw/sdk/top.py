"""The call of `Client.top`."""

from __future__ import annotations

from rethaw.model.loads import MachineLoad
from rethaw.sdk.calls import Call


def call(limit: int, ended: bool) -> Call[MachineLoad]:
    params: dict[str, str | list[str]] = {"limit": str(limit), "ended": str(ended).lower()}
    return Call("GET", "/v1/top", MachineLoad.model_validate_json, params=params)
