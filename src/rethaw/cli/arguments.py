"""An agent's arguments from the command line: `--task "Fix it" --depth 3 --fast`, typed by its function.

Text stays text where the function says `str`; everything else is read as JSON (a model is a JSON object); without a type,
what is JSON is JSON.
"""

from __future__ import annotations

import enum
import inspect
import json
import typing
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, cast

from rethaw.model import annotations, typed
from rethaw.model.errors import InvalidInput
from rethaw.model.nearest import nearest
from rethaw.sdk.functions import signature

# Options of `rethaw run` itself; everything else that begins with -- is the agent's. A test compares with `run`.
FLAGS = frozenset(
    {"--detach", "-d", "--dry-run", "--interactive", "-i", "--tty", "-t", "--rm", "--json", "--help", "-h"}
)
_SHORT = frozenset("dit")  # may be written together: -it
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
        "--nap",
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
        "--retry-on",
        "--budget-tokens",
        "--budget-money",
        "--budget-calls",
        "--budget-wall",
        "--allow",
        "--detach-keys",
        "--mount-copy",
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
        return ["run", *separate(apart(args[1:]))]
    if list(args[:2]) == ["schedule", "create"]:
        return ["schedule", "create", *separate(args[2:], SCHEDULE_FLAGS, SCHEDULE_VALUES, places=2)]
    return list(args)


def apart(tokens: Sequence[str]) -> list[str]:
    """`tokens` with -it as -i -t."""
    out: list[str] = []
    for at, token in enumerate(tokens):
        if token == "--":
            return [*out, *tokens[at:]]
        together = len(token) > 2 and token[0] == "-" and set(token[1:]) <= _SHORT
        out += [f"-{letter}" for letter in token[1:]] if together else [token]
    return out


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
            close = nearest(name, [*named, *(own[2:] for own in FLAGS | VALUES if own.startswith("--"))])
            meant = f"did you mean --{close.replace('_', '-')}? " if close else ""
            raise InvalidInput(f"the agent has no argument {name!r}", remedy=meant + _usage(named, hints))
        if equals:
            given.setdefault(name, []).append(value)
        elif i + 1 < len(tokens) and not tokens[i + 1].startswith("--"):
            given.setdefault(name, []).append(tokens[i + 1])
            i += 1
        else:
            given.setdefault(name, []).append(None)
        i += 1
    out = {name: _value(name, values, hints.get(name, Any), _usage(named, hints)) for name, values in given.items()}
    for name, parameter in named.items():
        if name not in out and parameter.default is inspect.Parameter.empty:
            option = f"--{name.replace('_', '-')}"
            remedy = _usage(named, hints)
            if option in FLAGS | VALUES:
                remedy = f"write it after --, since `rethaw run` has a {option} of its own"
            raise InvalidInput(f"the agent needs {option}", remedy=remedy)
    return out


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Of what only the sandbox can resolve: Any."""
    found = annotations.hints(function)
    return {name: Any if isinstance(hint, annotations.Unresolved) else hint for name, hint in found.items()}


def _usage(parameters: dict[str, inspect.Parameter], hints: dict[str, Any]) -> str:
    if not parameters:
        return "it takes none"
    words: list[str] = []
    for name, parameter in parameters.items():
        word = f"--{name.replace('_', '-')} {annotations.name_of(hints.get(name, Any))}"
        words.append(word if parameter.default is inspect.Parameter.empty else f"[{word}]")
    return f"it takes {' '.join(words)}"


def described(function: Callable[..., Any]) -> list[str]:
    """A line for each argument: its option, its type, its default; then one for each model among the types."""
    hints, rows, told = _hints(function), list[tuple[str, str, str]](), dict[str, str]()
    for name, parameter in signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rows.append(("--ANY-NAME", annotations.name_of(hints.get(name, Any)), ""))
            continue
        hint = hints.get(name, Any)
        kind = annotations.name_of(hint)
        for name_, inner in annotations.models(hint).items():
            told[name_] = f"  {name_}: " + ", ".join(f"{field}: {of}" for field, of in inner.items())
        needed = parameter.default is inspect.Parameter.empty
        rows.append((f"--{name.replace('_', '-')}", kind, "needed" if needed else f"default {parameter.default!r}"))
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    lines = [f"  {option:{widths[0]}}  {kind:{widths[1]}}  {rest}".rstrip() for option, kind, rest in rows]
    return [*lines, *(["", "Of which:", *told.values()] if told else [])]


def asked_about(tokens: Sequence[str]) -> tuple[str, Literal["file", "agent"]] | None:
    """FILE.py[::NAME], or the NAME[@VERSION] of --agent, when `rethaw run` is asked for help about that."""
    before = list(tokens[: tokens.index("--")] if "--" in tokens else tokens)
    if not {"--help", "-h"} & set(before):
        return None
    for token, following in zip(before, [*before[1:], ""], strict=True):
        if token == "--agent" and following and not following.startswith("-"):
            return following, "agent"
        if token.startswith("--agent="):
            return token.removeprefix("--agent="), "agent"
        if token.partition("::")[0].endswith(".py"):
            return token, "file"
    return None


def _value(name: str, values: list[str | None], hint: Any, usage: str) -> Any:
    option = f"--{name.replace('_', '-')}"
    plain = annotations.bare(hint)
    many = next((kind for kind in _choices(plain) if _origin(kind) in annotations.LISTS), None)
    if many is not None and (len(values) > 1 or not _looks_like(values[0], "[", "null")):
        inner = next(iter(typing.get_args(many)), Any)
        out = [_one(option, value, inner, usage) for value in values]
    elif len(values) > 1:
        raise InvalidInput(f"{option} is given {len(values)} times", remedy="give it once")
    else:
        out = _one(option, values[0], plain, usage)
    typed.build(out, hint, option)
    return out


def _one(option: str, text: str | None, hint: Any, usage: str) -> Any:
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
    raise InvalidInput(f"{option} = {text!r} does not fit: {problem}", remedy=usage)


def _choices(hint: Any) -> list[Any]:
    """The types to try in order; text last, since everything is text."""
    hint = annotations.bare(hint)
    if typing.get_origin(hint) in annotations.UNIONS:
        flat = [choice for arg in typing.get_args(hint) for choice in _choices(arg)]
        return sorted(flat, key=lambda kind: kind is str)
    return [hint]


def _as(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if isinstance(kind, enum.EnumType):
        choices = tuple(member.value for member in cast("type[enum.Enum]", kind))
    for choice in choices:
        if text == str(choice) or text == json.dumps(choice):
            return choice
    if choices:
        raise ValueError(f"it is none of the choices {', '.join(str(choice) for choice in choices)}")
    if kind is bool and text.lower() in ("yes", "on", "1", "no", "off", "0"):
        return text.lower() in ("yes", "on", "1")
    try:
        value: Any = json.loads(text)
    except ValueError:
        if kind is Any:
            return text
        raise ValueError("it is not JSON" if kind not in (int, float, bool) else f"it is no {kind.__name__}") from None
    wanted = typing.get_origin(kind) or kind
    if kind is Any or not isinstance(wanted, type):
        return value
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted in annotations.LISTS:
        wanted = list
    plain = wanted in (int, float, bool, dict, list, type(None))
    if plain and (not isinstance(value, wanted) or (wanted in (int, float) and isinstance(value, bool))):
        raise ValueError(f"it is no {wanted.__name__}")
    return cast("Any", value)


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _looks_like(text: str | None, *starts: str) -> bool:
    return text is not None and text.lstrip().startswith(starts)
