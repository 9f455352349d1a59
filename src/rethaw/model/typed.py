"""What a function takes and gives, checked against its annotations: the same code for callers and in sandboxes.

Standard library only, Python >= 3.9. pydantic is used only for annotations that are pydantic's own; whoever wrote them
has imported it. "Wire" is what JSON holds; `dump` makes it of a value, `build` makes a value of it again.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import json
import typing
from collections.abc import Callable
from typing import Any, cast

from rethaw.model import annotations
from rethaw.model.annotations import REMEDY, Unresolved, name_of
from rethaw.model.errors import InvalidInput


class Unfit(Exception):
    """Says what is wrong, and where inside of the value: "[2].name: ..."."""


# ---------------------------------------------------------------- values


def dump(value: Any, annotation: Any, what: str) -> Any:
    """`value` as JSON holds it. Raises InvalidInput naming `what`, the value and the type."""
    try:
        return _dump(value, annotation)
    except Unfit as error:
        raise _unfit(value, annotation, what, error) from None
    except RecursionError:
        raise InvalidInput(f"{what} is nested too deeply for JSON", remedy=REMEDY) from None


def build(wire: Any, annotation: Any, what: str) -> Any:
    """The value that `wire` stands for. Raises InvalidInput naming `what`, the value and the type."""
    try:
        return _build(wire, annotation)
    except Unfit as error:
        raise _unfit(wire, annotation, what, error) from None


def _unfit(value: Any, annotation: Any, what: str, error: Unfit) -> InvalidInput:
    text = repr(value)
    shown = text if len(text) <= 80 else text[:77] + "..."
    if isinstance(annotation, Unresolved) or annotations.bare(annotation) is Any:
        return InvalidInput(f"{what} is not JSON: {error} (it is {shown})", remedy=REMEDY)
    said = str(error)
    return InvalidInput(
        f"{what} = {shown} does not fit{said if said[:1] in '[.' else f': {said}'}",
        remedy=f"it has to be {name_of(annotation)}",
    )


def _dump(value: Any, annotation: Any) -> Any:
    if isinstance(annotation, Unresolved):
        return _json(value)
    if annotations.is_pydantic(annotation):
        return _dump_pydantic(value, annotation)
    bare = annotations.bare(annotation)
    origin, args = typing.get_origin(bare) or bare, typing.get_args(bare)
    if bare is Any:
        return _json(value)
    if origin in annotations.UNIONS:
        return _dump_union(value, args)
    if origin in annotations.LISTS:
        if isinstance(value, (str, bytes, dict)) or not isinstance(value, collections.abc.Iterable):
            raise Unfit(f"it is no {_short(origin)}")
        items = list(cast("collections.abc.Iterable[Any]", value))
        return [_at(f"[{i}]", _dump, item, kind) for i, (item, kind) in enumerate(zip(items, _kinds(args, items)))]  # noqa: B905
    if origin in annotations.DICTS:
        if not isinstance(value, collections.abc.Mapping):
            raise Unfit("it is no dict")
        pairs = cast("collections.abc.Mapping[Any, Any]", value).items()
        keys, kind = (args[0], args[1]) if args else (Any, Any)
        return {_key(key, keys): _at(f"[{key!r}]", _dump, item, kind) for key, item in pairs}
    if inspect.isclass(bare) and issubclass(bare, enum.Enum):
        if not isinstance(value, bare):
            raise Unfit(f"it is no {bare.__name__}")
        return value.value
    if inspect.isclass(bare) and (dataclasses.is_dataclass(bare) or annotations.is_typed_dict(bare)):
        if dataclasses.is_dataclass(bare):
            if not isinstance(value, bare):
                raise Unfit(f"it is no {bare.__name__}")
            given = {name: getattr(value, name) for name in annotations.fields_of(bare)}
        else:
            given = value
        return _each(given, bare, _dump)
    return _json(_exact(value, bare, origin, args))


def _build(wire: Any, annotation: Any) -> Any:
    if isinstance(annotation, Unresolved):
        return wire
    if annotations.is_pydantic(annotation):
        return _build_pydantic(wire, annotation)
    bare = annotations.bare(annotation)
    origin, args = typing.get_origin(bare) or bare, typing.get_args(bare)
    if bare is Any:
        return wire
    if origin in annotations.UNIONS:
        return _first(wire, args, _build)
    if origin in annotations.LISTS:
        if not isinstance(wire, list):
            raise Unfit(f"it is no {_short(origin)}")
        items = cast("list[Any]", wire)
        made = [_at(f"[{i}]", _build, item, kind) for i, (item, kind) in enumerate(zip(items, _kinds(args, items)))]  # noqa: B905
        return cast("Any", origin)(made) if origin in (tuple, set, frozenset) else made
    if origin in annotations.DICTS:
        if not isinstance(wire, dict):
            raise Unfit("it is no dict")
        keys, kind = (args[0], args[1]) if args else (Any, Any)
        pairs = cast("dict[str, Any]", wire).items()
        return {_unkey(key, keys): _at(f"[{key!r}]", _build, item, kind) for key, item in pairs}
    if inspect.isclass(bare) and issubclass(bare, enum.Enum):
        for member in bare:
            if member.value == wire and type(member.value) is type(wire):
                return member
        raise Unfit(f"it is none of {', '.join(repr(member.value) for member in bare)}")
    if inspect.isclass(bare) and (dataclasses.is_dataclass(bare) or annotations.is_typed_dict(bare)):
        made_fields = _each(wire, bare, _build)
        try:
            return bare(**made_fields)
        except (TypeError, ValueError) as error:  # its __post_init__
            raise Unfit(str(error)) from None
    return _exact(wire, bare, origin, args)


def _exact(value: Any, bare: Any, origin: Any, args: tuple[Any, ...]) -> Any:
    """A plain value of just that type."""
    if origin is typing.Literal:
        for choice in args:
            if value == choice and type(value) is type(choice):
                return choice
            if isinstance(choice, enum.Enum) and value == choice.value:
                return choice
        raise Unfit(f"it is none of {', '.join(repr(choice) for choice in args)}")
    if bare is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, bare) or (bare in (int, float) and isinstance(value, bool)):
        raise Unfit(f"it is no {_short(bare)}")
    return value


def _short(kind: Any) -> str:
    return "None" if kind is type(None) else str(getattr(kind, "__name__", kind)).lower()


def _json(value: Any) -> Any:
    """What JSON makes of a value without a type."""
    if isinstance(value, enum.Enum):
        value = value.value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Unfit(str(error)) from None
    return value


def _at(where: str, step: Callable[[Any, Any], Any], value: Any, kind: Any) -> Any:
    try:
        return step(value, kind)
    except Unfit as error:
        said = str(error)
        raise Unfit(where + (said if said[:1] in ("[", ".") else f": {said}")) from None


def _kinds(args: tuple[Any, ...], items: list[Any]) -> list[Any]:
    """The type of each item: of a tuple every place has its own."""
    if len(args) > 1 and args[-1] is not Ellipsis:
        if len(args) != len(items):
            raise Unfit(f"it has {len(items)} items, not {len(args)}")
        return list(args)
    return [args[0] if args else Any] * len(items)


def _key(key: Any, kind: Any) -> str:
    if isinstance(key, enum.Enum):
        key = key.value
    if isinstance(key, str) and annotations.bare(kind) is not int:
        return key
    if isinstance(key, int) and not isinstance(key, bool) and annotations.bare(kind) is int:
        return str(key)
    raise Unfit(f"its key {key!r} is no {_short(int if annotations.bare(kind) is int else str)}")


def _unkey(key: str, kind: Any) -> Any:
    if annotations.bare(kind) is not int:
        return key
    try:
        return int(key)
    except ValueError:
        raise Unfit(f"its key {key!r} is no int") from None


def _each(given: Any, kind: Any, step: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """`step` over the fields of a dataclass or TypedDict."""
    if not isinstance(given, dict):
        raise Unfit("it is no dict")
    values, wanted, needed = cast("dict[str, Any]", given), annotations.fields_of(kind), required_of(kind)
    for name in values:
        if name not in wanted:
            raise Unfit(f"{name_of(kind)} has no field {name!r}")
    for name in wanted:
        if name not in values and name in needed:
            raise Unfit(f"field {name!r} is missing")
    return {name: _at(f".{name}", step, value, wanted[name]) for name, value in values.items()}


def required_of(kind: Any) -> set[str]:
    """The fields of a dataclass or TypedDict that have no default."""
    if not dataclasses.is_dataclass(kind):
        return set(getattr(kind, "__required_keys__", annotations.fields_of(kind)))
    return {
        field.name
        for field in dataclasses.fields(kind)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


def _first(value: Any, kinds: tuple[Any, ...], step: Callable[[Any, Any], Any]) -> Any:
    """The first of a union that it fits, the exact type before any other."""
    if len(real := [kind for kind in kinds if kind is not type(None)]) == 1:
        return None if value is None else step(value, real[0])
    problems: list[str] = []
    for kind in sorted(kinds, key=lambda kind: annotations.bare(kind) is not type(value)):
        try:
            return step(value, kind)
        except Unfit as error:
            problems.append(f"{name_of(kind)}: {error}")
    raise Unfit("it fits none of: " + "; ".join(problems))


def _dump_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    """The other end must find the same one of the union."""
    exact = [
        kind for kind in kinds if inspect.isclass(annotations.bare(kind)) and type(value) is annotations.bare(kind)
    ]
    wire = _first(value, tuple(exact) or kinds, _dump)
    if dataclasses.is_dataclass(value) and type(again := _first(wire, kinds, _build)) is not type(value):
        raise Unfit(_changed(value, again))
    return wire


def _changed(value: Any, again: Any) -> str:
    return (
        f"a {type(value).__name__} would come back as {type(again).__name__}; "
        "in a union, give each a Literal field of its own"
    )


# ---------------------------------------------------------------- pydantic


_STARS = b"**********"  # what SecretStr and SecretBytes are in JSON


def _said(error: Any) -> str:
    """pydantic's errors in one line each."""
    found: list[dict[str, Any]] = (
        error.errors(include_url=False, include_context=False) if hasattr(error, "errors") else []
    )
    lines = [f"{'.'.join(str(part) for part in e['loc']) or 'it'}: {e['msg']}" for e in found]
    return "; ".join(lines) or str(error).partition("\n")[0]


def _dump_pydantic(value: Any, annotation: Any) -> Any:
    adapter = annotations.adapter(annotation)
    try:
        checked = adapter.validate_python(value)
    except ValueError as error:
        raise Unfit(_said(error)) from None
    problem = ""
    for by_alias in (True, False):
        try:
            text = adapter.dump_json(checked, by_alias=by_alias, round_trip=True, warnings=False)
        except Exception as error:  # PydanticSerializationError, or what a serializer of the model raises
            raise Unfit(f"it is not JSON ({error})") from None
        try:
            again = adapter.validate_json(text)
        except ValueError as error:
            problem = problem or _said(error)
            continue
        if type(again) is not type(checked):
            raise Unfit(_changed(checked, again))
        if _STARS in text and adapter.dump_python(again) != adapter.dump_python(checked):
            raise Unfit("it holds a secret, which pydantic writes as stars; secrets do not belong into a session")
        return json.loads(text)
    raise Unfit(f"what it is in JSON cannot be read again: {problem}")


def _build_pydantic(wire: Any, annotation: Any) -> Any:
    try:
        return annotations.adapter(annotation).validate_json(json.dumps(wire))
    except ValueError as error:
        raise Unfit(_said(error)) from None


# ---------------------------------------------------------------- functions


def wire_arguments(function: Callable[..., Any], values: dict[str, Any], what: str) -> dict[str, Any]:
    """Arguments by name, as JSON holds them."""
    return _arguments(function, values, what, dump)


def built_arguments(function: Callable[..., Any], wires: dict[str, Any], what: str = "") -> dict[str, Any]:
    """Arguments by name, as the function wants them."""
    return _arguments(function, wires, what, build)


def _arguments(
    function: Callable[..., Any], given: dict[str, Any], what: str, step: Callable[[Any, Any, str], Any]
) -> dict[str, Any]:
    known = annotations.hints(function)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    rest = next((known.get(p.name, Any) for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), Any)
    return {
        name: step(value, known.get(name, Any) if name in named else rest, f"{what}argument {name}")
        for name, value in given.items()
    }
