"""What an agent's sandbox is made of, written as a chain: `Image.debian().apt_install("jq").pip_install("openai")`."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rethaw.model.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from typing import Any

    from rethaw.model.image_types import ImageSpec

SUITES = {"bookworm": "3.11"}  # suite: version of its python3
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.:=~_-]*", re.IGNORECASE)
_NPM = re.compile(r"(?:@[a-z0-9~][a-z0-9._~-]*/)?[A-Za-z0-9~][A-Za-z0-9._~-]*(?:@[A-Za-z0-9.^~<>=|*x +_-]+)?")
NODE = ("nodejs", "npm")  # Debian's packages of them
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Source(Protocol):
    """Files of this machine that travel into an image. `place`: where their archive is unpacked; `words`: of the step."""

    @property
    def place(self) -> str: ...
    @property
    def words(self) -> tuple[str, ...]: ...
    def pack(self) -> bytes: ...
    def described(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Step:
    """One thing done to an image. `source`: of "add"."""

    kind: str
    words: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    source: Source | None = None
    place: str = "/"  # of "run": the directory


@dataclass(frozen=True)
class Image:
    """An image's recipe; immutable, each method returns a new one. Equal recipes are one image on the server.

    The base is Debian with python3, git, ca-certificates and ripgrep. Debian packages that stand before any other step are
    one layer on it, whatever their order, and Python packages the next; from the first other step on the order counts, and
    each step is a layer: changing the last one builds only that again. Relative paths are beside the file that says them.
    """

    suite: str = "bookworm"
    apt: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    steps: tuple[Step, ...] = ()
    python: str | None = None  # the interpreter that runs the agent; None: the image's own python3
    directory: str | None = None  # that agents and commands start in
    base: Source | None = None  # of another tool, in place of Debian
    command: tuple[str, ...] = ()  # that the base runs when nothing else is said

    @classmethod
    def debian(cls, suite: str = "bookworm", *, python: str | None = None) -> Image:
        """Debian `suite`. `python`: the version that the agent needs. Raises InvalidInput for what cannot be built."""
        if suite not in SUITES:
            raise InvalidInput(f"there is no image of Debian {suite!r}", remedy=f"use {' or '.join(SUITES)}")
        if python is not None and python != SUITES[suite]:
            raise InvalidInput(
                f"Debian {suite} has Python {SUITES[suite]}, not {python}",
                remedy=f"use {SUITES[suite]}, or Image.from_env() from an environment of Python {python}",
            )
        return cls(suite=suite)

    @classmethod
    def from_env(cls, *, exclude: tuple[str, ...] | list[str] = ()) -> Image:
        """Debian with a copy of the Python that runs this and of the packages of its environment, which then runs the
        agent. `exclude`: distributions that stay behind. Raises InvalidInput when it does not fit into the image."""
        if _in_sandbox():
            return cls()
        from rethaw.sdk import environment

        found = environment.of_this(tuple(exclude), "bookworm", SUITES["bookworm"])
        image = cls(steps=tuple(Step("add", source=part) for part in found.parts), python=found.python)
        path = f"{found.path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return image.env(PATH=path, LD_LIBRARY_PATH=found.library_path)

    @classmethod
    def from_oci(cls, path: str | Path, *, name: str | None = None, platform: str | None = None) -> Image:
        """The image in a `docker save` archive (.tar, .tar.gz), an OCI layout directory or an archive of one; any Linux,
        with or without Python. `name` ("repo:tag") chooses one of several, `platform` ("linux/arm64") another than this
        machine's. Its environment, working directory and command are the defaults; its user is not taken over: programs
        run as root of their sandbox. Raises InvalidInput, NotFound; TooLarge above 512 MiB, packed."""
        if _in_sandbox():
            return cls()
        from rethaw.sdk import oci

        found = oci.read(_beside(path), name, platform)
        environment = tuple(sorted((k, v) for k, v in found.env.items() if _NAME.fullmatch(k)))
        return cls(base=found, environment=environment, directory=found.workdir, command=found.command)

    def apt_install(self, *packages: str) -> Image:
        """Debian packages on top."""
        for name in packages:
            if not _PACKAGE.fullmatch(name):
                raise InvalidInput(f"{name!r} is not a Debian package name", remedy="pass one name per argument")
        if (self.steps or self.base) and packages:
            return self._then(Step("apt", packages))
        return replace(self, apt=(*self.apt, *packages))

    def pip_install(self, *packages: str, requirements: str | Path | None = None) -> Image:
        """Python packages for the interpreter that runs the agent, as requirement specifiers ("openai>=2"), or those of a
        file. They are installed by pip in a sandbox; one without a wheel is built there, with what the image has."""
        for text in packages:
            if not text.strip() or text.lstrip().startswith("-") or "\n" in text:
                raise InvalidInput(f"{text!r} is not a requirement", remedy='write it like "openai>=2"')
        wanted = [text.strip() for text in packages]
        if requirements is not None and not _in_sandbox():
            from rethaw.sdk.requirements import read

            wanted += read(_beside(requirements))
        if not wanted:
            return self
        if self.steps or self.base or any("--hash=" in text for text in wanted):
            # An interpreter that is not Debian's is found by these, and may need them.
            return self._then(Step("pip", tuple(wanted), self.environment if self.python or self.base else ()))
        return replace(self, pip=(*self.pip, *wanted))

    def npm_install(self, *packages: str) -> Image:
        """npm packages for everybody in it, like "typescript" or "typescript@5.4.5", from the registry that npm on the
        server's machine uses. Debian's node and npm come along where the image has no npm."""
        for text in packages:
            if not isinstance(text, str) or not _NPM.fullmatch(text):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidInput(
                    f"{text!r} is not an npm package", remedy='write it like "typescript" or "typescript@5.4.5"'
                )
        if not packages:
            return self
        with_npm = (
            self if self.steps or self.base else self.apt_install(*(name for name in NODE if name not in self.apt))
        )
        return with_npm._then(Step("npm", packages))

    def workdir(self, path: str) -> Image:
        """The directory that agents on it start in unless they say otherwise, and `run` after this. Made if missing."""
        if not isinstance(path, str) or not path.startswith("/") or ".." in path.split("/") or "\0" in path:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidInput(f"{path!r} is not a directory of an image", remedy="write an absolute path like /srv")
        return replace(self, directory=f"/{path.strip('/')}" if path.strip("/") else None)

    def run(self, command: str) -> Image:
        """A shell command, run as root in a sandbox of its own. It sees the environment variables and the directory set
        before it, reaches the network through an HTTP proxy only, and has half an hour."""
        if not isinstance(command, str) or not command.strip() or "\0" in command:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidInput(f"{command!r} is not a shell command", remedy='write one text like "make install"')
        return self._then(Step("run", (command,), self.environment, place=self.directory or "/"))

    def add_local_dir(self, path: str | Path, target: str, *, ignore: tuple[str, ...] | list[str] = ()) -> Image:
        """The files of a directory at `target`. Left out is what `ignore`, a .rethawignore (else .gitignore) at its top, or
        the defaults say (.git, .venv, .env, __pycache__, ...), all in the syntax of .gitignore."""
        return self._add(path, target, tuple(ignore), directory=True)

    def add_local_file(self, path: str | Path, target: str) -> Image:
        """One file at `target`, or in it if that ends with a slash."""
        return self._add(path, f"{target}{Path(path).name}" if target.endswith("/") else target, (), directory=False)

    def _add(self, path: str | Path, target: str, ignored: tuple[str, ...], *, directory: bool) -> Image:
        if not target.startswith("/") or ".." in target.split("/") or "\0" in target or not target.strip("/"):
            raise InvalidInput(f"{target!r} is not a place in an image", remedy="write an absolute path like /data")
        if target.split("/")[1] in ("proc", "sys", "dev", "tmp", "run", ".rethaw"):
            raise InvalidInput(f"{target!r} is made anew in each sandbox", remedy="use another place, like /data")
        if _in_sandbox():
            return self
        from rethaw.sdk.additions import Addition

        source = _beside(path)
        if not (source.is_dir() if directory else source.is_file()):
            kind, other = ("directory", "add_local_file") if directory else ("file", "add_local_dir")
            remedy = f"use {other}" if source.exists() else "a relative path is beside the file that says it"
            raise NotFound(f"there is no {kind} {str(source)!r}", remedy=remedy)
        return self._then(Step("add", source=Addition(source, target.rstrip("/"), ignored)))

    def _then(self, step: Step) -> Image:
        return replace(self, steps=(*self.steps, step))

    def env(self, variables: dict[str, str] | None = None, /, **more: str) -> Image:
        """Environment variables of everything that runs in it. No secrets, since snapshots keep them: what looks like a key
        is refused, unless RETHAW_NOT_SECRET names the variable."""
        merged = {**dict(self.environment), **checked_env(variables or {}), **checked_env(more)}
        return replace(self, environment=tuple(sorted(merged.items())))

    @property
    def bare_of_packages(self) -> bool:
        """True when nothing was installed that pydantic could come with."""
        return (
            not self.pip
            and not self.steps
            and not self.base
            and not any(name.startswith("python3-") for name in self.apt)
        )

    def sources(self) -> list[Source]:
        """What travels from this machine."""
        return [source for source in (self.base, *(step.source for step in self.steps)) if source is not None]

    def uploads(self) -> list[tuple[str, bytes]]:
        """Archives that the server must have, with their digests, one for each of `sources()`. Reads the files."""
        from rethaw.sdk.additions import digest

        return [(digest(data), data) for data in (source.pack() for source in self.sources())]

    @property
    def spec(self) -> ImageSpec:
        """The wire form. Reads the files that travel, for their digest."""
        return self.spec_of([digest for digest, _ in self.uploads()])

    def spec_of(self, uploaded: list[str]) -> ImageSpec:
        """The wire form, with the digests of `uploads()`."""
        from rethaw.model.image_types import ImageSpec, ImageStep

        digests = iter(uploaded)
        oci = next(digests) if self.base is not None else None
        steps = tuple(
            ImageStep(kind="add", words=step.source.words, blob=next(digests), target=step.source.place)
            if step.source is not None
            else ImageStep.model_validate(_written(step))
            for step in self.steps
        )
        return ImageSpec(
            suite=self.suite,
            apt=self.apt,
            pip=self.pip,
            env=dict(self.environment),
            steps=steps,
            python=self.python,
            workdir=self.directory,
            oci=oci,
        )


def _written(step: Step) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": step.kind, "words": step.words, "env": dict(step.environment)}
    return out if step.place == "/" else {**out, "workdir": step.place}


def _in_sandbox() -> bool:
    """The agent's file is imported there as well, where none of the caller's files are."""
    return "RETHAW_SOCKET" in os.environ


def _beside(path: str | Path) -> Path:
    """`path` beside the file that called into this module; of a prompt, in the current directory."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    file = frame.f_globals.get("__file__")
    top = Path(str(file)).absolute().parent if file else Path.cwd()
    return Path(os.path.normpath(top / Path(path).expanduser()))


def checked_env(variables: dict[str, str]) -> dict[str, str]:
    """`variables`, or InvalidInput naming the one that no process could be given, or that looks like a key."""
    for name, value in variables.items():
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is not an environment variable's name", remedy="use letters, digits and _")
        if not isinstance(value, str) or "\0" in value:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidInput(f"environment variable {name} is not text", remedy="pass a string")
    if not _in_sandbox():
        from rethaw.sdk import keys

        keys.check(variables)
    return dict(variables)
