"""Codex, unchanged, from npm: `rethaw run examples/guides/codex/agent.py --task "..."`"""

import json
import subprocess
from pathlib import Path
from typing import Any

import rethaw
from rethaw import Context, Image

IMAGE = Image.debian().npm_install("@openai/codex@0.171.0")


@rethaw.agent(image=IMAGE, memory="2GiB")
def codex(
    ctx: Context,
    task: str = "Write primes.py, which prints the primes below 30, and run it.",
    model: str = "gpt-5.5",
) -> dict[str, Any]:
    place = Path("/project")
    place.mkdir()
    # The sandbox that it would make for itself is not needed in one.
    flags = ["--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--model", model]
    flags += ["--disable", "plugins", "--disable", "apps"]  # they ask for files from elsewhere
    done = subprocess.run(
        ["codex", "exec", *flags, task], cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True
    )
    items = [line["item"] for line in map(json.loads, done.stdout.splitlines()) if line["type"] == "item.completed"]
    return {
        "answer": [item["text"] for item in items if item["type"] == "agent_message"][-1],
        "commands": [item["aggregated_output"] for item in items if item["type"] == "command_execution"],
        "files": {path.name: path.read_text() for path in place.iterdir() if path.is_file()},
    }
