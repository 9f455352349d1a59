"""A programmer made with the OpenAI Agents SDK: `rethaw run examples/guides/openai-agents/agent.py`"""

import asyncio
import subprocess
from pathlib import Path

import rethaw
from rethaw import AsyncContext, Image

# Traces would go to OpenAI's own host, past the gateway; there is no network in the sandbox.
IMAGE = Image.debian().pip_install("openai-agents==0.24.0").env(OPENAI_AGENTS_DISABLE_TRACING="1")
INSTRUCTIONS = (
    "You are a programmer in an empty directory. Work in small steps: write files, run them, then say what you found."
)


@rethaw.agent(image=IMAGE)
async def programmer(
    ctx: AsyncContext, goal: str = "Print the first ten primes with Python.", model: str = "gpt-5-mini"
) -> dict[str, object]:
    from agents import Agent, Runner, function_tool
    from openai.types.responses import ResponseTextDeltaEvent

    place = Path("/project")
    place.mkdir()
    done: list[str] = []  # in memory only

    @function_tool
    def write_file(name: str, content: str) -> str:
        """Write a file of the project."""
        (place / name).write_text(content)
        done.append(f"wrote {name}")
        return f"{len(content)} characters"

    @function_tool
    async def run_command(command: str) -> str:
        """Run a shell command in the project."""
        done.append(f"ran {command}")
        ran = await asyncio.to_thread(
            subprocess.run, command, shell=True, cwd=place, capture_output=True, text=True, timeout=60, check=False
        )
        return f"{ran.stdout}{ran.stderr}exit code {ran.returncode}"

    agent = Agent(name="programmer", instructions=INSTRUCTIONS, model=model, tools=[write_file, run_command])
    result = Runner.run_streamed(agent, goal, max_turns=30)
    async for event in result.stream_events():
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
            print(event.data.delta, end="", flush=True)
        elif event.type == "run_item_stream_event" and event.name == "tool_output":
            print(f"\n{done[-1]}", flush=True)
    print()
    return {"answer": result.final_output, "done": done, "files": sorted(p.name for p in place.iterdir())}
