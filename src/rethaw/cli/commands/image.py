"""Commands for images: what agents' sandboxes are made of."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Flag, Json
from rethaw.cli.connect import client

if TYPE_CHECKING:
    from rethaw.model.image_types import ImageInfo
    from rethaw.sdk.images import Image

MIB = 1 << 20
_SHOWN = 12  # characters of a digest
_WORDS = 60


def build(
    what: str = ".",
    /,
    *,
    quiet: Annotated[bool, Flag, Parameter(name=("--quiet", "-q"))] = False,
    json: Json = False,
) -> None:
    """Build an image now, and print its digest. The log comes on stderr as it is written.

    Ctrl-C ends the build. Of a step that fails nothing is left; the steps
    before it are kept.

    For example:
      rethaw image build node
      rethaw image build ./rethaw.toml
      rethaw image build app.tar
      rethaw image build agent.py::researcher

    Parameters
    ----------
    what:
        A rethaw.toml or a directory that has one; an archive of "docker save" or an OCI layout; FILE.py[::NAME] of an agent in
        Python; or base, python, node.
    quiet:
        Without the log.
    """
    image = _image(what)
    with client() as connection:
        made = connection.images.build(image, None if quiet else lambda line: output.note(output.plain(line)))
    if json:
        output.emit(made)
        return
    output.data(made.digest)
    output.note(f"built in {made.seconds:.1f} s" if made.built else "it was there")


def _image(what: str) -> Image:
    from rethaw.cli.imagefile import image_of

    file, _, chosen = what.partition("::")
    if not file.endswith(".py"):
        return image_of(what)
    from rethaw.sdk.agents import find

    return find(file, chosen or None).options.image


def ls(*, every: Annotated[bool, Flag, Parameter(name=("--all", "-a"))] = False, json: Json = False) -> None:
    """List images that were built, the last used first.

    For example:
      rethaw image ls

    Parameters
    ----------
    every:
        The layers that they stand on as well, and what sandboxes boot.
    """
    with client() as connection:
        found = [one for one in connection.images.list() if every or one.kind == "image"]
    if json:
        output.emit(found)
        return
    if not found:
        output.note("no images; the first start of an agent builds its own, or: rethaw image build node")
        return
    head = ["IMAGE", *(["KIND"] if every else []), "MIB", "USED", "MADE OF"]
    output.table(head, [_row(one, every) for one in found])


def _row(one: ImageInfo, every: bool) -> list[str]:
    words = output.plain(" ".join(one.made_of.split()))
    said = words if len(words) <= _WORDS or not sys.stdout.isatty() else words[: _WORDS - 3] + "..."
    kind = [one.kind] if every else []
    return [one.digest[:_SHOWN], *kind, f"{one.own_bytes / MIB:.1f}", output.ago(one.used_at), said]


def inspect(image: str, /, *, json: Json = False) -> None:
    """Show what an image is made of, and who needs it.

    For example:
      rethaw image inspect 3f2a91

    Parameters
    ----------
    image:
        The beginning of its digest.
    """
    with client() as connection:
        found = connection.images.inspect(image)
    if json:
        output.emit(found)
        return
    lines = [f"image      {found.info.digest}", f"kind       {found.info.kind}", f"made of    {found.info.made_of}"]
    lines += [f"size       {found.info.own_bytes / MIB:.1f} MiB, built in {found.info.built_s:.1f} s"]
    lines += [f"used       {output.ago(found.info.used_at)} ago"]
    if found.spec is not None:
        lines += [f"env        {name}={value}" for name, value in sorted(found.spec.env.items())]
        lines += [f"workdir    {found.spec.workdir}"] if found.spec.workdir else []
    for number, one in enumerate(found.layers, 1):
        lines.append(f"layer {number:<4} {one.digest[:_SHOWN]}  {one.own_bytes / MIB:8.1f} MiB  {one.made_of}")
    lines += [f"session    {one}" for one in found.sessions]
    lines += [f"snapshot   {one}" for one in found.snapshots]
    output.data("\n".join(output.plain(line) for line in lines))


def rm(*images: str, json: Json = False) -> None:
    """Remove images, and the layers that no other image stands on.

    One that a session or a snapshot needs stays, and the error names them.

    For example:
      rethaw image rm 3f2a91

    Parameters
    ----------
    images:
        The beginnings of their digests.
    """
    from rethaw.model.errors import InvalidInput

    if not images:
        raise InvalidInput("no image is named", remedy="see `rethaw image ls`")
    with client() as connection:
        for image in images:
            gone = connection.images.remove(image)
            if json:
                output.emit(gone)
                continue
            output.data(gone.digests[0])
            output.note(f"{len(gone.digests) - 1} trees, {gone.bytes / MIB:.1f} MiB")
