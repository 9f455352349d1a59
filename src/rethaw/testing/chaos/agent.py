"""The agent that the chaos harness torments. Runs in the sandbox with the standard library only.

What it returns is the same however often it was killed; what it does on the way is not: every tool result and every
message has fresh random bytes, so that a command that runs again leaves different bytes behind.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

KINDS = ("plain", "parallel", "impatient", "inbox", "command", "signal", "timer")
POOL = ThreadPoolExecutor(8)
BASE = urllib.parse.urlsplit(os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8484/openai/v1"))


class Again(Exception):
    """The call failed in a way that a client tries again."""


def post(messages: list[Any], stream: bool, timeout: float) -> str:
    """One chat completion; the text. Raises Again when the connection broke, timed out, or the server said 5xx."""
    body = json.dumps({"model": "chaos", "messages": messages, "stream": stream})
    connection = http.client.HTTPConnection(BASE.hostname or "", BASE.port, timeout=timeout)
    try:
        connection.request(
            "POST",
            BASE.path + "/chat/completions",
            body,
            {"content-type": "application/json", "authorization": "Bearer rethaw"},
        )
        answer = connection.getresponse()
        data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Again(repr(error)) from error
    finally:
        connection.close()
    if answer.status >= 500 or answer.status == 429:
        raise Again(f"HTTP {answer.status}")
    if answer.status != 200:
        raise RuntimeError(f"HTTP {answer.status}: {data[:300]!r}")
    if not stream:
        return str(json.loads(data)["choices"][0]["message"]["content"])
    lines = [line[6:] for line in data.decode().split("\n\n") if line.startswith("data: ")]
    if not lines or lines.pop() != "[DONE]":
        raise Again("the stream ended early")
    return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines)


async def ask(messages: list[Any], stream: bool = True, timeout: float = 60.0) -> str:
    """As a client with retries does it: the same request again, after a moment, each time a little more patient. (An
    answer waits for a snapshot that holds the request: on a busy machine that alone may take longer than the first.)"""
    for tries in range(40):
        try:
            patience = timeout + 0.1 * tries
            return await asyncio.get_running_loop().run_in_executor(POOL, post, messages, stream, patience)
        except Again as error:
            print("again:", error, flush=True)
            await asyncio.sleep(0.1)
    raise RuntimeError("40 tries were not enough")


async def command() -> list[str]:
    """A command that writes something else each time it runs."""
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        "date +%s%N; head -c 9 /dev/urandom | od -An -tx1 | tee -a /tmp/noise",
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    return output.decode().split()


def die_later(seconds: float) -> None:
    """SIGKILL this process after `seconds` of its own time."""

    def run() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=run, daemon=True).start()


async def chaos(ctx: Any, turns: int, die_at: int | None = None, die_after: float = 0.0) -> dict[str, Any]:
    """`die_at`: the turn in which this process kills itself, `die_after` seconds into it."""
    messages: list[Any] = [{"role": "user", "content": "begin"}]
    answers: list[list[str]] = []
    inbox: list[int] = []
    signals: list[int] = []
    sent = timeouts = 0
    for turn in range(turns):
        kind = KINDS[turn % len(KINDS)]
        if turn == die_at:
            die_later(die_after)
        noise = " ".join(await command())
        head = f"turn {turn} kind {kind}"
        await ctx.emit("turn", turn=turn, noise=noise)
        if kind == "inbox":
            message = await ctx.receive(timeout="10m")
            inbox.append(message.payload["i"])
            noise += f" message {message.payload['i']}"
        elif kind == "signal":
            answer = await ctx.wait(f"go-{turn}", timeout="10m")
            signals.append(answer.payload["go"])
        elif kind == "timer":
            await ctx.sleep(0.3)
            try:
                await ctx.wait(f"never-{turn}", timeout=0.2)
            except TimeoutError:
                timeouts += 1
        messages.append({"role": "user", "content": f"{head} branch 0 noise {noise}"})
        if kind == "parallel":
            branches = [[*messages, {"role": "user", "content": f"{head} branch {b} noise {noise}"}] for b in range(3)]
            said = list(await asyncio.gather(*(ask(branch, stream=b != 1) for b, branch in enumerate(branches))))
        elif kind == "impatient":
            said = [await ask(messages, timeout=0.7)]
        else:
            said = [await ask(messages, stream=kind != "command")]
        answers.append(said)
        messages.append({"role": "assistant", "content": " ".join(said)})
        if kind in ("plain", "parallel", "inbox"):
            for _ in range(2 if kind == "parallel" else 1):
                sent += 1
                await ctx.send({"n": sent, "turn": turn, "answer": said[0], "noise": noise})
        print(f"{head} done", flush=True)
    return {"answers": answers, "inbox": inbox, "signals": signals, "sent": sent, "timeouts": timeouts}
