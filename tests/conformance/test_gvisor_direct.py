"""Saves and restores by the sandbox's own socket, and by runsc's commands where that socket is not known."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from engine_fixtures import ask, restored, until

from rethaw.engines.base import SandboxSpec
from rethaw.engines.gvisor import direct
from rethaw.engines.gvisor.engine import GvisorEngine
from rethaw.engines.gvisor.sandbox import PUNCTUAL_SLACK_NS, RESTING_SLACK_NS, SLACK_NS
from rethaw.model.errors import EngineError
from rethaw.testing.processes import gvisor, state_of

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def never(version: str) -> bool:
    return False


SPEAKS = {True: direct.speaks, False: never}


async def test_both_ways_make_the_same_of_a_guest_over_three_generations(
    data_dir: Path, spec: SandboxSpec, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = GvisorEngine(data_dir)
    try:
        box = await engine.boot(spec)
        assert direct.speaks(await engine.version()), "else this test compares the commands with themselves"
        await ask(box, "mark = [0]")
        saved = await box.capture(staging / "first")
        for generation, (saves, restores) in enumerate([(True, False), (False, True), (True, True), (False, False)]):
            await ask(box, f"mark.append({generation})")
            monkeypatch.setattr(direct, "speaks", SPEAKS[saves])
            saved = await box.capture(staging / str(generation))
            assert {name: path.stat().st_size > 0 for name, path in saved.sections.items()} == dict.fromkeys(
                ("checkpoint.img", "pages_meta.img", "pages.img"), True
            )
            assert await ask(box, "len(mark)") == generation + 2, "it runs on"
            await box.destroy()
            monkeypatch.setattr(direct, "speaks", SPEAKS[restores])
            box = await restored(engine, spec, saved)
            assert await ask(box, "mark") == [0, *range(generation + 1)]
        for speaks in (True, False):
            monkeypatch.setattr(direct, "speaks", SPEAKS[speaks])
            twin = await restored(engine, spec, saved)
            (host,) = [h for h in gvisor(data_dir) if h.pid == twin.pid]
            assert host.status() == "running", "to runsc too"
            assert host.kill_guest()
            await twin.wait()
            await twin.destroy()
        await box.destroy()
    finally:
        await engine.close()


async def test_the_guest_runs_on_before_the_save_is_finished(data_dir: Path, spec: SandboxSpec, staging: Path) -> None:
    """What an engine still does to its files does not keep the guest waiting; a failure there voids the save."""
    engine = GvisorEngine(data_dir)
    try:
        box = await engine.boot(spec)
        seen: list[bool] = []

        async def then() -> None:
            seen.append((staging / "one" / "pages.img").stat().st_size > 0)

        saved = await box.capture(staging / "one", then)
        assert seen == [True]
        assert saved.clock["frozen"]

        async def fails() -> None:
            raise EngineError("not this time")

        with pytest.raises(EngineError, match="not this time"):
            await box.capture(staging / "two", fails)
        assert list((staging / "two").iterdir()) == []
        assert await ask(box, "1 + 1") == 2
        await box.destroy()
    finally:
        await engine.close()


# ---------------------------------------------------------------- a socket that misbehaves

Answer = Callable[[asyncio.StreamWriter], None]


def closes(writer: asyncio.StreamWriter) -> None:
    writer.close()


def says_half(writer: asyncio.StreamWriter) -> None:
    writer.write(b'{"success":tr')
    writer.close()


def says_nothing(writer: asyncio.StreamWriter) -> None:
    pass


@contextlib.asynccontextmanager
async def sentry(path: Path, answer: Answer) -> AsyncGenerator[Path]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        answer(writer)
        await writer.drain()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
    finally:
        server.close()


def says(text: bytes) -> Answer:
    return lambda writer: writer.write(text)


async def test_an_answer_in_pieces(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        for piece in (b'{"success"', b":true,", b'"err":"","result":{}}\n'):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    result = await direct.save(tmp_path / "s", tmp_path, 10)
    server.close()
    assert result.code == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (says(b'{"success":false,"err":"no space left on device","result":null}'), "no space left on device"),
        (says(b'{"success":false}'), "did not say why"),
        (says(b"[1]"), "it answered"),
        (closes, "hung up"),
        (says_half, "hung up"),
    ],
    ids=["refuses", "refuses-mutely", "not-an-object", "hangs-up", "half-an-answer"],
)
async def test_what_it_says_instead_is_passed_on(tmp_path: Path, answer: Answer, said: str) -> None:
    async with sentry(tmp_path / "s", answer) as path:
        result = await direct.save(path, tmp_path, 10)
    assert result.code == 1
    assert said in result.err


async def test_a_socket_that_stays_silent_is_given_up(tmp_path: Path) -> None:
    async with sentry(tmp_path / "s", says_nothing) as path:
        with pytest.raises(EngineError, match="took longer than 0s"):
            await direct.save(path, tmp_path, 0.1)


async def test_a_socket_that_nobody_listens_to(tmp_path: Path) -> None:
    result = await direct.save(tmp_path / "none", tmp_path, 10)
    assert result.code == 1
    assert "cannot be spoken to" in result.err


async def test_a_socket_with_a_long_path(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    (tmp_path / "short").symlink_to(deep)
    async with sentry(tmp_path / "short" / "s", says(b'{"success":true}')):
        assert (await direct.save(deep / "s", tmp_path, 10)).code == 0


# ---------------------------------------------------------------- what idles


def slack_of(pid: int) -> set[int]:
    found: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends meanwhile
            found.add(int(Path(f"/proc/{thread.name}/timerslack_ns").read_text()))
    return found


async def test_a_guest_that_rests_wakes_up_less_often_and_answers_all_the_same(
    data_dir: Path, spec: SandboxSpec
) -> None:
    """A hundred idle sandboxes kept two CPUs busy with waking up."""
    engine = GvisorEngine(data_dir)
    try:
        box = await engine.boot(spec)
        assert max(slack_of(box.pid)) < SLACK_NS, "not while it comes up"
        await until(lambda: slack_of(box.pid) == {SLACK_NS})
        box.rest(True)
        assert slack_of(box.pid) == {RESTING_SLACK_NS}
        assert await ask(box, "1 + 1") == 2
        box.attend()
        assert slack_of(box.pid) == {PUNCTUAL_SLACK_NS}
        box.rest(False)
        box.rest(True)
        assert slack_of(box.pid) == {PUNCTUAL_SLACK_NS}, "not before the second is over"
        await until(lambda: slack_of(box.pid) == {RESTING_SLACK_NS})
        box.rest(False)
        assert slack_of(box.pid) == {SLACK_NS}
        await box.destroy()
        box.rest(True)  # it is gone: nothing to do
        box.attend()
    finally:
        await engine.close()


async def test_a_sandbox_created_ahead_stands_still_until_it_is_used(data_dir: Path, spec: SandboxSpec) -> None:
    engine = GvisorEngine(data_dir)
    try:
        await engine.prepare(spec, 1)
        await until(lambda: engine.ahead(spec), 30)
        (host,) = gvisor(data_dir)
        await until(lambda: state_of(host.pid) == "T")
        assert host.status() == "created"
        box = await engine.boot(spec)
        assert box.pid == host.pid
        assert host.status() == "running"
        assert await ask(box, "1 + 1") == 2
        await box.destroy()
    finally:
        await engine.close()
