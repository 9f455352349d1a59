"""What guestd is told at a fresh boot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rethaw.images import guest, runtime
from rethaw.model.types import AgentSpec, Assignment, Boot

_DIRECT = "localhost,127.0.0.1,::1"  # the sandbox's own, the gateway among it
GATEWAY = "http://127.0.0.1:8484"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Without what the agent's environment says of Python.
_CARRY = (
    "-I", "-S", "-c",
    "import sys; sys.path.insert(0, '/.rethaw/lib'); from rethaw.guest import carry; carry.main()",
)  # fmt: skip
# Our own interpreter is no matter of the environment.
_PRIVATE = (
    "-I", "-u", "-c",
    "import sys; sys.path.insert(0, '/.rethaw/lib'); from rethaw.guest import runner; sys.exit(runner.main())",
)  # fmt: skip
RUNNER = ("-m", "rethaw.guest.runner")


def guest_env(a: Assignment, providers: Iterable[str]) -> dict[str, str]:
    """The agent's environment. Keys are the constant `rethaw`: real ones never enter the guest (promise 8)."""
    env = {
        "PATH": _PATH,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONPATH": "/.rethaw/lib",
        "PYTHONUNBUFFERED": "1",
        "RETHAW_SESSION": a.session,
        "RETHAW_ATTEMPT": str(a.attempt),
        "OPENAI_BASE_URL": f"{GATEWAY}/openai/v1",
        "OPENAI_API_BASE": f"{GATEWAY}/openai/v1",  # of older clients, and of LiteLLM and what is built on it
        "OPENAI_API_KEY": "rethaw",
        "ANTHROPIC_BASE_URL": f"{GATEWAY}/anthropic",
        "ANTHROPIC_API_KEY": "rethaw",
    }
    for name in providers:
        env[f"RETHAW_{name.upper().replace('-', '_')}_URL"] = f"{GATEWAY}/{name}"
    if a.agent.terminal is not None:
        env["TERM"] = a.agent.terminal.kind
    given = {**a.agent.image.env, **a.agent.env}
    return {**env, **(_proxies(given) if a.agent.allow or a.agent.entry is None else {}), **given}


def _proxies(given: Mapping[str, str]) -> dict[str, str]:
    """The way out. It is there for a command that may go nowhere as well: a refusal at the proxy says more than a name
    that is not there. Not for a Python function without `allow`: with it each HTTP client has two more transports and contexts for TLS, 0.6 MiB
    more in a first snapshot and twice as much per turn (0.6 to 1.2 MiB, examples/coder/demo.py). A setting that the image or
    the agent makes itself, in capitals or not, stays alone."""
    ours = {"HTTP_PROXY": GATEWAY, "HTTPS_PROXY": GATEWAY, "NO_PROXY": _DIRECT}
    theirs = {name.upper() for name in given}
    return {form: value for name, value in ours.items() if name not in theirs for form in (name, name.lower())}


def _workdir(agent: AgentSpec) -> str:
    """The agent's own, else its image's, else where its code is."""
    if agent.workdir != "/":
        return agent.workdir
    return agent.image.workdir or ("/app" if agent.entry else "/")


def start_config(a: Assignment, providers: Iterable[str], rootfs: Path) -> dict[str, Any]:
    """The `start` control message, for a sandbox of the tree `rootfs`. Blocking."""
    env = guest_env(a, providers)
    command = list(a.agent.command)
    if a.agent.entry:
        python = a.agent.image.python or guest.agents_python(rootfs, env["PATH"])
        command = [python, *(_PRIVATE if python == runtime.PYTHON else RUNNER), a.agent.entry]
    if a.files is not None:
        command = [guest.python(rootfs), *_CARRY, *command]
    boot = a.boot or Boot(args={}, cursor=0, fresh=False)
    terminal = a.agent.terminal
    return {
        "command": command,
        "env": env,
        "workdir": _workdir(a.agent),
        "session": a.session,
        "attempt": a.attempt,
        "generation": a.generation,
        "boot": boot.model_dump(mode="json"),
        **({"terminal": {"rows": terminal.rows, "cols": terminal.cols}} if terminal is not None else {}),
        **({"stdin": True} if a.agent.stdin else {}),
    }
