"""`rethaw run` of a command that has this terminal, this stdin, copies of directories, or is erased afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethaw.model.errors import InvalidInput
from rethaw.sdk.additions import Addition, digest
from rethaw.sdk.images import Image

if TYPE_CHECKING:
    from rethaw.model.types import AgentSpec
    from rethaw.sdk.client import Client
    from rethaw.sdk.session import Session

WORK = "/work"
DETACHED = 0


@dataclass(frozen=True)
class Copy:
    """A directory of this machine that travels to `target`."""

    addition: Addition
    target: str


def copies_of(given: Sequence[str]) -> list[Copy]:
    """`--mount-copy DIR[:TARGET]` each. Raises InvalidInput, NotFound."""
    out: list[Copy] = []
    for text in given:
        where, colon, target = text.rpartition(":")
        if not colon or not target.startswith("/"):
            where, target = text, WORK
        if not where:
            raise InvalidInput(f"--mount-copy {text!r} names no directory", remedy="write DIR or DIR:TARGET")
        image = Image().add_local_dir(Path(where).absolute(), target)
        out += [Copy(source, source.target) for source in image.sources() if isinstance(source, Addition)]
    targets = [one.target for one in out]
    if len(set(targets)) < len(targets):
        raise InvalidInput(f"two directories are to be at {max(targets, key=targets.count)}", remedy="write DIR:TARGET")
    return out


@dataclass(frozen=True)
class Joined:
    """How the command is joined to this terminal."""

    interactive: bool = False
    tty: bool = False
    detach_keys: str | None = None
    rm: bool = False
    copies: tuple[Copy, ...] = ()

    def checked(self, image: str | None, *, detached: bool, json: bool) -> Joined:
        """Raises InvalidInput for what does not fit together."""
        from rethaw.cli.attaching import keys_of

        used = [
            name for name, value in (("-i", self.interactive), ("-t", self.tty), ("--mount-copy", self.copies)) if value
        ]
        if used and image is None:
            raise InvalidInput(f"{used[0]} is for a command in an image", remedy="write --image base -- COMMAND")
        if self.tty and not detached and not (os.isatty(0) and os.isatty(1)):
            raise InvalidInput(
                "-t wants a terminal here, and this command's input or output is none",
                remedy="leave out -t, or start it with -d and `rethaw attach` from a terminal",
            )
        if self.tty and json:
            raise InvalidInput("-t and --json both want this output", remedy="leave out one of them")
        if self.rm and detached:
            raise InvalidInput(
                "--rm erases the session at its end, and -d does not wait for that", remedy="leave out one"
            )
        if self.detach_keys is not None and not self.tty:
            raise InvalidInput("--detach-keys are for a terminal", remedy="add -t")
        keys_of(self.detach_keys or "none")
        return self

    def over(self, connection: Client, agent: AgentSpec) -> AgentSpec:
        """`agent` with all of this; what it names is on the server."""
        from rethaw.cli.attaching import size_here
        from rethaw.model.image_types import ImageStep

        changes: dict[str, Any] = {}
        if self.tty:
            from rethaw.model.types import TerminalSpec

            rows, cols = size_here() or (24, 80)
            kind = os.environ.get("TERM", "")
            fits = kind and kind not in ("dumb", "unknown")
            plain = TerminalSpec(rows=rows, cols=cols)
            try:
                changes["terminal"] = TerminalSpec(rows=rows, cols=cols, kind=kind) if fits else plain
            except ValueError:  # a name that no terminal has
                changes["terminal"] = plain
        if self.interactive:
            changes["stdin"] = True
        if self.copies:
            steps = list(agent.image.steps)
            for one in self.copies:
                data = one.addition.pack()
                blob = digest(data)
                if not connection.blobs.has(blob):
                    connection.blobs.put(data)
                steps.append(ImageStep(kind="add", blob=blob, target=one.addition.place))
            changes["image"] = agent.image.model_copy(update={"steps": tuple(steps)})
            if agent.workdir == "/":
                changes["workdir"] = self.copies[0].target
        return agent.model_copy(update=changes) if changes else agent

    def watch(self, connection: Client, session: Session[Any]) -> int | None:
        """Joined to its terminal until it ends or somebody detaches: the exit code. None: it has none, its output is to be
        watched as any other's."""
        from rethaw.cli import attaching, output

        if self.tty:
            keys = self.detach_keys or attaching.DETACH_KEYS
            if self.interactive:
                output.note(f"session {session.id}; {said(keys)} detaches")
            return joined(connection, session.id, typing=self.interactive, keys=keys, fresh=True)
        if self.interactive:
            attaching.Piped(connection, session.id).start()
        return None

    def after(self, connection: Client, session: str) -> None:
        """It has been watched."""
        from rethaw.cli import output
        from rethaw.sdk import calls

        if not self.rm:
            return
        if connection.patient(calls.get(session)).state.final:
            connection.sessions.delete(session)
        else:
            output.note(f"{session} goes on and is not erased; later: rethaw rm {session}")

    def with_copies(self, given: Sequence[str]) -> Joined:
        return replace(self, copies=tuple(copies_of(given)))


def said(keys: str) -> str:
    """Keys for a reader."""
    return " ".join(word.strip().title() for word in keys.split(","))


def joined(connection: Client, session: str, *, typing: bool, keys: str, fresh: bool = False, hint: str = "") -> int:
    """Until it ends or somebody detaches; the exit code."""
    from rethaw.cli import attaching, output

    detach = attaching.keys_of(keys)
    end = attaching.Attached(connection, session, typing=typing, detach=detach, fresh=fresh, hint=hint).run()
    if end is None:
        output.note("")
        output.note(f"detached; {session} goes on. Come back: rethaw attach {session}")
        return DETACHED
    code = end.get("code")
    if end.get("state") == "completed":
        return int(code or 0)
    if end.get("reason") != "exited":
        text = output.plain(str(end.get("detail") or end.get("reason")))
        sys.stdout.flush()
        sys.stderr.write(f"\nrethaw: session {session} {end.get('state')}: {text}; see `rethaw why {session}`\n")
    return int(code or 1)


def attach(connection: Client, session: str, *, typing: bool, keys: str) -> int:
    """`rethaw attach`. Raises Conflict for a session that has ended."""
    from rethaw.cli import attach as following
    from rethaw.cli import attaching, output
    from rethaw.model.errors import Conflict

    attaching.keys_of(keys)
    view = connection.sessions.get(session).view
    if view.state.final:
        raise Conflict(
            f"session {view.id} is {view.state.value}: there is nothing to attach to",
            remedy=f"its output: `rethaw logs {view.id}`",
        )
    if view.agent.terminal is None:
        output.note(f"session {view.id} has no terminal: this shows what it writes, Ctrl-C ends that")
        try:
            following.follow(connection, view.id)
        except KeyboardInterrupt:
            return DETACHED
        view = connection.sessions.get(view.id).view
        return view.exit_code or (0 if view.state.value == "completed" else 1)
    if typing and view.agent.stdin and not (os.isatty(0) and os.isatty(1)):
        raise InvalidInput(
            "attach wants a terminal here, and this command's input or output is none",
            remedy=f"add --no-stdin, or read `rethaw logs -f {view.id}`",
        )
    hint = "it takes no keys, for it was started without -i; Ctrl-C leaves" if typing and not view.agent.stdin else ""
    return joined(connection, view.id, typing=typing and view.agent.stdin, keys=keys, hint=hint)
