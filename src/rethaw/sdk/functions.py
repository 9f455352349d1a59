"""What may stand under `@rethaw.agent`: a function, or a class with a method `run`; and the types it takes and gives."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rethaw.model import annotations
from rethaw.model.errors import InvalidInput

if TYPE_CHECKING:
    from rethaw.sdk.images import Image

R_co = TypeVar("R_co", covariant=True)


class RunsAsync(Protocol[R_co]):
    """An instance of an agent's class: `async def run(self) -> R`."""

    def run(self) -> Coroutine[Any, Any, R_co]: ...


class RunsSteps(Protocol[R_co]):
    """... whose `run` is a generator that returns R."""

    def run(self) -> Generator[Any, Any, R_co]: ...


class RunsAsyncSteps(Protocol):
    """... whose `run` is an async generator."""

    def run(self) -> AsyncIterator[Any]: ...


class Runs(Protocol[R_co]):
    """... with a plain `run(self) -> R`."""

    def run(self) -> R_co: ...


_BY_NAME = "arguments travel by name; make it an ordinary parameter"


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """The session's arguments: without the Context."""
    full = inspect.signature(function)
    return full.replace(parameters=list(full.parameters.values())[1:], return_annotation=inspect.Signature.empty)


def check_form(function: Callable[..., Any]) -> None:
    """Raises InvalidInput for what cannot be called with a Context and named arguments."""
    name = getattr(function, "__name__", repr(function))
    write = f"write def {name}(ctx, ...)"
    if inspect.isclass(function):
        write = "write def __init__(self, ctx, ...)"
        run = inspect.getattr_static(function, "run", None)
        if not inspect.isfunction(run):
            raise InvalidInput(f"agent {name!r} is a class without a method run", remedy="write def run(self) -> ...")
        if needed := [
            p.name
            for p in list(inspect.signature(run).parameters.values())[1:]
            if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]:
            raise InvalidInput(
                f"agent {name!r}: its run takes {', '.join(needed)}",
                remedy="take arguments in __init__(self, ctx, ...); run has only self",
            )
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise InvalidInput(f"agent {name!r} has no parameter for its Context", remedy=write)
    for parameter in parameters[1:]:
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise InvalidInput(f"agent {name!r}: parameter {parameter.name!r} cannot be given by name", remedy=_BY_NAME)


def check_types(function: Callable[..., Any], image: Image, *, all_there: bool) -> None:
    """Raises InvalidInput for a parameter or result that JSON cannot hold, and for a pydantic model that the image cannot
    read. `all_there`: a name that cannot be found is an error as well (the file has been read to its end)."""
    name = getattr(function, "__name__", repr(function))
    yielded, result = annotations.returned(function)
    known = annotations.hints(function)
    kinds = {f"parameter {p!r}": known.get(p, Any) for p in signature(function).parameters}
    kinds |= {"its result": result, "what it yields": yielded}
    for what, kind in kinds.items():
        if all_there or not isinstance(kind, annotations.Unresolved):
            annotations.check(kind, f"agent {name!r}: {what}")
        if image.bare_of_packages and annotations.needs_pydantic(kind):
            raise InvalidInput(
                f"agent {name!r}: {what} is of type {annotations.name_of(kind)}, which needs pydantic inside the sandbox, "
                "and its image has none",
                remedy='give it image=Image.debian().pip_install("pydantic")',
            )
