"""Runs an agent that is a Python function: `python3 -m rethaw.guest.runner agent.py::coder`.

The file is looked for in RETHAW_APP (default /app). What the function returns becomes the session's result. An
exception goes to stderr with its traceback, and the exit status is 1.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Generator, List, cast

from rethaw.guest import protocol
from rethaw.guest.acontext import AsyncContext
from rethaw.guest.context import Context
from rethaw.guest.definitions import Agent
from rethaw.model import annotations, typed
from rethaw.model.errors import InvalidInput, NoRetry, NotFound, RethawError


def load(entry: str, directory: Path) -> Callable[..., Any]:
    """The function that `entry` ("FILE.py::NAME", NAME optional when the file has one agent) names.
    Raises NotFound, InvalidInput; what the file itself raises passes through."""
    name_of_file, _, name = entry.partition("::")
    path = directory / name_of_file
    if not path.is_file():
        raise NotFound(f"there is no file {path}", remedy="name a file of the agent's code, such as agent.py::coder")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{path} is not a Python file", remedy="its name has to end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    for place in {str(directory): None, str(path.parent): None}:
        sys.path.insert(0, place)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error, path) from error
    everything = vars(module)
    agents = {key: value for key, value in everything.items() if isinstance(value, Agent)}
    if name:
        found = everything.get(name) or next((a for a in agents.values() if a.name == name), None)
    else:
        found = next(iter(agents.values())) if len(agents) == 1 else None
    if not callable(found):
        known = ", ".join(agents) or "none"
        raise NotFound(f"{path} has no agent {name!r}; it defines: {known}", remedy=f"write {name_of_file}::NAME")
    return found.function if isinstance(found, Agent) else cast("Callable[..., Any]", found)


def _missing(error: ModuleNotFoundError, path: Path) -> InvalidInput:
    """A module that is not in the image. `name` of the package may differ from that of the module."""
    name = (error.name or "").partition(".")[0]
    return InvalidInput(
        f"{path.name} imports {error.name}, which is not in the image: {error}",
        remedy=f'give the agent image=Image.debian().pip_install("{name}"), or Image.from_env()',
    )


def run(function: Callable[..., Any]) -> None:
    """Call it with its Context and the session's arguments, and report what it returns."""
    context = Context()
    args = context.ready() if protocol.frozen_before_call() else context.args
    context.result(call(function, context, AsyncContext, args))


def call(
    function: Callable[..., Any], context: Context, for_async: Callable[[], AsyncContext], args: Dict[str, Any]
) -> Any:
    """What `function` returns, as JSON holds it; `args` are JSON as well. What a generator yields goes into the outbox, one
    message each; its `return` is the result. A class is made with the arguments, and its `run` called. `for_async`: makes
    the Context of an `async def`, in the loop that runs it."""
    try:
        takes = inspect.signature(function)
        try:
            takes.bind(context, **args)
        except TypeError as error:
            own = takes.replace(parameters=list(takes.parameters.values())[1:])
            raise InvalidInput(f"the agent's arguments do not fit: {error}", remedy=f"it takes {own}") from None
        given = typed.built_arguments(function, args)
    except InvalidInput as error:
        error.details["arguments"] = True  # whoever started the session is at fault: our frames are of no use
        raise
    yielded, result = annotations.returned(function)
    how = cast("Any", function).run if inspect.isclass(function) else function
    if inspect.iscoroutinefunction(how) or inspect.isasyncgenfunction(how):
        value = asyncio.run(_call_async(function, how, for_async, given, yielded))
    else:
        made = cast("Callable[..., Any]", function)  # a class is one as well
        value = made(context, **given)
        if inspect.isclass(function):
            value = value.run()
        if inspect.isgeneratorfunction(how):
            value = _sent(value, context, yielded)
    return typed.dump(value, result, "the agent's result")


def _sent(steps: Generator[Any, Any, Any], context: Context, kind: Any) -> Any:
    while True:
        try:
            context.send(typed.dump(next(steps), kind, "what the agent yields"))
        except StopIteration as end:
            return end.value


async def _call_async(
    function: Callable[..., Any], how: Any, for_async: Callable[[], AsyncContext], args: Dict[str, Any], kind: Any
) -> Any:
    context = for_async()
    value: Any = function(context, **args)
    if inspect.isclass(function):
        value = value.run()
    if not inspect.isasyncgenfunction(how):
        return await value
    async for message in value:
        await context.send(typed.dump(message, kind, "what the agent yields"))


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python3 -m rethaw.guest.runner FILE.py::NAME", file=sys.stderr)
        return 2
    entry = sys.argv[1]
    sys.argv = [entry.partition("::")[0]]
    try:
        try:
            function = load(entry, Path(os.environ.get("RETHAW_APP", "/app")))
        except (NotFound, InvalidInput) as error:
            print(f"rethaw: {error}", file=sys.stderr)  # whose mistake it is has no use for our frames
            return 1
        run(function)
    except RethawError as error:
        if "arguments" not in error.details:
            traceback.print_exc()
        print(f"rethaw: {error}", file=sys.stderr)
        if isinstance(error, NoRetry) or "arguments" in error.details:  # the next attempt would have the same
            _say_no_retry(error)
        return 1
    except Exception as error:
        traceback.print_exc()
        if "HTTP_PROXY" not in os.environ and _wanted_a_host(error):
            print(
                'rethaw: this agent may connect to no host, and resolves no name; add allow=["HOST"] to it '
                "(or rethaw run --allow HOST)",
                file=sys.stderr,
            )
        return 1
    return 0


def _wanted_a_host(error: BaseException) -> bool:
    """Whether it comes of a name that could not be resolved or a network that is not there, however a client has wrapped that."""
    seen: List[BaseException] = []
    todo: List[object] = [error]
    while todo and len(seen) < 50:
        one = todo.pop()
        if not isinstance(one, BaseException) or any(one is other for other in seen):
            continue
        if type(one).__name__ == "gaierror" or (isinstance(one, OSError) and one.errno == errno.ENETUNREACH):
            return True
        seen.append(one)
        todo += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
    return False


def _say_no_retry(error: RethawError) -> None:
    try:
        Context().emit(protocol.NO_RETRY, error=str(error)[:1000])
    except Exception:
        traceback.print_exc()  # then it is tried again


if __name__ == "__main__":
    sys.exit(main())
