"""A tool loop around the Anthropic client: `rethaw run examples/guides/anthropic/agent.py`"""

import subprocess
from pathlib import Path
from typing import Any

import rethaw
from rethaw import Context, Image

IMAGE = Image.debian().pip_install("anthropic==2.14.0")
SYSTEM = "You are a programmer in an empty directory. Work in small steps with the tools, then say what you found."
TOOLS = [
    {
        "name": "write_file",
        "description": "Write a file of the project.",
        "input_schema": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "content": {"type": "string"}},
            "required": ["name", "content"],
        },
    },
    {
        "name": "run_command",
        "description": "Run a command in a shell that keeps its variables and its directory.",
        "input_schema": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
]


class Tools:
    """One shell for the whole session, a child process at the other end of two pipes."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.shell = subprocess.Popen(
            ["bash"], cwd=place, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def write_file(self, name: str, content: str) -> str:
        (self.place / name).write_text(content)
        return f"{len(content)} characters"

    def run_command(self, command: str) -> str:
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.write(f"{command}\nprintf '\\nthe end: %d\\n' $?\n")
        lines: list[str] = []
        for line in self.shell.stdout:
            if line.startswith("the end: "):
                return f"{''.join(lines).strip()}\nexit code {line.split()[-1]}"
            lines.append(line)
        return f"{''.join(lines)}\nthe shell has ended"


@rethaw.agent(image=IMAGE)
def programmer(
    ctx: Context, goal: str = "Print the first ten primes with Python.", model: str = "claude-sonnet-5"
) -> dict[str, Any]:
    import anthropic

    place = Path("/project")
    place.mkdir()
    tools = Tools(place)
    client = anthropic.Anthropic()
    messages: list[Any] = [{"role": "user", "content": goal}]
    while True:
        with client.messages.stream(
            model=model, max_tokens=4096, system=SYSTEM, messages=messages, tools=TOOLS
        ) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
            answer = stream.get_final_message()
        print()
        messages.append({"role": "assistant", "content": answer.content})
        results: list[dict[str, Any]] = []
        for block in answer.content:
            if block.type == "tool_use":
                print(f"[{block.name}]", flush=True)
                said = getattr(tools, block.name)(**block.input)
                results.append({"type": "tool_result", "tool_use_id": block.id, "content": said})
        if not results:
            break
        messages.append({"role": "user", "content": results})
    said = "".join(block.text for block in answer.content if block.type == "text")
    return {"answer": said, "files": sorted(p.name for p in place.iterdir())}
