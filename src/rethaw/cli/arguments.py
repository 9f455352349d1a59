"""An agent's arguments from the command line: `--task "Fix it" --retries 3 --dry-run`, typed by its function.

Text stays text where the function says `str`; everything else is read as JSON; without a type, what is JSON is JSON.
"""

from __future__ import annotations

import difflib
import inspect
import json
import types
import typing
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, cast

from rethaw.model.errors import InvalidInput
from rethaw.sdk.agents import signature

# Options of `rethaw run` itself; everything else that begins with -- is the agent's. A test compares with `run`.
FLAGS = frozenset({"--detach", "-d", "--json", "--help", "-h"})
VALUES = frozenset(
    {
        "--agent",
        "--key",
        "--image",
        "--name",
        "--env",
        "-e",
        "--memory",
        "--durability",
        "--idle-suspend",
        "--max-duration",
        "--template",
        "--engine",
        "--workdir",
        "--queue",
        "--priority",
        "--delay",
        "--ttl",
        "--concurrency-key",
        "--tag",
        "--retries",
        "--retry-delay",
        "--budget-tokens",
        "--budget-money",
        "--budget-calls",
        "--budget-wall",
    }
)


# The same of `rethaw schedule create`.
SCHEDULE_FLAGS = frozenset({"--replace", "--json", "--help", "-h"})
SCHEDULE_VALUES = frozenset(
    {
        "--cron", "--every", "--tz", "--catch-up", "--overlap", "--image", "--memory", "--max-duration", "--queue",
        "--priority", "--delay", "--ttl", "--concurrency-key", "--tag",
    }
)  # fmt: skip


def prepared(args: Sequence[str]) -> list[str]:
    """A command line of `rethaw` with an agent's own arguments behind a `--`, if it is of a command that takes them."""
    if args[:1] == ["run"]:
        return ["run", *separate(args[1:])]
    if list(args[:2]) == ["schedule", "create"]:
        return ["schedule", "create", *separate(args[2:], SCHEDULE_FLAGS, SCHEDULE_VALUES, places=2)]
    return list(args)


def separate(
    tokens: Sequence[str], flags: AbstractSet[str] = FLAGS, values: AbstractSet[str] = VALUES, *, places: int = 1
) -> list[str]:
    """`tokens` with the agent's own moved behind a `--`. What follows a `--` stays as it is. `places`: how many of the
    command's own have no name."""
    own: list[str] = []
    agents: list[str] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        name = token.split("=", 1)[0]
        if token == "--":
            return [*own, "--", *agents, *tokens[i + 1 :]]
        if token in flags or (name in values and "=" in token):
            own.append(token)
        elif token in values:
            own += tokens[i : i + 2]
            i += 1
        elif token.startswith("-") and token != "-":
            agents.append(token)
            following = tokens[i + 1 : i + 2]
            if "=" not in token and following and not _is_option(following[0], flags, values):
                agents += following
                i += 1
        elif places <= 0:
            agents.append(token)
        else:
            own.append(token)
            places -= 1
        i += 1
    return [*own, "--", *agents] if agents else own


def _is_option(token: str, flags: AbstractSet[str], values: AbstractSet[str]) -> bool:
    if token == "--" or token in flags or token in values:
        return True
    return token.startswith("--") and len(token) > 2


def parse(function: Callable[..., Any], tokens: Sequence[str]) -> dict[str, Any]:
    """`tokens` as the arguments of `function`. Raises InvalidInput naming the argument, its value and what fits."""
    parameters = signature(function).parameters
    hints = _hints(function)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    given: dict[str, list[str | None]] = {}
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if not token.startswith("--") or token == "--":
            raise InvalidInput(f"{token!r} belongs to no argument", remedy=_usage(named, hints))
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name not in named and not takes_any:
            close = difflib.get_close_matches(name, named, 1)
            meant = f"did you mean --{close[0].replace('_', '-')}? " if close else ""
            raise InvalidInput(f"the agent has no argument {name!r}", remedy=meant + _usage(named, hints))
        if equals:
            given.setdefault(name, []).append(value)
        elif i + 1 < len(tokens) and not tokens[i + 1].startswith("--"):
            given.setdefault(name, []).append(tokens[i + 1])
            i += 1
        else:
            given.setdefault(name, []).append(None)
        i += 1
    out = {name: _value(name, values, hints.get(name, Any)) for name, values in given.items()}
    for name, parameter in named.items():
        if name not in out and parameter.default is inspect.Parameter.empty:
            option = f"--{name.replace('_', '-')}"
            remedy = _usage(named, hints)
            if option in FLAGS | VALUES:
                remedy = f"write it after --, since `rethaw run` has a {option} of its own"
            raise InvalidInput(f"the agent needs {option}", remedy=remedy)
    return out


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # a name that only the sandbox can resolve
        return {}


def _usage(parameters: dict[str, inspect.Parameter], hints: dict[str, Any]) -> str:
    if not parameters:
        return "it takes none"
    words: list[str] = []
    for name, parameter in parameters.items():
        hint = hints.get(name, Any)
        kind = "JSON" if hint is Any else getattr(hint, "__name__", None) or str(hint)
        if typing.get_origin(hint) is not None:
            kind = str(hint).replace("typing.", "")
        word = f"--{name.replace('_', '-')} {kind}"
        words.append(word if parameter.default is inspect.Parameter.empty else f"[{word}]")
    return f"it takes {' '.join(words)}"


def _value(name: str, values: list[str | None], hint: Any) -> Any:
    many = next((kind for kind in _choices(hint) if _origin(kind) in (list, tuple, set, frozenset)), None)
    if many is not None and (len(values) > 1 or not _looks_like(values[0], "[", "null")):
        inner = next(iter(typing.get_args(many)), Any)
        return [_one(name, value, inner) for value in values]
    if len(values) > 1:
        raise InvalidInput(f"--{name.replace('_', '-')} is given {len(values)} times", remedy="give it once")
    return _one(name, values[0], hint)


def _one(name: str, text: str | None, hint: Any) -> Any:
    option = f"--{name.replace('_', '-')}"
    if text is None:
        if hint in (Any, bool) or bool in typing.get_args(hint):
            return True
        raise InvalidInput(f"{option} has no value", remedy=f"write {option} VALUE")
    problem = ""
    for kind in _choices(hint):
        try:
            return _as(text, kind)
        except ValueError as e:
            problem = problem or str(e)
    raise InvalidInput(f"{option} = {text!r} does not fit: {problem}", remedy=f"the agent takes {_said(hint)}")


def _choices(hint: Any) -> list[Any]:
    """The types to try in order; text last, since everything is text."""
    if _origin(hint) in (typing.Union, types.UnionType):
        flat = [choice for arg in typing.get_args(hint) for choice in _choices(arg)]
        return sorted(flat, key=lambda kind: kind is str)
    return [hint]


def _as(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if _origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if text == str(choice) or text == json.dumps(choice):
                return choice
        raise ValueError("it is none of the choices")
    if kind is bool and text.lower() in ("yes", "on", "1", "no", "off", "0"):
        return text.lower() in ("yes", "on", "1")
    try:
        value: Any = json.loads(text)
    except ValueError:
        if kind is Any:
            return text
        raise ValueError("it is not JSON" if kind not in (int, float, bool) else f"it is no {kind.__name__}") from None
    wanted = _origin(kind) or kind
    if kind is Any or not isinstance(wanted, type):
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted in (tuple, set, frozenset):
        wanted = list
    plain = wanted in (int, float, bool, dict, list, types.NoneType)
    if plain and (not isinstance(value, wanted) or (wanted in (int, float) and isinstance(value, bool))):
        raise ValueError(f"it is no {wanted.__name__}")
    return cast("Any", value)


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or (cast("Any", hint) if hint in (list, tuple, set, frozenset) else None)


def _looks_like(text: str | None, *starts: str) -> bool:
    return text is not None and text.lstrip().startswith(starts)


def _said(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("typing.", "") if not typing.get_args(hint) else str(hint)
