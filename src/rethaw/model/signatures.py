"""What an agent takes and gives, written down with its version as JSON Schema, and made a function again of it.

`of` writes; `stand_in` reads: a function with the same parameters and types, so that whoever has only the version's
record checks and describes arguments with the code that checks and describes a real function's (`typed`, `annotations`).
What pydantic checks is described, and checked in the sandbox, where pydantic and its validators are."""

from __future__ import annotations

import contextlib
import enum
import inspect
import json
import types
import typing
from collections.abc import Callable
from typing import Any, cast

from rethaw.model import annotations, typed
from rethaw.model.annotations import Unresolved, bare, name_of
from rethaw.model.errors import InvalidInput
from rethaw.model.types import Signature

LIMIT = 64 << 10  # bytes of JSON
_OPAQUE = "pydantic"  # the $comment of what only pydantic can check
_INT_KEYS = "^-?[0-9]+$"
_REF = "#/$defs/"
_SCALARS: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}
_TYPE_NAMES = {kind: name for name, kind in _SCALARS.items()}
_PLAIN_WORDS = ("pydantic.fields", "annotated_types")  # what of Annotated checks a value and does not change it
_Schema = dict[str, Any]


class _Shown:
    """A default value that JSON cannot hold."""

    def __repr__(self) -> str:
        return "..."


# ---------------------------------------------------------------- writing


def of(function: Callable[..., Any]) -> Signature | None:
    """The record of `function` (or class); None for one that is too much to write down."""
    known, taken, given = annotations.hints(function), _Writer(), _Writer()
    properties: _Schema = {}
    required: list[str] = []
    more: _Schema | bool = False
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        hint = known.get(parameter.name, Any)
        schema = taken.schema(hint)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            more = schema
            continue
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
        else:
            with contextlib.suppress(InvalidInput):  # a default that JSON cannot hold
                schema = {**schema, "default": typed.dump(parameter.default, hint, parameter.name)}
        properties[parameter.name] = schema
    arguments: _Schema = {"type": "object", "properties": properties, "required": required}
    if said := inspect.getdoc(function):
        arguments["description"] = said
    arguments |= {"additionalProperties": more, **taken.rest()}
    result = {**given.schema(annotations.returned(function)[1]), **given.rest()}
    made = Signature(arguments=arguments, result=result)
    return made if len(made.model_dump_json()) <= LIMIT else None


class _Writer:
    """One schema with its definitions."""

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}
        self._defs: dict[str, _Schema] = {}

    def rest(self) -> _Schema:
        return {"$defs": self._defs} if self._defs else {}

    def schema(self, annotation: Any) -> _Schema:
        if isinstance(annotation, Unresolved):
            return {}
        if annotations.is_pydantic(annotation):
            return self._pydantic(annotation)
        plain = bare(annotation)
        origin, args = typing.get_origin(plain) or plain, typing.get_args(plain)
        if plain in _TYPE_NAMES:
            return {"type": _TYPE_NAMES[plain]}
        if origin in annotations.UNIONS:
            return {"anyOf": [self.schema(arg) for arg in args]}
        if origin in annotations.LISTS:
            return self._list(args, unique=origin in (set, frozenset))
        if origin in annotations.DICTS:
            keys, kind = (args[0], args[1]) if args else (Any, Any)
            out: _Schema = {"type": "object", "additionalProperties": self.schema(kind)}
            return {**out, "propertyNames": {"pattern": _INT_KEYS}} if bare(keys) is int else out
        if origin is typing.Literal:
            return {"enum": [choice.value if isinstance(choice, enum.Enum) else choice for choice in args]}
        if inspect.isclass(plain) and issubclass(plain, enum.Enum):
            return {"enum": [member.value for member in plain]}
        if annotations.fields(plain) is not None:
            return self._fields(plain)
        return {}

    def _list(self, args: tuple[Any, ...], *, unique: bool) -> _Schema:
        if len(args) > 1 and args[-1] is not Ellipsis:
            places = [self.schema(arg) for arg in args]
            return {"type": "array", "prefixItems": places, "minItems": len(args), "maxItems": len(args)}
        out: _Schema = {"type": "array", "items": self.schema(args[0]) if args else {}}
        return {**out, "uniqueItems": True} if unique else out

    def _fields(self, kind: Any) -> _Schema:
        """A dataclass or TypedDict, once for each."""
        if kind not in self._names:
            name = self._name(kind)
            found = annotations.fields_of(kind)
            self._defs[name] = {
                "title": kind.__name__,
                "type": "object",
                "properties": {field: self.schema(of) for field, of in found.items()},
                "required": [field for field in found if field in typed.required_of(kind)],
                "additionalProperties": False,
            }
        return {"$ref": _REF + self._names[kind]}

    def _pydantic(self, annotation: Any) -> _Schema:
        title = name_of(annotation)
        if annotation not in self._names:
            name = self._name(annotation)
            schema: _Schema = {}
            try:
                template = f"{_REF}{name}.{{model}}"
                schema = annotations.adapter(annotation).json_schema(ref_template=template)
            except Exception:  # what JSON Schema has no words for
                pass
            for inner, what in cast("_Schema", schema.pop("$defs", {})).items():
                self._defs[f"{name}.{inner}"] = what
            if "$ref" in schema:  # of a model that holds itself
                schema = {**self._defs[str(schema["$ref"]).removeprefix(_REF)]}
            if schema.get("type") == "string" and not _checks_only(annotation):
                del schema["type"]  # a validator may take something else
            self._defs[name] = {**schema, "title": title, "$comment": _OPAQUE}
        return {"$ref": _REF + self._names[annotation]}

    def _name(self, kind: Any) -> str:
        plain = "".join(c if c.isalnum() or c == "_" else "_" for c in name_of(kind)).strip("_")[:60] or "Value"
        name, n = plain, 1
        while name in self._names.values():
            n += 1
            name = f"{plain}_{n}"
        self._names[kind] = name
        return name


def _checks_only(annotation: Any) -> bool:
    words = getattr(annotation, "__metadata__", ())
    return bool(words) and all(type(word).__module__.startswith(_PLAIN_WORDS) for word in words)


# ---------------------------------------------------------------- reading


def stand_in(name: str, signature: Signature) -> Callable[..., Any]:
    """A function that takes what agent `name` takes. Raises InvalidInput for a record that `of` does not write."""
    given, reader = signature.arguments, _Reader(signature.arguments)

    def function(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(name)

    keyword, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    kinds: dict[str, Any] = {}
    try:
        needed, own = set(given["required"]), next(n for n in ("ctx", "context", "own") if n not in given["properties"])
        parameters = [inspect.Parameter(own, inspect.Parameter.POSITIONAL_ONLY)]
        for argument, schema in given["properties"].items():
            default: Any = empty if argument in needed else schema.get("default", _Shown())
            parameters.append(inspect.Parameter(argument, keyword, default=default))
            kinds[argument] = reader.kind(schema)
        if (more := given["additionalProperties"]) is not False:
            rest = next(n for n in ("arguments", "more", "others") if n not in kinds)
            parameters.append(inspect.Parameter(rest, inspect.Parameter.VAR_KEYWORD))
            kinds[rest] = reader.kind(more)
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {**kinds, "return": _Reader(signature.result).kind(signature.result)}
        function.__doc__ = given.get("description")
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RecursionError) as error:
        raise InvalidInput(
            f"the signature of agent {name} cannot be read: {type(error).__name__}: {error}",
            remedy="deploy it with this version of rethaw",
        ) from None
    function.__name__ = function.__qualname__ = name
    return function


class _Reader:
    """Types of one schema."""

    def __init__(self, schema: _Schema) -> None:
        self._defs: dict[str, _Schema] = schema.get("$defs", {})
        self._made: dict[str, Any] = {}

    def kind(self, schema: Any) -> Any:
        """The annotation. Raises KeyError, TypeError, ValueError."""
        schema = cast("_Schema", schema)
        if "$ref" in schema:
            return self._named(str(schema["$ref"]).removeprefix(_REF))
        if "anyOf" in schema:
            return typing.Union[tuple(self.kind(one) for one in schema["anyOf"])]  # noqa: UP007
        if "enum" in schema:
            return typing.Literal[tuple(schema["enum"])]
        name = schema.get("type")
        if name is None:
            return Any
        if name == "array":
            if "prefixItems" in schema:
                return tuple[tuple(self.kind(one) for one in schema["prefixItems"])]  # type: ignore[misc]
            return list[self.kind(schema["items"])]  # type: ignore[misc]
        if name == "object":
            keys = int if "propertyNames" in schema else str
            return dict[keys, self.kind(schema["additionalProperties"])]  # type: ignore[misc,valid-type]
        return _SCALARS[name]

    def _named(self, name: str) -> Any:
        if name in self._made:
            return self._made[name]
        schema = self._defs[name]
        title = str(schema["title"])
        if schema.get("$comment") == _OPAQUE:
            base: Any = str if schema.get("type") == "string" else Any
            self._made[name] = made = typing.NewType(title, base)  # type: ignore[misc]
            if fields := schema.get("properties"):
                made.model_fields = {  # type: ignore[attr-defined]
                    field: types.SimpleNamespace(annotation=self._lenient(of)) for field, of in fields.items()
                }
            return made
        fields, needed = schema["properties"], frozenset(schema["required"])
        self._made[name] = kind = typing.TypedDict(title, {})  # type: ignore[operator]
        own: Any = kind
        own.__annotations__ = {field: self.kind(of) for field, of in fields.items()}
        own.__required_keys__, own.__optional_keys__ = needed, frozenset(fields) - needed
        return kind

    def _lenient(self, schema: Any) -> Any:
        """For a reader only: what pydantic writes has forms that `of` does not write."""
        try:
            if isinstance(schema, dict) and "$ref" in schema:
                return typing.NewType(str(cast("_Schema", schema)["$ref"]).rpartition("/")[2].rpartition(".")[2], Any)  # type: ignore[misc]
            if isinstance(schema, dict) and "const" in schema:
                return typing.Literal[cast("_Schema", schema)["const"]]
            if isinstance(schema, dict) and "anyOf" in schema:
                return typing.Union[tuple(self._lenient(one) for one in cast("_Schema", schema)["anyOf"])]  # noqa: UP007
            return self.kind(schema)
        except (KeyError, TypeError, ValueError, AttributeError):
            return Any


# ---------------------------------------------------------------- checking


def usage(function: Callable[..., Any]) -> str:
    """`it takes goal: str, depth: int = 3`."""
    known, words = annotations.hints(function), list[str]()
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        kind = name_of(known.get(parameter.name, Any))
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            words.append("any other")
        elif parameter.default is inspect.Parameter.empty:
            words.append(f"{parameter.name}: {kind}")
        else:
            default = parameter.default
            shown = repr(default) if isinstance(default, _Shown) else json.dumps(default, ensure_ascii=False)
            words.append(f"{parameter.name}: {kind} = {shown}")
    return f"it takes {', '.join(words)}" if words else "it takes no arguments"


def check(name: str, signature: Signature, args: dict[str, Any]) -> None:
    """Raises InvalidInput naming the argument, its value and what agent `name` takes."""
    function = stand_in(name, signature)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    named = {p.name: p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    for given in args:
        if given not in named and len(named) == len(parameters):
            raise InvalidInput(f"agent {name} has no argument {given[:100]!r}", remedy=usage(function), argument=given)
    for wanted, parameter in named.items():
        if wanted not in args and parameter.default is inspect.Parameter.empty:
            raise InvalidInput(f"agent {name} needs argument {wanted!r}", remedy=usage(function), argument=wanted)
    try:
        typed.built_arguments(function, args, f"agent {name}: ")
    except RecursionError:
        raise InvalidInput(f"agent {name}: its arguments are nested too deeply") from None
