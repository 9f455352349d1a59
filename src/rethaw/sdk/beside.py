"""The agents that an agent's file knows beside it: what it may spawn."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from rethaw.model.errors import InvalidInput

if TYPE_CHECKING:
    from rethaw.model.types import AgentSpec
    from rethaw.sdk.agents import Agent


def specs(agent: Agent[..., Any], code: str) -> dict[str, AgentSpec]:
    """The wire forms of `others`, which are in the same package (`code`)."""
    from rethaw.model import signatures

    root = agent.file.parent
    return {
        name: one.options.spec(entry=_entry(one, root), code=code).model_copy(
            update={"signature": signatures.of(one.function)}
        )
        for name, one in others(agent).items()
    }


def others(agent: Agent[..., Any]) -> dict[str, Agent[..., Any]]:
    """By name, without `agent` itself: every agent of its module, of the local modules that it imported, and of those in
    turn. Raises InvalidInput when two have one name."""
    root = agent.file.parent
    found: dict[str, Agent[..., Any]] = {agent.name: agent}
    todo, seen = [_namespace(agent)], set[str]()
    while todo:
        names = todo.pop()
        if str(names.get("__name__")) in seen:
            continue
        seen.add(str(names.get("__name__")))
        for value in list(names.values()):
            if isinstance(value, ModuleType):
                if _within(getattr(value, "__file__", None), root):
                    todo.append(vars(value))
            elif isinstance(value, type(agent)) and _packed(one := cast("Agent[..., Any]", value), root):
                other = found.setdefault(one.name, one)
                if (other.file, other.entry) != (one.file, one.entry):
                    raise InvalidInput(
                        f"two agents that {agent.file.name} knows are named {one.name!r}: {other!r} and {one!r}",
                        remedy="give one of them another name",
                    )
                todo.append(_namespace(one))
    del found[agent.name]
    return {name: found[name] for name in sorted(found)}


def _namespace(agent: Agent[..., Any]) -> dict[str, Any]:
    """Of the module that defines it; of the very import of that which it is from."""
    function = inspect.unwrap(agent.function)
    own: Any = getattr(function, "__globals__", None)
    return cast("dict[str, Any]", own) if isinstance(own, dict) else vars(sys.modules[agent.__module__])


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
