"""The agents that an agent's file knows beside it: what it may spawn."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from rethaw.model.errors import InvalidInput

if TYPE_CHECKING:
    from rethaw.model.types import AgentSpec
    from rethaw.sdk.agents import Agent


def specs(agent: Agent[..., Any], code: str) -> dict[str, AgentSpec]:
    """By name, without `agent` itself: every agent of its module, of the local modules that it imported, and of those in
    turn. They are in the same package (`code`). Raises InvalidInput when two have one name."""
    root = agent.file.parent
    found: dict[str, Agent[..., Any]] = {agent.name: agent}
    todo, seen = [agent.__module__], set[str]()
    while todo:
        name = todo.pop()
        module = sys.modules.get(name)
        if module is None or name in seen:
            continue
        seen.add(name)
        for value in list(vars(module).values()):
            if isinstance(value, ModuleType):
                if _within(getattr(value, "__file__", None), root):
                    todo.append(value.__name__)
            elif isinstance(value, type(agent)) and _packed(one := cast("Agent[..., Any]", value), root):
                other = found.setdefault(one.name, one)
                if other.function is not one.function:
                    raise InvalidInput(
                        f"two agents that {agent.file.name} knows are named {one.name!r}: {other!r} and {one!r}",
                        remedy="give one of them another name",
                    )
                todo.append(one.__module__)
    del found[agent.name]
    return {name: found[name].options.spec(entry=_entry(found[name], root), code=code) for name in sorted(found)}


def _packed(agent: Agent[..., Any], root: Path) -> bool:
    """Whether a sandbox of the package can run it."""
    try:
        return bool(agent.entry) and _within(agent.file, root)
    except InvalidInput:
        return False


def _within(file: str | Path | None, root: Path) -> bool:
    return file is not None and Path(file).absolute().is_relative_to(root)


def _entry(agent: Agent[..., Any], root: Path) -> str:
    """As `Agent.entry`, from the directory of the package."""
    return f"{agent.file.relative_to(root).as_posix()}::{agent.entry.partition('::')[2]}"
