"""The files of a new project: what `rethaw init` writes. `@name@`, `@function@` and `@given@` are put in."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from rethaw.model.errors import Conflict, InvalidInput

_AGENT = '''\
"""@name@ writes about a topic and works on its draft until somebody approves it.

rethaw run agent.py --topic "snapshots"
"""

import rethaw
from rethaw import Context, Image

MODEL = "gpt-5-mini"


@rethaw.agent(@given@image=Image.debian().pip_install("openai"), memory="1GiB")
def @function@(ctx: Context, topic: str) -> str:
    draft = ask(f"Write two sentences about {topic}.")
    while True:
        print(draft, flush=True)
        ctx.send(draft)  # seen outside as soon as no crash can take it back
        said = ctx.wait("approval", timeout="7d").payload  # frozen meanwhile: no process, no memory
        if said is True:
            return draft
        draft = ask(f"Change this as asked.\\n\\nAsked: {said}\\n\\n{draft}")


def ask(prompt: str) -> str:
    from openai import OpenAI  # in the sandbox its address is Rethaw's gateway, and the key stays outside

    return OpenAI().responses.create(model=MODEL, input=prompt).output_text
'''

_TEST = '''\
"""`pytest` runs both; `sudo env "PATH=$PATH" python -m pytest` where the second one is skipped for want of root."""

import pytest
from agent import @function@
from rethaw import LocalContext
from rethaw.testing import AgentServer

pytest_plugins = ["rethaw.testing.plugin"]


def test_it_sends_its_draft_and_returns_what_was_approved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function alone, without server and model."""
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return f"draft {len(prompts)}"

    monkeypatch.setattr("agent.ask", ask)
    ctx = LocalContext(signals={"approval": True})
    assert @function@(ctx, topic="snapshots") == "draft 1"
    assert ctx.outbox == ["draft 1"]
    assert prompts == ["Write two sentences about snapshots."]


def test_it_survives_crashes(rethaw_server: AgentServer) -> None:
    """On a real server with a scripted model; its sandbox is killed twice."""
    rethaw_server.model.script("a draft", "a better draft")
    session = rethaw_server.start(@function@, topic="snapshots")
    rethaw_server.wait_for(session, sent="a draft", waiting="approval")

    rethaw_server.crash(session)
    session.signal("approval", "Make it better.")
    rethaw_server.wait_for(session, sent="a better draft")

    rethaw_server.crash(session)
    session.signal("approval", True)
    assert session.result(timeout="60s") == "a better draft"
    assert rethaw_server.model.calls == 2  # none was paid for twice
    assert [message.payload for message in session.outbox()] == ["a draft", "a better draft"]
'''

_README = """\
# @name@

A durable agent. `agent.py` is all of it: an ordinary function that asks a model, waits for people, and goes on where it
was, whatever is killed meanwhile.

```sh
pip install -r requirements.txt
export OPENAI_API_KEY=...
sudo --preserve-env=OPENAI_API_KEY "$(command -v rethaw)" up --detach

rethaw run -d --key first agent.py --topic "snapshots"   # prints the session's id
rethaw logs SESSION                                      # the draft
rethaw why SESSION                                       # what it waits for
rethaw crash SESSION                                     # kill it: nothing is lost
rethaw signal SESSION approval '"Shorter, please."'      # another draft
rethaw signal SESSION approval true                      # done
rethaw show SESSION                                      # what durability did for it
```

## Tests

```sh
pytest
```

The first test calls the function with contexts in memory. The second starts a real server with a scripted model and
crashes the agent; it needs root and an engine (`sudo rethaw doctor`), and is skipped without. The first time, it builds the
agent's image.
"""

_REQUIREMENTS = """\
rethaw
openai  # for the editor and the type checker: the sandbox has its own
pytest
"""

_PYPROJECT = """\
[tool.pytest.ini_options]
addopts = "-ra"

[tool.pyright]
typeCheckingMode = "strict"
"""

_IGNORE = """\
__pycache__/
.pytest_cache/
.venv/
.env
"""

FILES = {
    "agent.py": _AGENT,
    "test_agent.py": _TEST,
    "README.md": _README,
    "requirements.txt": _REQUIREMENTS,
    "pyproject.toml": _PYPROJECT,
    ".gitignore": _IGNORE,
}
_TAKEN = {"ask", "rethaw", "Context", "Image", "MODEL", "pytest", "LocalContext", "AgentServer", "pytest_plugins"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def texts(name: str) -> dict[str, str]:
    """File name -> content, for an agent of this name. Raises InvalidInput when no agent can have it."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not an agent's name", remedy="pass --name with letters, digits, '.', '_' and '-'"
        )
    function = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()
    if not function.isidentifier() or keyword.iskeyword(function) or function in _TAKEN or function == "test":
        function = f"agent_{function}"
    given = "" if function == name else f'name="{name}", '
    put_in = {"name": name, "function": function, "given": given}
    return {file: re.sub(r"@(name|function|given)@", lambda m: put_in[m[1]], text) for file, text in FILES.items()}


def write(directory: Path, name: str) -> list[Path]:
    """Write them all, or nothing: raises Conflict naming what is there already."""
    content = texts(name)
    there = sorted(file for file in content if (directory / file).exists() or (directory / file).is_symlink())
    if there:
        raise Conflict(
            f"{directory}: {', '.join(there)} exist{'s' if len(there) == 1 else ''} already",
            remedy="name another directory, or move what is there",
        )
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in content.items():
            with (directory / file).open("x", encoding="utf-8") as out:
                written.append(directory / file)
                out.write(text)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise InvalidInput(
            f"{error.filename or directory}: {error.strerror}", remedy="name another directory"
        ) from error
    return written
