"""What the annotations of a function say, and whether JSON can hold values of those types.

Standard library only, Python >= 3.9. pydantic is used only for annotations that are pydantic's own; whoever wrote them
has imported it.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, cast

from rethaw.model.errors import InvalidInput

REMEDY = "use str, int, float, bool, None, lists, dictionaries, dataclasses or pydantic models"
LISTS = (
    list,
    tuple,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Collection,
    collections.abc.Iterable,
)
DICTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_PLAIN = (str, bool, int, float)
UNIONS = (typing.Union, getattr(types, "UnionType", typing.Union))
_WRAPPERS = ("Required", "NotRequired", "ReadOnly", "Final")
_NEVER = ("typing.NoReturn", "typing.Never")
_PYDANTIC = ("pydantic", "annotated_types")


class Unresolved:
    """An annotation that names what is not there (yet)."""

    def __init__(self, text: str, problem: str) -> None:
        self.text = text
        self.problem = problem


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by name ("return" among them), each resolved by itself; Unresolved where that fails."""
    target: Any = function.__init__ if inspect.isclass(function) else inspect.unwrap(function)  # type: ignore[misc]
    try:
        found: dict[str, Any] = dict(getattr(target, "__annotations__", None) or {})
    except NameError as error:  # Python 3.14 evaluates all of them at once
        return {name: Unresolved(name, str(error)) for name in inspect.signature(function).parameters}
    module = sys.modules.get(getattr(function, "__module__", "") or "")
    known = getattr(target, "__globals__", None) or (vars(module) if module is not None else {})
    out: dict[str, Any] = {}
    for name, annotation in found.items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            out[name] = typing.get_type_hints(holder, known, None, include_extras=True)[name]
        except Exception as error:  # whatever evaluating the text raises
            out[name] = Unresolved(str(annotation), str(error) or type(error).__name__)
    return out


def returned(function: Callable[..., Any]) -> tuple[Any, Any]:
    """What a plain call of `function` gives: (of what it yields, of its result); Any where nothing is said. A class is
    called by its method `run`."""
    method = getattr(function, "run", None) if inspect.isclass(function) else function
    if method is None:
        return Any, Any
    annotation = hints(method).get("return", Any)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if inspect.isgeneratorfunction(method):
        if origin is collections.abc.Generator and len(args) == 3:
            return args[0], args[2]
        return (args[0] if args else Any), (None if args else Any)
    if inspect.isasyncgenfunction(method):
        return (args[0] if args else Any), None
    return Any, annotation


def check(annotation: Any, what: str) -> None:
    """Raises InvalidInput, naming `what`, the type and the remedy, for an annotation that JSON cannot hold."""
    _walk(annotation, what, ())


def needs_pydantic(annotation: Any, above: tuple[Any, ...] = ()) -> bool:
    """Whether pydantic has to be there to read such a value."""
    plain = bare(annotation)
    if isinstance(annotation, Unresolved) or plain in above:
        return False
    if is_pydantic(annotation):
        return True
    within = typing.get_args(plain)
    if inspect.isclass(plain) and (dataclasses.is_dataclass(plain) or is_typed_dict(plain)):
        within = tuple(fields_of(plain).values())
    return any(needs_pydantic(kind, (*above, plain)) for kind in within)


def name_of(annotation: Any) -> str:
    """As a person would write it."""
    if isinstance(annotation, Unresolved):
        return annotation.text
    if annotation is inspect.Parameter.empty or annotation is Any or annotation is object:
        return "JSON"
    if annotation is None or annotation is type(None):
        return "None"
    if typing.get_origin(annotation) in UNIONS:
        return " | ".join(name_of(arg) for arg in typing.get_args(annotation))
    if annotation is Ellipsis:
        return "..."
    if hasattr(annotation, "__metadata__"):
        return name_of(annotation.__origin__)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return f"Literal[{', '.join(repr(arg) for arg in args)}]"
    if origin is not None and args:
        return f"{name_of(origin)}[{', '.join('Any' if arg is Any else name_of(arg) for arg in args)}]"
    return str(getattr(annotation, "__name__", annotation)).replace("typing.", "")


def models(annotation: Any) -> dict[str, dict[str, str]]:
    """The models, dataclasses and TypedDicts that it is made of, with their fields' types, for a help text."""
    own = fields(annotation)
    out = {} if own is None else {name_of(annotation): own}
    for arg in typing.get_args(annotation):
        out.update(models(arg))
    return out


def fields(annotation: Any) -> dict[str, str] | None:
    """Field names and types of a model, dataclass or TypedDict; None for anything else."""
    if not inspect.isclass(annotation) and not hasattr(annotation, "__supertype__"):  # signatures.py describes by these
        return None
    known = getattr(annotation, "model_fields", None)
    if isinstance(known, dict):
        found = cast("dict[str, Any]", known)
        return {name: name_of(getattr(field, "annotation", Any)) for name, field in found.items()}
    if dataclasses.is_dataclass(annotation) or is_typed_dict(annotation):
        return {name: name_of(kind) for name, kind in fields_of(annotation).items()}
    return None


def bare(annotation: Any) -> Any:
    """Without NewType, type aliases, Annotated and type variables."""
    while True:
        if annotation is inspect.Parameter.empty or annotation is object:
            return Any
        if annotation is None:
            return type(None)
        if isinstance(annotation, typing.TypeVar):
            bound = annotation.__bound__
            annotation = Any if bound is None else bound
            continue
        if hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        elif getattr(typing.get_origin(annotation), "_name", None) in _WRAPPERS:
            annotation = typing.get_args(annotation)[0]
        else:
            return annotation


def is_pydantic(annotation: Any) -> bool:
    """A model, a dataclass of pydantic's, an Annotated with pydantic's words, or a union that has one of these: for that
    pydantic knows best which one a value is."""
    if any(type(word).__module__.partition(".")[0] in _PYDANTIC for word in getattr(annotation, "__metadata__", ())):
        return True
    plain = bare(annotation)
    if typing.get_origin(plain) in UNIONS:
        return any(is_pydantic(arg) for arg in typing.get_args(plain))
    return inspect.isclass(plain) and hasattr(plain, "__pydantic_validator__")


def is_typed_dict(annotation: Any) -> bool:
    return (
        inspect.isclass(annotation) and issubclass(annotation, dict) and hasattr(cast("Any", annotation), "__total__")
    )


def fields_of(annotation: Any) -> dict[str, Any]:
    """Of a dataclass or TypedDict; an unresolvable one is Any."""
    try:
        found = typing.get_type_hints(annotation, include_extras=True)
    except Exception:  # a name that is only there for type checkers
        found = dict.fromkeys(annotation.__annotations__, Any)
    if dataclasses.is_dataclass(annotation):
        return {field.name: found.get(field.name, Any) for field in dataclasses.fields(annotation) if field.init}
    return found


def _walk(annotation: Any, what: str, above: tuple[Any, ...]) -> None:
    if isinstance(annotation, Unresolved):
        raise InvalidInput(
            f"{what} is of type {annotation.text!r}, which cannot be found: {annotation.problem}",
            remedy="import it at the top of the file, outside of `if TYPE_CHECKING`",
        )
    if is_pydantic(annotation):
        adapter(annotation, what)
        return
    plain = bare(annotation)
    origin, args = typing.get_origin(plain) or plain, typing.get_args(plain)
    if plain in above or plain is Any or origin in _PLAIN or origin is type(None) or str(plain) in _NEVER:
        return
    above = (*above, plain)
    if origin in UNIONS or origin in LISTS:
        for arg in args:
            if arg is not Ellipsis:
                _walk(arg, what, above)
    elif origin in DICTS:
        if args and bare(args[0]) not in (str, int, Any) and typing.get_origin(bare(args[0])) is not typing.Literal:
            raise InvalidInput(
                f"{what} is of type {name_of(annotation)}, whose keys are {name_of(args[0])}",
                remedy="JSON has text keys only: use dict[str, ...]",
            )
        for arg in args[1:]:
            _walk(arg, what, above)
    elif origin is typing.Literal:
        for value in args:
            if not isinstance(value, (str, int, bool, type(None))) and not isinstance(value, enum.Enum):
                raise InvalidInput(f"{what} is of type {name_of(annotation)}, which JSON cannot hold", remedy=REMEDY)
    elif inspect.isclass(plain) and issubclass(plain, enum.Enum):
        for member in plain:
            if not isinstance(member.value, (*_PLAIN, type(None))):
                raise InvalidInput(
                    f"{what} is of type {name_of(annotation)}, whose {member.name} is {member.value!r}",
                    remedy="give the members text or numbers as values",
                )
    elif inspect.isclass(plain) and (dataclasses.is_dataclass(plain) or is_typed_dict(plain)):
        for name, kind in fields_of(plain).items():
            _walk(kind, f"{what}: field {name!r} of {plain.__name__}", above)
    else:
        module = getattr(plain, "__module__", "")
        full = f"{module}.{name_of(plain)}" if module not in ("builtins", "typing", "") else name_of(plain)
        raise InvalidInput(f"{what} is of type {full}, which JSON cannot hold", remedy=REMEDY)


_adapters: dict[Any, Any] = {}


def adapter(annotation: Any, what: str = "a value") -> Any:
    """pydantic's TypeAdapter of it. Raises InvalidInput."""
    known = _adapters.get(annotation)
    if known is None:
        pydantic: Any = __import__("pydantic")
        try:
            known = pydantic.TypeAdapter(annotation)
        except Exception as error:  # PydanticSchemaGenerationError, PydanticUserError, NameError of a forward reference
            said = str(error).partition("\n")[0]
            raise InvalidInput(
                f"{what} is of type {name_of(annotation)}, which pydantic does not take: {said}", remedy=REMEDY
            ) from None
        _adapters[annotation] = known
    return known
