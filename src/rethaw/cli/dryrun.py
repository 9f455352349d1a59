"""What `rethaw run` would do: the arguments that FILE.py takes (`--help`), and what would travel (`--dry-run`)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rethaw.cli.joined import Joined
    from rethaw.model.types import AgentSpec
    from rethaw.sdk.images import Source


def explain(target: str) -> str:
    """The help text of FILE.py[::NAME]."""
    from rethaw.cli.arguments import described
    from rethaw.sdk.agents import find

    file, _, chosen = target.partition("::")
    found = find(file, chosen or None)
    return _explained(target, found.name, inspect.getdoc(found.function), described(found.function))


def explain_deployed(target: str) -> str:
    """The help text of a deployed agent, NAME[@VERSION]."""
    from rethaw.cli.arguments import described
    from rethaw.cli.connect import client
    from rethaw.sdk.versions import parse

    with client() as connection:
        found = connection.agents.get(*parse(target))
    function = found.function()
    arguments = ["  nothing is written down of them: any are passed on"] if function is None else described(function)
    return _explained(
        f"--agent {target}", f"{found.agent}, version {found.label}", getattr(function, "__doc__", None), arguments
    )


def _explained(target: str, name: str, about: str | None, arguments: list[str]) -> str:
    lines = [f"Usage: rethaw run {target} [ARGUMENTS] [OPTIONS]"]
    if about:
        lines += ["", *about.splitlines()]
    lines += ["", f"Arguments of {name}:", *(arguments or ["  none"])]
    lines += ["", "Options of `rethaw run` itself: rethaw run --help", ""]
    return "\n".join(lines)


def show(
    target: str | None,
    tokens: list[str],
    image: str | None,
    given: dict[str, Any],
    json: bool,
    joined: Joined | None = None,
) -> int:
    """Print what would be sent. No server is asked, nothing is started."""
    from rethaw.cli import output
    from rethaw.cli.arguments import parse
    from rethaw.cli.commands.run import changed_agent, of_command

    added: list[Source] = []
    args: dict[str, Any] = {}
    files: list[dict[str, Any]] = []
    if image is not None:
        spec = of_command(image, [*([target] if target is not None else []), *tokens], given)
        added = [copy.addition for copy in joined.copies] if joined is not None else []
    else:
        agent = changed_agent(target, given)
        args = parse(agent.function, tokens)
        package = agent.package()
        added = agent.options.image.sources()
        spec = agent.spec(package.digest)
        files = [{"name": n, "bytes": size} for n, size in zip(package.files, package.sizes, strict=True)]
    told = [source.described() for source in added]
    if json:
        output.emit({"agent": spec.model_dump(mode="json"), "args": args, "files": files, "added": told})
        return 0
    output.data("\n".join(_lines(spec, args, files, told)))
    return 0


def _lines(
    spec: AgentSpec, args: dict[str, Any], files: list[dict[str, Any]], added: list[dict[str, Any]]
) -> list[str]:
    import json

    lines = [f"agent  {spec.name}" + (f" ({spec.entry})" if spec.entry else "")]
    if spec.command:
        lines.append(f"command  {' '.join(spec.command)}")
    if files:
        lines.append(f"code  {_count(files)}, to /app")
        lines += _table(files)
    lines.append(f"image  {json.dumps(spec.image.model_dump(mode='json', exclude={'steps'}))}")
    for number, step in enumerate(spec.image.steps, 1):
        lines.append(f"  step {number}  {step.said()}")
    for one in added:
        lines.append(f"added  {one['source']}: {_count(one['files'])}, to {one['target']}")
        lines += _table(one["files"])
    lines.append(f"arguments  {json.dumps(args)}")
    rest = spec.model_dump(mode="json", exclude={"name", "entry", "command", "image", "code"}, exclude_none=True)
    lines.append("options  " + " ".join(f"{name}={value}" for name, value in rest.items()))
    lines.append("Nothing else is read or sent; nothing was started.")
    return lines


def _count(files: list[dict[str, Any]]) -> str:
    total = sum(int(file["bytes"]) for file in files)
    return f"{len(files)} file{'s' if len(files) != 1 else ''}, {total} bytes"


_SHOWN = 40


def _table(files: list[dict[str, Any]]) -> list[str]:
    lines = [f"  {file['bytes']:>10}  {file['name']}" for file in files[:_SHOWN]]
    return lines if len(files) <= _SHOWN else [*lines, f"  ... and {len(files) - _SHOWN} more"]
