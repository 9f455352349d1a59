"""guestd: puts the parts together and obeys the node.

Control messages of the node: start, signal, resize, kill, ping, dial, quiesce, go, crash. Messages to the node: hello, quiet,
pong, left, resized.

Environment, for tests: RETHAW_RUN_DIR (default /run/rethaw) holds the socket and the generation file, RETHAW_PORT
(default 8484; 0 takes a free one, written to RETHAW_RUN_DIR/port), RETHAW_NAMES_PORT (default 53) the same for names.
"""

# Paths are plain strings here: importing pathlib would double the start-up time of PID 1.
# ruff: noqa: PTH100, PTH103, PTH105, PTH118, PTH120, PTH123

from __future__ import annotations

import gc
import os
import time

from rethaw.channel.lean import cast
from rethaw.guest import hostname
from rethaw.guest.calls import Calls
from rethaw.guest.dial import Dials
from rethaw.guest.loop import READ, Loop, child_signals
from rethaw.guest.names import PORT, Names
from rethaw.guest.process import Agent
from rethaw.guest.web import Server
from rethaw.guest.wire import Wire, note
from rethaw.model.errors import ChannelBroken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Guest:
    """One sandbox's inside."""

    def __init__(self) -> None:
        self._loop = Loop()
        self._run_dir = os.environ.get("RETHAW_RUN_DIR", "/run/rethaw")
        os.makedirs(self._run_dir, exist_ok=True)
        self._wire = Wire(self._loop, 0, 1)
        self._calls = Calls(self._loop, self._wire, os.path.join(self._run_dir, "context.sock"))
        self._web = Server(self._loop, self._wire, int(os.environ.get("RETHAW_PORT", "8484")), self._calls.new_id)
        self._names = Names(self._loop, int(os.environ.get("RETHAW_NAMES_PORT", PORT)), self._looked_up)
        self._agent = Agent(self._loop, lambda body: self._calls.tell("exit", body))
        self._dials = Dials(self._loop, self._wire)
        self._agent.on_other = self._dials.reaped
        self._started = False
        self._generation = ""
        self._signals = child_signals()
        self._write("port", str(self._web.address[1]))
        self._write("names", str(self._names.port))
        self._loop.watch(self._signals, READ, self._children)
        self._wire.on_control = self._control
        self._wire.on_quiet = self._quiet
        self._wire.on_go = self._go
        self._wire.on_progress = self._web.progress
        self._wire.on_lost = self._agent.kill

    def run(self) -> None:
        while self._loop.running:
            self._loop.run_once()

    def _looked_up(self, name: str) -> None:
        if self._started:
            self._calls.tell("lookup", {"host": name})

    def _children(self, events: int) -> None:
        os.read(self._signals, 4096)
        self._agent.reap()

    # ---- what the node says

    def _control(self, message: Dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "ping":
            self._wire.control({"type": "pong", "n": message.get("n")})
        elif kind == "dial" and self._started:
            self._dials.take(message)
        elif kind == "start" and not self._started:
            self._start(message)
        elif kind == "signal":
            self._agent.signal(int(message.get("sig", 15)))
        elif kind == "resize":
            self._resize(int(message["rows"]), int(message["cols"]))
        elif kind == "kill":
            self._agent.kill()
        elif kind == "crash":
            self._agent.kill()
            os._exit(1)
        else:
            raise ChannelBroken(f"malformed control message: {kind!r} is not expected now")

    def _start(self, config: Dict[str, Any]) -> None:
        try:
            command = [str(a) for a in cast("List[Any]", config["command"])]
            attempt = int(config["attempt"])
            boot = cast("Dict[str, Any]", config.get("boot") or {})
            given = {str(k): str(v) for k, v in cast("Dict[str, Any]", config.get("env") or {}).items()}
            cursor = int(boot.get("cursor", 0))
            providers = config.get("providers")
            size = cast("Dict[str, Any]", config.get("terminal") or {})
            terminal = (int(size["rows"]), int(size["cols"])) if size else None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ChannelBroken(f"malformed start: {error!r}") from None
        if not command:
            raise ChannelBroken("malformed start: the command is empty")
        self._started = True
        self._generation = str(config.get("generation", ""))
        self._calls.attempt = attempt
        self._calls.cursor = cursor
        self._calls.info = {
            "session": config.get("session"),
            "attempt": attempt,
            "generation": self._generation,
            "args": boot.get("args") or {},
            "cursor": cursor,
            "fresh": bool(boot.get("fresh", False)),
        }
        if providers is not None:
            self._web.providers = {str(p) for p in cast("List[Any]", providers)}
        self._write("session", str(config.get("session")))
        self._write("generation", self._generation)
        hostname.change(str(config.get("session")), self._run_dir)
        workdir = str(config.get("workdir") or "/")
        self._dials.env, self._dials.workdir = self._environment(given), workdir
        streams = self._agent.start(command, self._dials.env, workdir, terminal, bool(config.get("stdin")))
        self._wire.hello(self._generation, {**self._about(), "left": self._web.recently_left()})
        for stream in streams:
            self._wire.open(stream)
        self._agent.settle()

    def _environment(self, given: Dict[str, str]) -> Dict[str, str]:
        library = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        env = {
            "PATH": PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "RETHAW_SESSION": str(self._calls.info.get("session")),
        }
        env.update(given)
        env["PATH"] += ":" + os.path.join(
            os.path.dirname(library), "bin"
        )  # the `rethaw` command, behind everything else
        env["RETHAW_SOCKET"] = os.path.join(self._run_dir, "context.sock")
        env["PYTHONPATH"] = library + (":" + env["PYTHONPATH"] if env.get("PYTHONPATH") else "")
        return env

    def _resize(self, rows: int, cols: int) -> None:
        if self._agent.keys is not None and self._agent.exit is None:
            self._wire.control({"type": "resized", **self._agent.keys.resize(rows, cols)})

    # ---- freezing and thawing

    def _about(self) -> Dict[str, Any]:
        terminal = self._agent.terminal.about() if self._agent.terminal is not None else {}
        return {"pid": self._agent.pid, "exited": self._agent.exit is not None, "dials": True, **terminal}

    def _quiet(self) -> Dict[str, Any]:
        """What the node may want to know of the state that is captured next."""
        exchanges: List[List[Any]] = []
        for stream in self._wire.streams.values():
            about = stream.describe()
            if about["kind"] == "exchange" and about["exchange"] is not None:
                exchanges.append([about["exchange"], about["head_received"], about["received"]])
        return {"exchanges": exchanges, "cursor": self._calls.cursor, **self._about()}

    def _go(self, message: Dict[str, Any]) -> Dict[str, Any]:
        generation = message.get("generation")
        if not isinstance(generation, str):
            raise ChannelBroken(f"malformed go: the generation is {generation!r}")
        if message.get("set_clock") and isinstance(message.get("wall_ns"), int):
            try:
                time.clock_settime_ns(time.CLOCK_REALTIME, message["wall_ns"])
            except OSError as error:
                note(f"setting the clock: {error}")
        session = message.get("session")
        if isinstance(session, str) and session != self._calls.info.get("session"):
            self._calls.info["session"] = session  # a fork: this memory was another session's
            self._write("session", session)
            hostname.change(session, self._run_dir)
        self._calls.before_hello()
        if generation != self._generation:
            self._generation = generation
            self._calls.info["generation"] = generation
            self._write("generation", generation)
            self._calls.restored(generation)
            self._web.proxy.restored()
            self._dials.restored()
        self._agent.reap()
        return {**self._about(), "left": self._web.recently_left()}

    def _write(self, name: str, text: str) -> None:
        path = os.path.join(self._run_dir, name)
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(text + "\n")
        os.replace(path + ".new", path)


def main() -> None:
    guest = Guest()
    gc.collect()
    gc.freeze()
    guest.run()
