"""Children of a session, as its agent sees them. Standard library only, Python >= 3.9."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Dict, Generic, List, Optional, Sequence, Tuple, TypeVar

from rethaw.channel.payload import embed
from rethaw.guest import protocol
from rethaw.model.durations import Duration
from rethaw.model.errors import ChildFailed, InvalidInput, WaitTimeout

if TYPE_CHECKING:
    from typing import ParamSpec, Protocol

    from rethaw.guest.acontext import AsyncContext
    from rethaw.guest.context import Context

    P = ParamSpec("P")
    R_co = TypeVar("R_co", covariant=True)

    class Spawnable(Protocol[P, R_co]):
        """An agent, whichever side of the sandbox's wall defines it."""

        @property
        def name(self) -> str: ...

        def local(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


R = TypeVar("R")


class Handle:
    """A child by its `id`. `end`: how it ended, once that was waited for."""

    def __init__(self, id: str, agent: Any = None) -> None:
        self.id = id
        self._agent = agent
        self._end: Optional[Dict[str, Any]] = None
        self._value: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r}{', ended' if self._end is not None else ''})"

    @property
    def done(self) -> bool:
        """Whether its end was waited for already: `result()` returns at once."""
        return self._end is not None

    def ended(self, outcome: Dict[str, Any], value: Any) -> None:
        """It ended like this."""
        self._end, self._value = outcome, value

    def failure(self) -> Optional[ChildFailed]:
        """Why it has no result; None when it has one. Only of one that has ended."""
        end = self._end or {}
        state, reason, detail = (end.get(name) for name in ("state", "reason", "detail"))
        if state == "completed":
            return None
        said = f": {detail}" if detail else f" ({reason})" if reason not in (None, "none") else ""
        return ChildFailed(
            f"child {self.id} {'was ' if state == 'cancelled' else ''}{state}{said}",
            remedy=f"`rethaw show {self.id}` says more",
            child=self.id,
            state=state,
            reason=reason,
            detail=detail,
        )

    def value(self) -> Any:
        """The result of one that has ended. Raises ChildFailed."""
        failed = self.failure()
        if failed is not None:
            raise failed
        return self._built()

    def outcome(self) -> Any:
        """The result, or the ChildFailed that `result()` raises."""
        return self.failure() or self._built()

    def _built(self) -> Any:
        """The result as the type that its agent is annotated with, where that is known."""
        function = getattr(self._agent, "function", None)
        if function is None:
            return self._value
        from rethaw.model import annotations, typed

        return typed.build(self._value, annotations.returned(function)[1], f"child {self.id}: the result")

    def late(self, timeout: Optional[Duration]) -> WaitTimeout:
        return WaitTimeout(f"child {self.id} did not end within {timeout}")


class Child(Handle, Generic[R]):
    """A session that this one started: `ctx.spawn(agent, ...)`."""

    def __init__(self, context: Context, id: str, agent: Any = None) -> None:
        super().__init__(id, agent)
        self._context = context

    def result(self, timeout: Optional[Duration] = None) -> R:
        """What its agent returned, waiting for it. Raises ChildFailed when it failed or was cancelled, and WaitTimeout."""
        if self._end is None:
            try:
                self._context.wait_any(self, timeout=timeout)
            except WaitTimeout:
                raise self.late(timeout) from None
        value: R = self.value()
        return value

    def send(self, payload: Any) -> None:
        """Put a message into its inbox. It gets there once a snapshot that contains this moment is durable."""
        self._context._call("child_send", message_body(self.id, payload))  # pyright: ignore[reportPrivateUsage]

    def cancel(self) -> None:
        """End it, with its agent's grace period; nothing happens to one that has ended."""
        self._context._call("child_cancel", cancel_body(self.id))  # pyright: ignore[reportPrivateUsage]


class AsyncChild(Handle, Generic[R]):
    """`Child` for asyncio."""

    def __init__(self, context: AsyncContext, id: str, agent: Any = None) -> None:
        super().__init__(id, agent)
        self._context = context

    async def result(self, timeout: Optional[Duration] = None) -> R:
        """What its agent returned, waiting for it. Raises ChildFailed when it failed or was cancelled, and WaitTimeout."""
        if self._end is None:
            try:
                await self._context.wait_any(self, timeout=timeout)
            except WaitTimeout:
                raise self.late(timeout) from None
        value: R = self.value()
        return value

    async def send(self, payload: Any) -> None:
        """Put a message into its inbox. It gets there once a snapshot that contains this moment is durable."""
        await self._context._call("child_send", message_body(self.id, payload))  # pyright: ignore[reportPrivateUsage]

    async def cancel(self) -> None:
        """End it, with its agent's grace period; nothing happens to one that has ended."""
        await self._context._call("child_cancel", cancel_body(self.id))  # pyright: ignore[reportPrivateUsage]


def spawn_body(agent: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> bytes:
    """The call's arguments: an agent of the same file or package, or the name of a deployed one. Raises InvalidInput."""
    if isinstance(agent, str):
        if args:
            raise InvalidInput(
                f"arguments of {agent!r} are given by name", remedy="write ctx.spawn(name, argument=...)"
            )
        name, given = agent, kwargs
    else:
        name, function = getattr(agent, "name", None), getattr(agent, "function", None)
        if not isinstance(name, str) or not callable(function):
            raise InvalidInput(f"{agent!r} is no agent", remedy="put @rethaw.agent over its function")
        from rethaw.model import typed

        given = typed.wire_arguments(function, bound(name, function, args, kwargs), f"agent {name!r}: ")
    return protocol.payload_body({"agent": name, "args": given})


def bound(name: str, function: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments by name. Raises InvalidInput when they do not fit the function."""
    full = inspect.signature(function)
    own = full.replace(parameters=list(full.parameters.values())[1:])
    try:
        bound = own.bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidInput(f"agent {name!r}: {error}", remedy=f"it takes {own}") from None
    given: Dict[str, Any] = {}
    for key, value in bound.arguments.items():
        if own.parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        else:
            given[key] = value
    return given


def message_body(child: str, payload: Any) -> bytes:
    return embed({"child": child}, protocol.checked_payload(payload))


def cancel_body(child: str) -> bytes:
    return protocol.to_json({"child": child}, "the child")


def checked(children: Sequence[Handle]) -> List[Handle]:
    """Those of a `wait_all` whose end is not known yet."""
    return [child for child in children if not isinstance(child, Handle) or not child.done]  # pyright: ignore[reportUnnecessaryIsInstance]
