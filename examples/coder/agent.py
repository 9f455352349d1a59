"""A small coding agent in plain Python: a tool loop around the real OpenAI client, nothing more.

Nothing here knows that it may be frozen, killed and thawed. `MODEL=openai:gpt-5-mini` or `MODEL=anthropic:claude-sonnet-5`
chooses the model; the key stays with the server and never enters the sandbox.
"""

import asyncio
import hashlib
import json
import os
import time
import urllib.request
from pathlib import Path
from typing import Any

import rethaw

MODEL = os.environ.get("MODEL", "openai:scripted-1")
PROVIDER, _, MODEL_NAME = MODEL.partition(":")
PROJECT = Path("/project")
SYSTEM = """You are a careful programmer in an empty Debian machine with Python. Work with the tools, one small step at
a time: write the files, start the server, try it, run the tests. Before you call the work finished, ask for approval;
after it, ask the running server once more for its count, then say in two sentences what you made."""


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("write_file", "Write a file of the project.", path="relative path", content="the whole text"),
    tool("run_command", "Run a shell command in the project, at most 60 s.", command="for sh -c"),
    tool("start_server", "Start a server that keeps running.", command="for sh -c", port="the port it listens on"),
    tool("fetch_url", "GET a URL on this machine.", url="http://127.0.0.1:PORT/PATH"),
    tool("ask_approval", "Ask a person; returns their answer, maybe days later.", question="what to approve"),
]


class Tools:
    def __init__(self, ctx: rethaw.AsyncContext) -> None:
        self.ctx = ctx
        self.servers: list[asyncio.subprocess.Process] = []

    async def write_file(self, path: str, content: str) -> str:
        target = (PROJECT / path).resolve()
        if not target.is_relative_to(PROJECT):
            return f"{path} is outside of the project"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        return f"wrote {len(content)} characters to {path}"

    async def run_command(self, command: str) -> str:
        process = await asyncio.create_subprocess_shell(
            command, cwd=PROJECT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), 60)
        except TimeoutError:
            process.kill()
            return "stopped after 60 s"
        return f"{output.decode(errors='replace')[-8000:]}\nexit code {process.returncode}"

    async def start_server(self, command: str, port: str) -> str:
        log = (PROJECT / "server.log").open("ab")
        server = await asyncio.create_subprocess_exec(
            "sh", "-c", f"exec {command}", cwd=PROJECT, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        self.servers.append(server)
        end = time.monotonic() + 15
        while time.monotonic() < end:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", int(port))
                writer.close()
                return f"running with pid {server.pid}"
            except OSError:
                await asyncio.sleep(0.1)
        return f"nothing listens on port {port} after 15 s; see server.log"

    async def fetch_url(self, url: str) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def get() -> str:
            with opener.open(url, timeout=20) as answer:
                return f"{answer.status} {answer.read(8000).decode(errors='replace')}"

        try:
            return await asyncio.to_thread(get)
        except OSError as e:
            return f"failed: {e}"

    async def ask_approval(self, question: str) -> str:
        print(f"[waiting for approval] {question}", flush=True)
        signal = await self.ctx.wait("approval", timeout="3d")
        return json.dumps(signal.payload)

    async def call(self, name: str, arguments: str) -> str:
        try:
            args = json.loads(arguments or "{}")
            print(f"[{name}] {next(iter(args.values()), '')!s:.60}".replace("\n", " "), flush=True)
            return str(await getattr(self, name)(**args))
        except (AttributeError, TypeError, ValueError) as e:
            return f"bad call of {name}: {e}"


async def ask_openai(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """One turn of the model, streamed. Returns the assistant message."""
    from openai import AsyncOpenAI

    text, calls = "", dict[int, dict[str, Any]]()
    async with AsyncOpenAI() as client:
        stream = await client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "system", "content": SYSTEM}, *messages],
            tools=TOOLS,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    text += choice.delta.content
                    print(choice.delta.content, end="", flush=True)
                for part in choice.delta.tool_calls or []:
                    call = calls.setdefault(
                        part.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
                    )
                    call["id"] = part.id or call["id"]
                    if part.function:
                        call["function"]["name"] += part.function.name or ""
                        call["function"]["arguments"] += part.function.arguments or ""
    print(flush=True)
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    return message | ({"tool_calls": [calls[i] for i in sorted(calls)]} if calls else {})


async def ask_anthropic(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The same with Anthropic's own client; the conversation is kept in OpenAI's form."""
    from anthropic import AsyncAnthropic

    turns: list[dict[str, Any]] = []
    for m in messages:
        if m["role"] == "tool":
            block = {"type": "tool_result", "tool_use_id": m["tool_call_id"], "content": m["content"]}
            role, blocks = "user", [block]
        else:
            role = m["role"]
            blocks = [{"type": "text", "text": m["content"]}] if m.get("content") else []
            for c in m.get("tool_calls", []):
                args = json.loads(c["function"]["arguments"] or "{}")
                blocks.append({"type": "tool_use", "id": c["id"], "name": c["function"]["name"], "input": args})
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    tools = [t["function"] for t in TOOLS]
    tools = [{"name": t["name"], "description": t["description"], "input_schema": t["parameters"]} for t in tools]
    async with (
        AsyncAnthropic() as client,
        client.messages.stream(model=MODEL_NAME, max_tokens=8192, system=SYSTEM, messages=turns, tools=tools) as stream,
    ):
        async for piece in stream.text_stream:
            print(piece, end="", flush=True)
        answer = await stream.get_final_message()
    print(flush=True)
    text = "".join(b.text for b in answer.content if b.type == "text")
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": json.dumps(b.input)}}
        for b in answer.content
        if b.type == "tool_use"
    ]
    return {"role": "assistant", "content": text or None} | ({"tool_calls": calls} if calls else {})


@rethaw.agent(
    image=rethaw.Image.debian().pip_install("anthropic" if PROVIDER == "anthropic" else "openai"),
    env={"MODEL": MODEL},
    idle_suspend="5s",
)
async def coder(ctx: rethaw.AsyncContext, goal: str) -> str:
    PROJECT.mkdir(exist_ok=True)
    tools = Tools(ctx)
    ask = ask_anthropic if PROVIDER == "anthropic" else ask_openai
    messages: list[dict[str, Any]] = [{"role": "user", "content": goal}]
    while True:
        answer = await ask(messages)
        messages.append(answer)
        calls = answer.get("tool_calls", [])
        if not calls:
            break
        results = await asyncio.gather(*(tools.call(c["function"]["name"], c["function"]["arguments"]) for c in calls))
        messages += [
            {"role": "tool", "tool_call_id": c["id"], "content": r} for c, r in zip(calls, results, strict=True)
        ]
    for server in tools.servers:
        server.terminate()
    files = {str(p.relative_to(PROJECT)): p for p in PROJECT.rglob("*") if p.is_file() and p.suffix in (".py", ".md")}
    await ctx.emit(
        "files", **{"sha256": {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}}
    )
    return answer["content"] or ""
