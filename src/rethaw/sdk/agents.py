"""Agent definitions: `@rethaw.agent(...)` over an ordinary function whose first parameter is its Context."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from rethaw.model import annotations, typed
from rethaw.model.durations import Duration, optional_seconds, seconds
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.nearest import did_you_mean, nearest
from rethaw.sdk.functions import Runs, RunsAsync, RunsAsyncSteps, RunsSteps, check_form, check_types, signature
from rethaw.sdk.images import Image, checked_env
from rethaw.sdk.limits import Budget, Retries, checked_budget, retries_of
from rethaw.sdk.sizes import size_bytes
from rethaw.sdk.starting import Starting, starting

if TYPE_CHECKING:
    from rethaw.model.image_types import ImageSpec
    from rethaw.model.types import AgentSpec
    from rethaw.sdk.aclient import AsyncClient
    from rethaw.sdk.asession import AsyncSession
    from rethaw.sdk.client import Client
    from rethaw.sdk.package import Package
    from rethaw.sdk.session import Session

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

TEMPLATES = ("none", "auto")
ENGINES = ("gvisor", "qemu")
DURABILITIES = ("local", "replicated", "relaxed")


@dataclass(frozen=True)
class Options:
    """What `@agent` was given, checked. Sizes in bytes, times in seconds."""

    name: str
    image: Image = field(default_factory=Image)
    env: dict[str, str] = field(default_factory=dict[str, str])
    workdir: str = "/"
    memory: int = 512 << 20
    pids: int = 1024
    durability: str = "local"
    idle_suspend: float | None = 20.0
    snapshot_every: float = 60.0
    hold_max: float = 1800.0
    max_duration: float | None = None
    grace: float = 10.0
    keep_snapshots: float = 86_400.0
    keep_size: int = 5 << 30
    template: str = "none"
    engine: str | None = None
    starting: Starting = field(default_factory=Starting)
    retries: Retries | None = None
    budget: Budget | None = None
    allow: tuple[str, ...] = ()
    nap: float | None = None

    def spec(
        self,
        *,
        entry: str | None = None,
        code: str | None = None,
        command: tuple[str, ...] = (),
        image: ImageSpec | None = None,
    ) -> AgentSpec:
        """The wire form, for a Python function (`entry` in `code`) or for a command."""
        from rethaw.model.enums import Durability
        from rethaw.model.types import AgentSpec

        return AgentSpec(
            name=self.name,
            image=image or self.image.spec,
            command=command,
            entry=entry,
            code=code,
            env=self.env,
            workdir=self.workdir,
            memory_bytes=self.memory,
            pids=self.pids,
            durability=Durability(self.durability),
            idle_suspend_s=self.idle_suspend,
            snapshot_every_s=self.snapshot_every,
            hold_max_s=self.hold_max,
            max_duration_s=self.max_duration,
            grace_s=self.grace,
            keep_all_s=self.keep_snapshots,
            keep_bytes=self.keep_size,
            template=cast("Any", self.template),
            engine=cast("Any", self.engine),
            retries=self.retries.spec() if self.retries is not None else None,
            budget=self.budget.spec() if self.budget is not None else None,
            allow=self.allow,
            nap_s=self.nap,
        )


def options(
    name: str,
    *,
    image: Image | None = None,
    env: dict[str, str] | None = None,
    workdir: str = "/",
    memory: str | int = "512MiB",
    pids: int = 1024,
    durability: str = "local",
    idle_suspend: Duration | None = "20s",
    snapshot_every: Duration = "60s",
    hold_max: Duration = "30m",
    max_duration: Duration | None = None,
    grace: Duration = "10s",
    keep_snapshots: Duration = "24h",
    keep_size: str | int = "5GiB",
    template: str = "none",
    engine: str | None = None,
    queue: str | None = None,
    priority: int | None = None,
    ttl: Duration | None = None,
    tags: Sequence[str] = (),
    retries: int | Retries | None = None,
    budget: Budget | None = None,
    allow: Sequence[str] = (),
    nap: Duration | None = None,
) -> Options:
    """Check what a person wrote. Raises InvalidInput naming the value and the remedy."""
    if not name or len(name) > 128 or not all(c.isalnum() or c in "._-" for c in name) or not name[0].isalnum():
        raise InvalidInput(f"{name!r} is not an agent's name", remedy="use letters, digits, '.', '_' and '-'")
    if durability not in DURABILITIES:
        raise InvalidInput(f"durability {durability!r} is unknown", remedy=f"use one of {', '.join(DURABILITIES)}")
    if engine is not None and engine not in ENGINES:
        raise InvalidInput(f"engine {engine!r} is unknown", remedy=f"use one of {', '.join(ENGINES)}")
    if template not in TEMPLATES:
        raise InvalidInput(f"template {template!r} is unknown", remedy=f"use one of {', '.join(TEMPLATES)}")
    if isinstance(pids, bool) or not isinstance(pids, int) or pids < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInput(f"pids {pids!r} is not a number of processes", remedy="pass a positive integer")
    if not workdir.startswith("/"):
        raise InvalidInput(f"workdir {workdir!r} is not absolute", remedy="begin it with /")
    return Options(
        name=name,
        image=image or Image(),
        env=checked_env(env or {}),
        workdir=workdir,
        memory=size_bytes(memory),
        pids=pids,
        durability=durability,
        idle_suspend=optional_seconds(idle_suspend),
        snapshot_every=seconds(snapshot_every),
        hold_max=seconds(hold_max),
        max_duration=optional_seconds(max_duration),
        grace=seconds(grace),
        keep_snapshots=seconds(keep_snapshots),
        keep_size=size_bytes(keep_size),
        template=template,
        engine=engine,
        starting=starting(queue=queue, priority=priority, ttl=ttl, tags=tags),
        retries=retries_of(retries),
        budget=checked_budget(budget),
        allow=_allowed(allow),
        nap=optional_seconds(nap),
    )


def _allowed(allow: Sequence[str]) -> tuple[str, ...]:
    if not allow:
        return ()
    from rethaw.model.egress import rules_of

    if isinstance(allow, str):
        raise InvalidInput(f"allow = {allow!r} is not a list", remedy=f"write allow=[{allow!r}]")
    return tuple(rule.text for rule in rules_of(allow))


class Agent(Generic[P, R_co]):
    """A Python function that runs as a durable session. Calling it runs the plain function."""

    def __init__(
        self, function: Callable[..., Any], options: Options, *, key: str | None = None, how: Starting | None = None
    ) -> None:
        self.function = function
        self.options = options
        self.key = key
        self.how = how or Starting()
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function
        check_form(function)
        check_types(function, options.image, all_there=False)

    def __repr__(self) -> str:
        return f"<Agent {self.name} of {self.function.__module__}.{self.function.__qualname__}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def file(self) -> Path:
        """The Python file that defines it."""
        path = inspect.getsourcefile(self.function)
        if path is None or not Path(path).is_file():
            raise InvalidInput(
                f"agent {self.name!r} is not defined in a file", remedy="put it at the top level of a .py file"
            )
        return Path(path).absolute()

    @property
    def entry(self) -> str:
        """FILE.py::NAME, as the sandbox finds it again."""
        name = self.function.__qualname__
        if not name.isidentifier():
            raise InvalidInput(
                f"agent {self.name!r} is defined inside of something else ({name})",
                remedy="put it at the top level of its file",
            )
        return f"{self.file.name}::{name}"

    def package(self) -> Package:
        """Its file and the local modules that this imports."""
        from rethaw.sdk.package import pack

        return pack(self.file)

    def spec(self, code: str, image: ImageSpec | None = None) -> AgentSpec:
        """The wire form; `code` is the digest of the uploaded package, `image` that of its image where it is known."""
        from rethaw.model import signatures
        from rethaw.sdk.beside import specs

        check_types(self.function, self.options.image, all_there=True)
        spec = self.options.spec(entry=self.entry, code=code, image=image)
        return spec.model_copy(update={"agents": specs(self, code), "signature": signatures.of(self.function)})

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments by name as JSON holds them, checked against the function and its types. Raises InvalidInput."""
        check_types(self.function, self.options.image, all_there=True)
        try:
            bound = signature(self.function).bind(*args, **kwargs)
        except TypeError as e:
            raise InvalidInput(f"agent {self.name!r}: {e}", remedy=f"it takes {signature(self.function)}") from e
        out: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = signature(self.function).parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                out |= value
            else:
                out[name] = value
        return typed.wire_arguments(self.function, out, f"agent {self.name!r}: ")

    def built(self, result: Any) -> R_co:
        """What a session of it returned, as the type it is annotated with; `result` is the JSON. Raises InvalidInput."""
        kind = annotations.returned(self.function)[1]
        return cast("R_co", typed.build(result, kind, f"agent {self.name!r}: the result"))

    def with_options(
        self,
        *,
        key: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        delay: Duration | None = None,
        ttl: Duration | None = None,
        concurrency_key: str | None = None,
        tags: Sequence[str] = (),
        retries: int | Retries | None = None,
        budget: Budget | None = None,
    ) -> Agent[P, R_co]:
        """The same agent with options for the next start. `key`: starting again with it gives the same session.

        `queue` and `concurrency_key`: whose limits it waits for. `priority`: higher ones first. `delay`: how long until it
        may start; `ttl`: how long from then until it must have started, or it fails. `tags`: added to the agent's own. `retries` and
        `budget`: in place of the agent's own."""
        changes: dict[str, Any] = {"retries": retries_of(retries), "budget": checked_budget(budget)}
        options = replace(self.options, **{name: value for name, value in changes.items() if value is not None})
        how = starting(queue=queue, priority=priority, delay=delay, ttl=ttl, concurrency_key=concurrency_key, tags=tags)
        changed = copy(self)
        changed.options, changed.key, changed.how = options, key, how
        return changed

    @property
    def starting(self) -> Starting:
        """How the next session is started: options of this start over those of the definition."""
        return self.how.over(self.options.starting)

    @staticmethod
    def from_name(name: str, *, version: int | None = None) -> Agent[..., Any]:
        """An agent that `rethaw deploy` registered, to be started from anywhere: its code is on the server. `version`:
        that one; else the pinned one, or what was deployed last, as it is at each start."""
        from rethaw.sdk.versions import named

        return named(name, version)

    def uploaded(self, client: Client) -> AgentSpec:
        """The wire form, after everything that it names is on the server of `client`: its code, and what its image and those of
        the agents that it may spawn add."""
        spec, blobs = self.everything()
        for digest, data in blobs:
            if not client.blobs.has(digest):
                client.blobs.put(data)
        return spec

    async def uploaded_async(self, client: AsyncClient) -> AgentSpec:
        """`uploaded` with await."""
        spec, blobs = self.everything()
        for digest, data in blobs:
            if not await client.blobs.has(digest):
                await client.blobs.put(data)
        return spec

    def everything(self) -> tuple[AgentSpec, list[tuple[str, bytes]]]:
        """The wire form, and digest and data of what it names."""
        from rethaw.sdk.beside import others

        package, added = self.package(), self.options.image.uploads()
        spec = self.spec(package.digest, self.options.image.spec_of([digest for digest, _ in added]))
        for other in others(self).values():
            added += other.options.image.uploads()
        return spec, [(package.digest, package.data), *added]

    def start(self, *args: P.args, **kwargs: P.kwargs) -> Session[R_co]:
        """Start a session on the server of RETHAW_URL or the credentials file."""
        return self.start_on(_default_client(), *args, **kwargs)

    def start_on(self, client: Client, *args: P.args, **kwargs: P.kwargs) -> Session[R_co]:
        """Start a session on the server of `client`."""
        given = self.arguments(*args, **kwargs)
        session = client.sessions.start(self.uploaded(client), given, key=self.key, **self.starting.given())
        session.built = self.built
        return cast("Session[R_co]", session)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run it in this process, without a server and without durability, for a debugger. Nothing comes into its inbox; to
        give it messages and signals and to see what it sends, call it with a `rethaw.LocalContext`."""
        import rethaw

        return cast("R_co", rethaw.LocalContext().run_wire(self.function, self.arguments(*args, **kwargs)))

    @property
    def aio(self) -> AsyncAgent[P, R_co]:
        """The same calls as coroutines."""
        return AsyncAgent(self)


class AsyncAgent(Generic[P, R_co]):
    """`agent.aio`: start with `await`."""

    def __init__(self, agent: Agent[P, R_co]) -> None:
        self._agent = agent

    async def start(self, *args: P.args, **kwargs: P.kwargs) -> AsyncSession[R_co]:
        """Start a session on the server of RETHAW_URL or the credentials file."""
        from rethaw.sdk.aclient import AsyncClient

        return await self.start_on(AsyncClient(), *args, **kwargs)

    async def start_on(self, client: AsyncClient, *args: P.args, **kwargs: P.kwargs) -> AsyncSession[R_co]:
        """Start a session on the server of `client`."""
        agent = self._agent
        given = agent.arguments(*args, **kwargs)
        spec = await agent.uploaded_async(client)
        session = await client.sessions.start(spec, given, key=agent.key, **agent.starting.given())
        session.built = agent.built
        return cast("AsyncSession[R_co]", session)


@overload
def agent(function: Callable[Concatenate[Any, P], RunsAsync[R]], /) -> Agent[P, R]: ...
@overload
def agent(function: Callable[Concatenate[Any, P], RunsSteps[R]], /) -> Agent[P, R]: ...
@overload
def agent(function: Callable[Concatenate[Any, P], RunsAsyncSteps], /) -> Agent[P, None]: ...
@overload
def agent(function: Callable[Concatenate[Any, P], Runs[R]], /) -> Agent[P, R]: ...
@overload
def agent(function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> Agent[P, R]: ...
@overload
def agent(function: Callable[Concatenate[Any, P], Generator[Any, Any, R]], /) -> Agent[P, R]: ...
@overload
def agent(function: Callable[Concatenate[Any, P], AsyncIterator[Any]], /) -> Agent[P, None]: ...
@overload
def agent(function: Callable[Concatenate[Any, P], R], /) -> Agent[P, R]: ...
@overload
def agent(
    *,
    name: str | None = None,
    image: Image | None = None,
    env: dict[str, str] | None = None,
    workdir: str = "/",
    memory: str | int = "512MiB",
    pids: int = 1024,
    durability: str = "local",
    idle_suspend: Duration | None = "20s",
    snapshot_every: Duration = "60s",
    hold_max: Duration = "30m",
    max_duration: Duration | None = None,
    grace: Duration = "10s",
    keep_snapshots: Duration = "24h",
    keep_size: str | int = "5GiB",
    template: str = "none",
    engine: str | None = None,
    queue: str | None = None,
    priority: int | None = None,
    ttl: Duration | None = None,
    tags: Sequence[str] = (),
    retries: int | Retries | None = None,
    budget: Budget | None = None,
    allow: Sequence[str] = (),
    nap: Duration | None = None,
) -> _Decorator: ...
def agent(function: Callable[..., Any] | None = None, /, *, name: str | None = None, **given: Any) -> Any:
    """Make a function a durable agent. Its first parameter is the Context; the others are the session's arguments. An `async
    def` gets an AsyncContext. What a generator yields are messages to the outbox, what it returns is the result.

    `memory`: what the sandbox may use. `idle_suspend`: how long it may wait for something before it is suspended
    (None: never). `nap`: it is also suspended when it did nothing for that long without such a wait, for this time at most
    (None: never). `durability`: what an answer of the model survives once the agent sees it: "local" (this node's
    disk), "replicated", "relaxed" (nothing is held back). `snapshot_every`: without a model call. `hold_max`: how long
    a provider's "later" is waited for. `max_duration`: of the session. `grace`: from SIGTERM to SIGKILL on cancel.
    `keep_snapshots`: every snapshot this young is kept, of older ones one an hour, within `keep_size` in all.
    `template="auto"`: the first start makes a template of the agent, with its file imported; later ones begin there.
    `engine`: "gvisor", or "qemu" for a microVM with a kernel of its own; None takes the server's default. `queue`,
    `priority`, `ttl`, `tags`: of its starts, see `with_options`.
    `retries`: new attempts after one that failed, a number or `Retries(...)`. `budget`: what a session may spend.
    `allow`: hosts that it may connect to ("api.github.com", "*.pypi.org:443", "10.0.0.5:8080"); else none.
    """

    known = list(inspect.signature(options).parameters)
    for option in given:
        if option not in known:
            close = nearest(option, known)
            raise InvalidInput(
                f"@rethaw.agent has no option {option!r}",
                remedy=f"did you mean {close}?" if close else f"it has {', '.join(known)}",
            )

    def make(f: Callable[..., Any]) -> Agent[..., Any]:
        return Agent(f, options(name or f.__name__, **given))

    return make if function is None else make(function)


class _Decorator:
    """The type of `agent(...)`: keeps parameters and result of what it is put on. Never made."""

    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], RunsAsync[R]], /) -> Agent[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], RunsSteps[R]], /) -> Agent[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], RunsAsyncSteps], /) -> Agent[P, None]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], Runs[R]], /) -> Agent[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> Agent[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], Generator[Any, Any, R]], /) -> Agent[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], AsyncIterator[Any]], /) -> Agent[P, None]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> Agent[P, R]: ...
    def __call__(self, function: Any, /) -> Any:
        raise NotImplementedError


_shared: list[Client] = []


def _default_client() -> Client:
    """The client of `start`, made anew when environment or credentials file name another server or token."""
    from rethaw.sdk.client import Client
    from rethaw.sdk.transport import TIMEOUT_S, Target

    if not _shared or _shared[0].target != Target.find(None, None, TIMEOUT_S):
        _shared[:] = [Client()]
    return _shared[0]


def find(file: Path | str, name: str | None = None) -> Agent[..., Any]:
    """The agent that `file` defines; `name` chooses among several (a variable's or an agent's name).

    Imports the file. Raises NotFound and InvalidInput, the latter also when the file cannot be imported here.
    """
    path = Path(file).absolute()
    if not path.is_file():
        raise NotFound(f"there is no file {str(file)!r}", remedy="name the agent's Python file")
    everything = cast("dict[str, object]", vars(_load(path)))
    here = {key: cast("Agent[..., Any]", value) for key, value in everything.items() if isinstance(value, Agent)}
    mine = {key: value for key, value in here.items() if value.file == path}
    if name is not None:
        chosen = mine.get(name) or next((a for a in mine.values() if a.name == name), None)
        if chosen is None:
            raise NotFound(f"{file} defines no agent {name!r}", remedy=did_you_mean(name, mine, _known(file, mine)))
        return chosen
    if len(mine) != 1:
        raise InvalidInput(
            f"{file} defines {len(mine) or 'no'} agent{'s' if mine else ''}",
            remedy=_known(file, mine) if mine else "put @rethaw.agent over its function",
        )
    return next(iter(mine.values()))


def _known(file: Path | str, agents: dict[str, Agent[..., Any]]) -> str:
    return "write " + " or ".join(f"{file}::{name}" for name in agents) if agents else "put @rethaw.agent over one"


def _load(path: Path) -> Any:
    """Import the file under a name of its own, its directory first on the path, as the sandbox does."""
    name = f"rethaw_agent_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{path} is no Python file", remedy="name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as e:
        raise InvalidInput(
            f"{path} imports {e.name}, which is not installed here",
            remedy=f"import it inside the function (the sandbox has it by Image.pip_install), or: pip install {e.name}",
        ) from e
    except Exception as e:
        raise InvalidInput(f"{path} cannot be imported: {type(e).__name__}: {e}", remedy="correct it") from e
    finally:
        sys.path.remove(str(path.parent))
    return module
