"""One real server and one scripted provider for the end-to-end tests, and short ways to say things to them."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rethaw.testing import processes
from rethaw.testing.chaos.run import code_archive
from rethaw.testing.model import ScriptedModel
from rethaw.testing.provider import ProviderRequest, Reply
from rethaw.testing.server import RunningServer

ASK = """
import http.client, json, os, threading, time, urllib.parse
def ask(text, timeout=60, headers={}, provider="OPENAI_BASE_URL", path="/chat/completions"):
    base = urllib.parse.urlsplit(os.environ[provider])
    connection = http.client.HTTPConnection(base.hostname, base.port, timeout=timeout)
    body = json.dumps({"model": "test", "messages": [{"role": "user", "content": text}]})
    connection.request("POST", base.path + path, body, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    if response.status != 200:
        return "HTTP %d: %s" % (response.status, data.decode())
    return json.loads(data)["choices"][0]["message"]["content"]
"""


ENGINE = os.environ.get("RETHAW_ENGINE") or "gvisor"  # of agents that do not say which
# An emulated CPU may take a minute for a boot when other things run.
SLOWER = 4 if ENGINE == "qemu" else 1


class Provider(ScriptedModel):
    """Says what it was asked. `answer` may be replaced at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Callable[[ProviderRequest], Reply] = self.echo
        self.inner = self.provider
        self.script(lambda request: self.answer(request))  # noqa: PLW0108 - replaced later

    @staticmethod
    def echo(request: ProviderRequest) -> Reply:
        return Reply(f"echo {request.last_text}")

    def reset(self) -> None:
        self.answer = self.echo

    @property
    def texts(self) -> list[str]:
        """What was asked, in order of arrival."""
        return [c.json["messages"][-1]["content"] for c in list(self.inner.calls) if c.json and "messages" in c.json]


class Session:
    """A started session of `house`."""

    def __init__(self, house: House, view: dict[str, Any]) -> None:
        self.house = house
        self.id: str = view["id"]

    @property
    def view(self) -> dict[str, Any]:
        return self.house.server.request("GET", f"/v1/sessions/{self.id}")

    def events(self, kind: str = "", *, all_lines: bool = False) -> list[dict[str, Any]]:
        return [e for e in self.house.server.events(self.id, all_lines=all_lines) if e["type"].startswith(kind)]

    def output(self, stream: str = "stdout") -> str:
        parts = [body(e) for e in self.events("output") if e["data"]["stream"] == stream]
        return b"".join(parts).decode()

    def post(self, what: str, payload: Any = None) -> Any:
        return self.house.server.request("POST", f"/v1/sessions/{self.id}/{what}", payload or {})

    def signal(self, name: str, payload: Any = None) -> Any:
        return self.post(f"signals/{name}", {"payload": payload})

    def send(self, payload: Any) -> Any:
        return self.post("messages", {"payload": payload})

    def outbox(self) -> list[Any]:
        found = self.house.server.request("GET", f"/v1/sessions/{self.id}/outbox?after=0")["messages"]
        return [json.loads(base64.urlsafe_b64decode(m["payload"])) for m in found]

    def until(self, what: str, condition: Callable[[Session], object], timeout_s: float = 60.0) -> None:
        """Wait for `condition`; a session that failed meanwhile ends the wait with what is known."""
        try:
            processes.wait_until(lambda: condition(self), timeout_s * SLOWER, what)
        except Exception as error:
            tail = "\n".join(
                f"{e['seq']} {e['line']} {e['type']} {e['data']}" for e in self.events(all_lines=True)[-25:]
            )
            raise AssertionError(f"{what}: {error}\n{self.view}\n{tail}\n{self.house.server.log_tail()}") from error

    def until_state(self, *states: str, timeout_s: float = 60.0) -> None:
        self.until(f"state {' or '.join(states)}", lambda s: s.view["state"] in states, timeout_s)

    def until_output(self, text: str, timeout_s: float = 60.0) -> None:
        self.until(f"output {text!r}", lambda s: text in s.output(), timeout_s)

    def result(self, timeout_s: float = 60.0) -> Any:
        self.until_state("completed", "failed", "cancelled", timeout_s=timeout_s)
        found = self.house.server.request("GET", f"/v1/sessions/{self.id}/result?wait_s=1")
        assert found["state"] == "completed", (found, self.view, self.output("stderr"))
        return found["result"]

    def sandbox(self) -> processes.Box:
        (box,) = [b for b in self.house.server.sandboxes() if processes.alive(b.pid)]
        return box

    def crash(self) -> None:
        self.post("crash", {"what": "sandbox"})


class House:
    """Server and provider. `agent(code)` starts a session of the function `main` in `code`."""

    def __init__(self, server: RunningServer, provider: Provider) -> None:
        self.server = server
        self.provider = provider

    def agent(self, code: str, args: dict[str, Any] | None = None, key: str | None = None, **spec: Any) -> Session:
        digest = self.server.request("POST", "/v1/blobs", code_archive(agent=(ASK + code).encode()))["digest"]
        return self.start({"name": "test", "entry": "agent.py::main", "code": digest, **spec}, args, key)

    def start(self, agent: dict[str, Any], args: dict[str, Any] | None = None, key: str | None = None) -> Session:
        body = {"agent": agent, "args": args or {}, **({"key": key} if key else {})}
        return Session(self, self.server.request("POST", "/v1/sessions", body))


@contextmanager
def house(**server: Any) -> Iterator[House]:
    provider = Provider()
    try:
        providers = {**provider.settings(), **server.pop("providers", {})}
        with RunningServer(providers=providers, **server) as running:
            yield House(running, provider)
    finally:
        provider.close()


def body(event: dict[str, Any]) -> bytes:
    return base64.urlsafe_b64decode(event["body"]) if event["body"] else b""


def gapless(events: list[dict[str, Any]]) -> None:
    """Every seq from 1 on, once."""
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))


def wait_for_file(path: Path, timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1, default=str)
