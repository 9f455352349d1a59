"""Claude Code, unchanged, from npm: `rethaw run examples/guides/claude-code/agent.py --task "..."`"""

import json
import subprocess
from pathlib import Path
from typing import Any

import rethaw
from rethaw import Context, Image

IMAGE = (
    Image.debian()
    .npm_install("@anthropic-ai/claude-code@2.1.332")
    .env(
        IS_SANDBOX="1",  # or it does not let root skip its questions
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",  # no telemetry, no updates: the model is all it asks
    )
)


@rethaw.agent(image=IMAGE, memory="2GiB")
def claude(
    ctx: Context, task: str = "Write primes.py, which prints the primes below 30, and run it."
) -> dict[str, Any]:
    place = Path("/project")
    place.mkdir()
    command = ["claude", "--print", "--output-format", "json", "--dangerously-skip-permissions", task]
    done = subprocess.run(command, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    said = json.loads(done.stdout)
    return {
        "answer": said["result"],
        "turns": said["num_turns"],
        "files": {path.name: path.read_text() for path in place.iterdir() if path.is_file()},
    }
