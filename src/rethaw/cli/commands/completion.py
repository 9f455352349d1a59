"""Completion for the user's shell."""

from __future__ import annotations

import os
from pathlib import Path

from rethaw.cli import output
from rethaw.cli.app import Json, build
from rethaw.model.errors import InvalidInput

SHELLS = ("bash", "zsh", "fish")


def completion(shell: str | None = None, /, *, json: Json = False) -> None:
    """Print the completion script of a shell.

    For example:
      rethaw completion bash > /etc/bash_completion.d/rethaw
      rethaw completion zsh > ~/.zfunc/_rethaw
      rethaw completion fish > ~/.config/fish/completions/rethaw.fish

    Parameters
    ----------
    shell:
        bash, zsh or fish; else the one that SHELL names.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise InvalidInput(f"there is no completion for shell {name!r}", remedy=f"name one of {', '.join(SHELLS)}")
    script = build().generate_completion(shell=name)
    if json:
        output.emit({"shell": name, "script": script})
    else:
        output.raw(script.encode())
