"""What `--image` names: an image by name, a rethaw.toml, an archive of another tool, or one that the server has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.nearest import did_you_mean
from rethaw.sdk.images import NODE, Image

if TYPE_CHECKING:
    from rethaw.model.image_types import ImageSpec
    from rethaw.sdk.client import Client

NAMES: dict[str, tuple[str, Callable[[], Image]]] = {
    "base": ("Debian with Python, git and ripgrep", Image.debian),
    "python": ("the same", Image.debian),
    "node": ("base with nodejs and npm of Debian", lambda: Image.debian().apt_install(*NODE)),
}
FILE = "rethaw.toml"
_DIGEST = re.compile(r"[0-9a-f]{6,64}")
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_REMEDY = f"write --image {' or '.join(NAMES)}, a {FILE} with a table [image], or an archive of `docker save`"


def resolved(text: str, connection: Client | None) -> tuple[Image, ImageSpec]:
    """The image and its wire form; with `connection`, what it takes from this machine is uploaded. Of one that the server
    has by its digest only the form is known. Raises InvalidInput, NotFound."""
    if connection is not None and _DIGEST.fullmatch(text) and not Path(text).exists() and text not in NAMES:
        found = connection.images.inspect(text).spec
        if found is None:
            raise InvalidInput(f"{text} is a layer, and no image", remedy="see `rethaw image ls`")
        return Image(), found
    image = image_of(text)
    return image, image.spec if connection is None else connection.images.upload(image)


def image_of(text: str) -> Image:
    """The image that a name, a file or a directory says."""
    if text in NAMES:
        return NAMES[text][1]()
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / FILE).is_file():
            return read(path / FILE)
        if any((path / name).is_file() for name in ("index.json", "manifest.json")):
            return Image.from_oci(path.absolute())
        raise NotFound(f"{text} has neither {FILE} nor the index.json of an OCI layout", remedy=_REMEDY)
    if text.endswith(_ARCHIVES):
        return Image.from_oci(path.absolute())
    if path.is_file() or text.endswith(".toml"):
        return read(path)
    raise NotFound(f"there is no image {text!r}", remedy=did_you_mean(text, NAMES, _REMEDY))


# ---------------------------------------------------------------- rethaw.toml


def read(path: Path) -> Image:
    """The table [image] of a rethaw.toml. Other tables are the server's. Raises InvalidInput naming the key, NotFound."""
    import tomllib

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"there is no file {str(path)!r}", remedy=_REMEDY) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}", remedy="correct it; it is TOML") from None
    table = content.get("image")
    if not isinstance(table, dict):
        raise InvalidInput(f"{path} has no table [image]", remedy='write one, like [image] with apt = ["jq"]')
    return _Reader(path.absolute()).image(cast("dict[str, Any]", table))


class _Reader:
    """Keys of [image] in their fixed order, then its steps in theirs."""

    FIRST = ("base", "from_oci", "name")
    STEPS = ("apt", "pip", "npm", "env", "workdir", "add", "run")  # in the order in which [image] does them

    def __init__(self, path: Path) -> None:
        self._path = path

    def image(self, table: dict[str, Any]) -> Image:
        known = (*self.FIRST, *self.STEPS, "steps")
        for key in table:
            if key not in known:
                self._fail(f"image.{key} is not known", did_you_mean(key, known, f"known: {', '.join(known)}"))
        image = self._base(table)
        for key in self.STEPS:
            if key in table:
                image = self._step(image, key, table[key], f"image.{key}", {})
        steps = table.get("steps", [])
        if not isinstance(steps, list) or not all(isinstance(one, dict) for one in cast("list[Any]", steps)):
            self._fail("image.steps is no array of tables", "write each as [[image.steps]]")
        for number, step in enumerate(cast("list[dict[str, Any]]", steps), 1):
            where = f"step {number} of image.steps"
            verbs = [key for key in step if key in self.STEPS]
            others = [key for key in step if key not in (*self.STEPS, "to", "ignore")]
            if len(verbs) != 1 or others:
                said = f"has the unknown key {others[0]!r}" if others else f"does {len(verbs)} things"
                self._fail(f"{where} {said}", f"each step has one of {', '.join(self.STEPS)}")
            image = self._step(image, verbs[0], step[verbs[0]], where, step)
        return image

    def _base(self, table: dict[str, Any]) -> Image:
        if "from_oci" in table:
            if "base" in table:
                self._fail("image.base and image.from_oci are both given", "keep one of them")
            name = self._text(table["name"], "image.name") if "name" in table else None
            return Image.from_oci(self._beside(self._text(table["from_oci"], "image.from_oci")), name=name)
        base = self._text(table.get("base", "base"), "image.base")
        if base not in (*NAMES, "debian", "bookworm"):
            known = [*NAMES, "debian"]
            self._fail(f"image.base {base!r} is not known", did_you_mean(base, known, f"use {', '.join(known)}"))
        return NAMES[base][1]() if base in NAMES else Image.debian()

    def _step(self, image: Image, key: str, value: Any, where: str, more: dict[str, Any]) -> Image:
        if key in ("apt", "pip", "npm", "run"):
            words = self._texts(value, where)
            if key == "run":
                for command in words:
                    image = image.run(command)
                return image
            install = {"apt": image.apt_install, "pip": image.pip_install, "npm": image.npm_install}[key]
            return install(*words)
        if key == "workdir":
            return image.workdir(self._text(value, where))
        if key == "env":
            if not isinstance(value, dict):
                self._fail(f"{where} is no table", 'write it like env = { NAME = "value" }')
            pairs = cast("dict[str, Any]", value)
            return image.env({name: self._text(one, f"{where}.{name}") for name, one in pairs.items()})
        return self._add(image, value, where, more)

    def _add(self, image: Image, value: Any, where: str, more: dict[str, Any]) -> Image:
        """A table of sources and targets, or one source with `to`."""
        if isinstance(value, str):
            if "to" not in more:
                self._fail(f"{where} does not say where {value!r} goes", 'write to = "/srv"')
            pairs = {value: self._text(more["to"], f"{where}: to")}
        elif isinstance(value, dict):
            pairs = {name: self._text(to, f"{where}.{name}") for name, to in cast("dict[str, Any]", value).items()}
        else:
            self._fail(f"{where} is no table", 'write it like add = { "src" = "/srv/src" }')
        ignore = self._texts(more["ignore"], f"{where}: ignore") if "ignore" in more else []
        for source, target in pairs.items():
            path = self._beside(source)
            if path.is_dir():
                image = image.add_local_dir(path, target, ignore=ignore)
            else:
                image = image.add_local_file(path, target)
        return image

    def _beside(self, text: str) -> Path:
        return self._path.parent / Path(text).expanduser()

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            self._fail(f"{where} = {value!r} is no text", "put it between quotes")
        return value

    def _texts(self, value: Any, where: str) -> list[str]:
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list):
            self._fail(f"{where} = {value!r} is no list of texts", 'write it like ["one", "two"]')
        return [self._text(one, where) for one in cast("list[Any]", found)]

    def _fail(self, what: str, remedy: str) -> NoReturn:
        raise InvalidInput(f"{self._path}: {what}", remedy=remedy)
