"""The tools: each is one call of the SDK, or two. Errors come back as tool errors with code, message and remedy."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import Field

from rethaw.mcp import shapes
from rethaw.model.errors import InvalidInput, RethawError, SessionFailed, WaitTimeout
from rethaw.model.types import AgentSpec, Event

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

    from rethaw.mcp.connection import Connection
    from rethaw.mcp.local import AgentsDir

Tool = Callable[..., Awaitable[Any]]
WAIT_MAX_S = 50.0  # below what clients commonly allow a tool
_PAGE = 200
_FILES = 500
_OUTPUT_BYTES = 64 << 10

SessionId = Annotated[str, Field(description="a session's id, or a unique beginning of one")]
SnapshotId = Annotated[str, Field(description="a snapshot's id, or a session's: its newest snapshot")]
WaitS = Annotated[float, Field(ge=0, le=WAIT_MAX_S, description="wait so many seconds for something to come")]
Key = Annotated[str | None, Field(description="starting again with the same key gives the same session")]
Once = Annotated[str | None, Field(description="sending again with the same key does nothing more")]
Payload = Annotated[Any, Field(description="any JSON value; a text that is a JSON object or list is taken as that")]
Place = Annotated[
    int | str | None, Field(description="a seq of its log, a snapshot's id, or nothing for the newest snapshot")
]
Redeliver = Annotated[bool, Field(description="deliver messages and signals again that came after that point")]

_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(destructive_hint=False, open_world_hint=False)
_REPEATABLE = ToolAnnotations(destructive_hint=False, idempotent_hint=True, open_world_hint=False)
_ENDS = ToolAnnotations(destructive_hint=True, open_world_hint=False)


class Tools:
    """`agents`: the directory whose agents may be started, None for none."""

    def __init__(self, connection: Connection, agents: AgentsDir | None) -> None:
        self._connection = connection
        self._agents = agents

    def register(self, server: MCPServer[Any]) -> None:
        """Give all of them to `server`, which says errors as `failed` does."""
        self._give(server, _ADDS, self.session_start_command, self.session_start_deployed, self.session_fork)
        self._give(server, _READS, self.deployed_list)
        self._give(server, _READS, self.session_list, self.session_show, self.session_why, self.session_watch)
        self._give(server, _READS, self.session_output, self.session_outbox, self.session_result)
        self._give(server, _ADDS, self.session_send, self.session_signal, self.session_snapshot)
        self._give(server, _REPEATABLE, self.session_suspend, self.session_resume)
        self._give(server, _ENDS, self.session_rewind, self.session_cancel)
        self._give(server, _READS, self.snapshot_list, self.snapshot_files, self.snapshot_read)
        if self._agents is not None:
            self._give(server, _READS, self.agent_list)
            self._give(server, _ADDS, self.session_start_agent)

    @staticmethod
    def _give(server: MCPServer[Any], hints: ToolAnnotations, *tools: Tool) -> None:
        for tool in tools:
            about = " ".join((tool.__doc__ or "").split())
            server.add_tool(_told(tool), description=about, annotations=hints)

    # ------------------------------------------------------------ starting

    async def session_start_command(
        self,
        command: Annotated[list[str], Field(min_length=1, description='argv, like ["sh", "-c", "echo hello"]')],
        apt: Annotated[list[str], Field(description="Debian packages of its image")] = [],  # noqa: B006
        pip: Annotated[list[str], Field(description="Python packages of its image")] = [],  # noqa: B006
        env: Annotated[dict[str, str], Field(description="its environment; no secrets, snapshots keep them")] = {},  # noqa: B006
        memory: Annotated[str, Field(description="what it may use, like 1GiB")] = "512MiB",
        idle_suspend: Annotated[str, Field(description='suspend it when it waits so long; "never"')] = "20s",
        name: Annotated[str | None, Field(description="the agent's name; else the command's")] = None,
        key: Key = None,
    ) -> shapes.SessionInfo:
        """Start any command as a durable session, in a sandbox of Debian with Python, git and ripgrep. It has no network but
        the model providers (OPENAI_BASE_URL, ANTHROPIC_BASE_URL are set, keys are added outside). Returns at once."""
        from rethaw.sdk.agents import options
        from rethaw.sdk.images import Image

        if not command:
            raise InvalidInput("no command is given", remedy='pass it like ["sh", "-c", "echo hello"]')
        image = Image.debian().apt_install(*apt).pip_install(*pip)
        idle = None if idle_suspend == "never" else idle_suspend
        found = options(
            name or PurePosixPath(command[0]).name or "command", image=image, env=env, memory=memory, idle_suspend=idle
        )
        return await self._start(found.spec(command=tuple(command)), {}, key)

    async def agent_list(self) -> shapes.AgentsHere:
        """The Python agents that session_start_agent can start."""
        return shapes.AgentsHere(agents=await asyncio.to_thread(self._dir.list))

    async def session_start_agent(
        self,
        file: Annotated[str, Field(description="as agent_list names it")],
        agent: Annotated[str | None, Field(description="which one, when the file has several")] = None,
        arguments: Annotated[dict[str, Any], Field(description="the function's arguments by name")] = {},  # noqa: B006
        key: Key = None,
    ) -> shapes.SessionInfo:
        """Start a Python agent as a durable session. Returns at once."""
        found = await asyncio.to_thread(self._dir.find, file, agent)
        given = found.arguments(**arguments)
        async with self._connection.client() as client:
            spec = await found.uploaded_async(client)
        return await self._start(spec, given, key)

    async def deployed_list(self) -> shapes.Deployed:
        """The agents that session_start_deployed can start, each with the version that a start takes."""
        async with self._connection.client() as client:
            found = await client.agents.list()
        return shapes.Deployed(agents=[shapes.DeployedAgent.of(one) for one in found])

    async def session_start_deployed(
        self,
        agent: Annotated[str, Field(description="its name, as deployed_list says")],
        arguments: Annotated[dict[str, Any], Field(description="its arguments by name")] = {},  # noqa: B006
        version: Annotated[int | None, Field(ge=1, description="else the one that is current")] = None,
        key: Key = None,
    ) -> shapes.SessionInfo:
        """Start an agent that was deployed on the server (`rethaw deploy`) as a durable session. Returns at once."""
        from rethaw.sdk.versions import named

        found = named(agent, version)
        given = found.arguments(**arguments)
        async with self._connection.client() as client:
            spec = await found.uploaded_async(client)
            how = found.starting.given()
            return shapes.SessionInfo.of((await client.sessions.start(spec, given, key=key, **how)).view)

    async def _start(self, spec: AgentSpec, args: dict[str, Any], key: str | None) -> shapes.SessionInfo:
        async with self._connection.client() as client:
            return shapes.SessionInfo.of((await client.sessions.start(spec, args, key=key)).view)

    @property
    def _dir(self) -> AgentsDir:
        if self._agents is None:
            raise InvalidInput("no directory of agents is open", remedy="start `rethaw mcp` with --agents DIR")
        return self._agents

    # ------------------------------------------------------------ looking

    async def session_list(
        self,
        state: Annotated[str | None, Field(description='like "running"')] = None,
        agent: Annotated[str | None, Field(description="an agent's name")] = None,
        limit: Annotated[int, Field(ge=1, le=1000)] = 50,
    ) -> shapes.SessionList:
        """List sessions, newest first."""
        async with self._connection.client() as client:
            views = await client.sessions.list(state=state, agent=agent, limit=limit)
        return shapes.SessionList(sessions=[shapes.SessionInfo.of(view) for view in views])

    async def session_show(self, session: SessionId) -> shapes.SessionDetail:
        """A session's state, and what durability did for it."""
        async with self._connection.client() as client:
            detail = await client.sessions.detail(session)
        return shapes.SessionDetail(session=shapes.SessionInfo.of(detail.view), stats=detail.stats)

    async def session_why(self, session: SessionId) -> shapes.Reasons:
        """What a session waits for, since when, what wakes it, and where it would resume."""
        async with self._connection.client() as client:
            return shapes.Reasons.of(await client.sessions.why(session))

    async def session_watch(
        self,
        session: SessionId,
        after: Annotated[int, Field(ge=0, description="a seq; `next` of the last answer, 0 from the beginning")] = 0,
        types: Annotated[list[str], Field(description='only these, like "message.sent"; empty: all')] = [],  # noqa: B006
        wait_s: WaitS = 0,
        limit: Annotated[int, Field(ge=1, le=1000)] = _PAGE,
        all_lines: Annotated[bool, Field(description="superseded events too")] = False,
    ) -> shapes.Events:
        """The events of a session's log after a seq: at once when there are some, else as soon as one comes."""
        async with self._connection.client() as client:
            look = functools.partial(client.sessions.events, session, types=types, all_lines=all_lines)
            found = await look(after=after, limit=limit)
            if not found and wait_s:
                coming = client.sessions.stream(session, after=after, types=types, all_lines=all_lines)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s), aclosing(cast("AsyncGenerator[Event]", coming)):
                        await anext(coming, None)
                found = await look(after=after, limit=limit)
            view = (await client.sessions.get(session)).view
            if view.state.final and len(found) < limit:  # what came between the two looks
                found += await look(after=found[-1].seq if found else after, limit=limit - len(found))
        last = found[-1].seq if found else after
        over = view.state.final and len(found) < limit
        return shapes.Events(
            events=[shapes.EventInfo.of(e) for e in found], next=last, state=view.state.value, over=over
        )

    async def session_output(
        self,
        session: SessionId,
        stream: Literal["stdout", "stderr", "both"] = "stdout",
        last_bytes: Annotated[int, Field(ge=1, le=1 << 20)] = _OUTPUT_BYTES,
    ) -> shapes.OutputText:
        """What a session's program has written, its newest part."""
        async with self._connection.client() as client:
            written = await client.sessions.logs(session, stream=stream)
        text = shapes.whole(written[-last_bytes:].decode(errors="replace"))
        return shapes.OutputText(text=text, bytes=len(written), cut=len(written) > last_bytes)

    async def session_outbox(
        self,
        session: SessionId,
        after: Annotated[int, Field(ge=0, description="a message's number; `next` of the last answer")] = 0,
        wait_s: WaitS = 0,
    ) -> shapes.Outbox:
        """The messages that a session sent, at once when there are some, else as soon as one comes."""
        async with self._connection.client() as client:
            found = await client.sessions.outbox(session, after=after, wait=wait_s)
        messages = [shapes.OutboxMessage.of(m) for m in found]
        for message in messages:
            message.payload = shapes.jsonable(message.payload)
        return shapes.Outbox(messages=messages, next=found[-1].number if found else after)

    async def session_result(self, session: SessionId, wait_s: WaitS = 0) -> shapes.ResultNow:
        """What a session returned, once it is over; until then where it stands."""
        async with self._connection.client() as client:
            if wait_s:
                with contextlib.suppress(WaitTimeout, SessionFailed):  # how it ended is told below
                    await client.sessions.result(session, timeout=wait_s)
            view = (await client.sessions.get(session)).view
            if not view.state.final:
                return shapes.ResultNow(over=False, state=view.state.value, result=None, exit_code=None, detail=None)
            found = shapes.ResultNow.of(view, await client.sessions.outcome(session))
        found.result = shapes.jsonable(found.result)
        return found

    # ------------------------------------------------------------ talking

    async def session_send(self, session: SessionId, payload: Payload, idempotency_key: Once = None) -> shapes.Sent:
        """Send a message into a session's inbox. It wakes a session that is suspended while it waits for one."""
        async with self._connection.client() as client:
            sent = await client.sessions.send(session, payload, idempotency_key=idempotency_key)
        return shapes.Sent(id=sent.id, number=sent.number)

    async def session_signal(
        self, session: SessionId, name: str, payload: Payload = None, idempotency_key: Once = None
    ) -> shapes.Signalled:
        """Complete a session's wait by its name, like an approval; session_why tells what it waits for."""
        async with self._connection.client() as client:
            return shapes.Signalled(
                signal=await client.sessions.signal(session, name, payload, idempotency_key=idempotency_key)
            )

    # ------------------------------------------------------------ steering

    async def session_suspend(self, session: SessionId) -> shapes.SessionInfo:
        """Freeze a session and release its memory; it stays so until session_resume."""
        async with self._connection.client() as client:
            return shapes.SessionInfo.of(await client.sessions.suspend(session))

    async def session_resume(self, session: SessionId) -> shapes.SessionInfo:
        """Let a suspended session go on."""
        async with self._connection.client() as client:
            return shapes.SessionInfo.of(await client.sessions.resume(session))

    async def session_cancel(
        self, session: SessionId, now: Annotated[bool, Field(description="without a grace period")] = False
    ) -> shapes.SessionInfo:
        """End a session for good."""
        async with self._connection.client() as client:
            return shapes.SessionInfo.of(await client.sessions.cancel(session, now=now))

    async def session_fork(
        self,
        session: SessionId,
        at: Place = None,
        n: Annotated[int, Field(ge=1, le=100, description="how many")] = 1,
        redeliver: Redeliver = False,
    ) -> shapes.SessionList:
        """Begin new sessions from where a session is, or was; what it did by then is not paid for again."""
        async with self._connection.client() as client:
            made = await client.sessions.fork(session, at=at, n=n, redeliver=redeliver)
        return shapes.SessionList(sessions=[shapes.SessionInfo.of(one.view) for one in made])

    async def session_rewind(
        self,
        session: SessionId,
        to: Annotated[int | str, Field(description="a seq of its log or a snapshot's id")],
        redeliver: Redeliver = False,
    ) -> shapes.SessionInfo:
        """Take a session back to an older point; what it did since stays in its log, superseded."""
        async with self._connection.client() as client:
            return shapes.SessionInfo.of(await client.sessions.rewind(session, to=to, redeliver=redeliver))

    # ------------------------------------------------------------ snapshots

    async def session_snapshot(self, session: SessionId) -> shapes.Snapshot:
        """Take a snapshot of a session now."""
        async with self._connection.client() as client:
            return shapes.Snapshot.of(await client.sessions.snapshot(session))

    async def snapshot_list(self, session: SessionId) -> shapes.SnapshotList:
        """A session's snapshots."""
        async with self._connection.client() as client:
            return shapes.SnapshotList(
                snapshots=[shapes.Snapshot.of(s) for s in await client.sessions.snapshots(session)]
            )

    async def snapshot_files(self, snapshot: SnapshotId, path: str = "/", deep: bool = False) -> shapes.Files:
        """The files of a snapshot: one, or what is in a directory (`deep`: below it as well)."""
        async with self._connection.client() as client:
            found = await client.snapshots.files(snapshot, path, deep=deep)
        files = [shapes.File(path=shapes.whole(f.path), kind=f.kind, size=f.size) for f in found[:_FILES]]
        return shapes.Files(files=files, left_out=len(found) - len(files))

    async def snapshot_read(self, snapshot: SnapshotId, path: str) -> shapes.FileText:
        """A file of a snapshot, as text."""
        async with self._connection.client() as client:
            data = await client.snapshots.read(snapshot, path)
        text = shapes.whole(data[:_OUTPUT_BYTES].decode(errors="replace"))
        return shapes.FileText(text=text, bytes=len(data), cut=len(data) > _OUTPUT_BYTES)


def failed(error: RethawError) -> CallToolResult:
    """The answer of a tool that raised. Not as structured content, which some clients hold against the tool's schema."""
    said = {"code": error.code, "message": error.message, "remedy": error.remedy}
    text = TextContent(type="text", text=shapes.whole(str(error)))
    return CallToolResult(content=[text], is_error=True, _meta={"rethaw/error": shapes.jsonable(said)})


def _told(tool: Tool) -> Tool:
    @functools.wraps(tool)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await tool(*args, **kwargs)
        except RethawError as error:
            return failed(error)

    return call
