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

    @property
    def name(self) -> str:
        return str(self.options.get("name") or self.__name__)


def agent(function: Optional[Callable[..., Any]] = None, /, **options: Any) -> Any:
    """`@agent` or `@agent(...)`."""

    def make(f: Callable[..., Any]) -> Agent:
        return Agent(f, options)

    return make if function is None else make(function)


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
