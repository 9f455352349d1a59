"""The `[egress]` table of rethaw.toml, and the environment over it: what this node lets agents reach at all.

docs/configuration.md describes every setting; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from rethaw.model.egress import EgressSettings, rules_of
from rethaw.model.errors import InvalidInput

# setting -> environment variable that goes over it
EGRESS_SETTINGS: dict[str, str] = {"enabled": "RETHAW_EGRESS", "deny": "RETHAW_EGRESS_DENY"}
# Where clouds hand out a machine's credentials.
DEFAULT_DENY = ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254")
_SWITCH = {"true": True, "on": True, "1": True, "yes": True, "false": False, "off": False, "0": False, "no": False}


def egress_settings(table: object, where: str, env: Mapping[str, str]) -> EgressSettings:
    """Check `[egress]` of the file `where`. Raises InvalidInput naming file, key, value and remedy."""
    if not isinstance(table, Mapping):
        raise InvalidInput(f"{where}: egress is not a table", remedy="write [egress] and settings below it")
    entries = cast("Mapping[str, Any]", table)
    for key in entries:
        if key not in EGRESS_SETTINGS:
            known = ", ".join(sorted(EGRESS_SETTINGS))
            raise InvalidInput(f"{where}: {key!r} in [egress] is not a setting", remedy=f"known: {known}")
    return EgressSettings(_enabled(entries, where, env), rules_of(_deny(entries, where, env), what="deny", ports=None))


def _enabled(entries: Mapping[str, Any], where: str, env: Mapping[str, str]) -> bool:
    said = env.get(EGRESS_SETTINGS["enabled"])
    if said:
        if said.lower() not in _SWITCH:
            name = EGRESS_SETTINGS["enabled"]
            raise InvalidInput(f"{name} (environment) = {said!r} is no switch", remedy="use true or false")
        return _SWITCH[said.lower()]
    value = entries.get("enabled", True)
    if not isinstance(value, bool):
        raise InvalidInput(f"{where}: egress.enabled = {value!r} is no switch", remedy="use true or false")
    return value


def _deny(entries: Mapping[str, Any], where: str, env: Mapping[str, str]) -> list[str]:
    said = env.get(EGRESS_SETTINGS["deny"])
    if said:
        return [part for part in said.replace(",", " ").split() if part]
    value: object = entries.get("deny", list(DEFAULT_DENY))
    if not isinstance(value, list) or not all(isinstance(x, str) for x in cast("list[object]", value)):
        raise InvalidInput(
            f"{where}: egress.deny = {value!r} is no list of hosts", remedy='write it like ["10.0.0.0/8"]'
        )
    return cast("list[str]", value)
