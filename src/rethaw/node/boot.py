"""What guestd is told at a fresh boot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rethaw.model.types import Assignment, Boot

GATEWAY = "http://127.0.0.1:8484"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PYTHON = "/usr/bin/python3"
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
        "OPENAI_API_KEY": "rethaw",
        "ANTHROPIC_BASE_URL": f"{GATEWAY}/anthropic",
        "ANTHROPIC_API_KEY": "rethaw",
    }
    for name in providers:
        env[f"RETHAW_{name.upper().replace('-', '_')}_URL"] = f"{GATEWAY}/{name}"
    return {**env, **a.agent.image.env, **a.agent.env}


def start_config(a: Assignment, providers: Iterable[str]) -> dict[str, Any]:
    """The `start` control message."""
    command = [a.agent.image.python or _PYTHON, *RUNNER, a.agent.entry] if a.agent.entry else list(a.agent.command)
    boot = a.boot or Boot(args={}, cursor=0, fresh=False)
    return {
        "command": command,
        "env": guest_env(a, providers),
        "workdir": "/app" if a.agent.entry and a.agent.workdir == "/" else a.agent.workdir,
        "session": a.session,
        "attempt": a.attempt,
        "generation": a.generation,
        "boot": boot.model_dump(mode="json"),
    }
