"""`rethaw.agent` and `rethaw.Image` as a sandbox sees them: the function is what counts, its options were read by the
SDK on the caller's machine. Same names and call forms as `rethaw.sdk.agents` and `rethaw.sdk.images`; what an SDK
newer than this sandbox offers is accepted and ignored."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional


class Agent:
    """A function under `@rethaw.agent`. Calling it runs the plain function."""

    def __init__(self, function: Callable[..., Any], options: Dict[str, Any]) -> None:
        self.function = function
        self.options = options
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def local(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain function with a Context in memory."""
        from rethaw.guest.children import bound
        from rethaw.guest.local import LocalContext

        return LocalContext().run(self.function, **bound(self.name, self.function, args, kwargs))

    @classmethod
    def from_name(cls, name: str, *, version: Optional[int] = None) -> Agent:
        """One that is deployed: to be named, not to be run here."""

        def deployed(*args: Any, **kwargs: Any) -> Any:
            raise TypeError(f"agent {name!r} is deployed: its code is not here")

        return cls(deployed, {"name": name, "version": version})

    @property
    def name(self) -> str:
        return str(self.options.get("name") or self.__name__)


def agent(function: Optional[Callable[..., Any]] = None, /, **options: Any) -> Any:
    """`@agent` or `@agent(...)`."""

    def make(f: Callable[..., Any]) -> Agent:
        return Agent(f, options)

    return make if function is None else make(function)


class _Ignored:
    """What only the caller's machine makes use of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class Retries(_Ignored):
    pass


class Budget(_Ignored):
    pass


class _AnyStart(type):
    """`Image.debian()`, `Image.from_env()` and whatever else an image may begin with."""

    def __getattr__(cls, start: str) -> Callable[..., Any]:
        if start.startswith("_"):
            raise AttributeError(start)
        return lambda *args, **kwargs: cls()


class Image(metaclass=_AnyStart):
    """An image recipe, which means nothing inside the image: every step gives the same object back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, step: str) -> Callable[..., Image]:
        if step.startswith("_"):
            raise AttributeError(step)
        return lambda *args, **kwargs: self
