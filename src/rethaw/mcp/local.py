"""Agents in Python files below one directory of this machine, which its owner opened to MCP clients (`--agents`)."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethaw.mcp.shapes import AgentHere
from rethaw.model.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from rethaw.sdk.agents import Agent

_SKIPPED = {"node_modules", "__pycache__", "site-packages"}
_MOST = 200


class AgentsDir:
    """Listing reads the files; starting one imports it here, as `rethaw run` does."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise InvalidInput(f"{str(directory)!r} is no directory", remedy="name one that has agents in it")
        self.root = directory.resolve()

    def find(self, file: str, name: str | None) -> Agent[..., Any]:
        """The agent in `file`, a path below the directory. Raises NotFound, InvalidInput."""
        from rethaw.sdk.agents import find

        path = (self.root / file).resolve()
        if not path.is_relative_to(self.root):
            raise InvalidInput(f"{file!r} is outside of {self.root}", remedy="see agent_list for what may be started")
        if not path.is_file():
            raise NotFound(f"there is no file {file!r} in {self.root}", remedy="see agent_list")
        with contextlib.redirect_stdout(sys.stderr):  # what the file prints must not get between us and the client
            return find(path, name)

    def list(self) -> list[AgentHere]:
        """Found by reading the source, never by running it."""
        found: list[AgentHere] = []
        for path in sorted(self._files()):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and any(
                    map(_is_agent, node.decorator_list)
                ):
                    about = (ast.get_docstring(node) or "").partition("\n")[0]
                    name = path.relative_to(self.root).as_posix()
                    found.append(AgentHere(file=name, agent=node.name, arguments=_arguments(node.args), about=about))
        return found[:_MOST]

    def _files(self) -> Iterator[Path]:
        for path in self.root.rglob("*.py"):
            below = path.relative_to(self.root).parts
            if not any(part.startswith(".") or part in _SKIPPED for part in below):
                yield path


def _is_agent(decorator: ast.expr) -> bool:
    if isinstance(decorator, ast.Call):
        decorator = decorator.func
    if isinstance(decorator, ast.Attribute):
        return decorator.attr == "agent" and isinstance(decorator.value, ast.Name) and decorator.value.id == "rethaw"
    return isinstance(decorator, ast.Name) and decorator.id == "agent"


def _arguments(given: ast.arguments) -> str:
    """As in the source, without the Context."""
    ordinary = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(ordinary) - len(given.defaults)) + list(given.defaults)
    pairs = [*zip(ordinary[1:], defaults[1:], strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    words: list[str] = []
    for argument, default in pairs:
        word = argument.arg + (f": {ast.unparse(argument.annotation)}" if argument.annotation else "")
        words.append(word + (f" = {ast.unparse(default)}" if default is not None else ""))
    return ", ".join(words)
