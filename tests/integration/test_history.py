"""`ctx.history(form=...)` over a real log: which call counts, what of its answer, and how a long one is paged."""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import Any

import pytest
from control_fixtures import (  # noqa: F401 - fixtures
    World,
    cluster_fixture,
    dsn_fixture,
    world_fixture,
)

from rethaw.model.enums import EventType, ExchangeState, Reason, State
from rethaw.model.errors import InvalidInput
from rethaw.model.types import Chunk, Exchange, Fence, NewEvent, RequestMeta, ResponseHead
from rethaw.node import history

JSON = (("content-type", "application/json"),)


async def ask(
    w: World, fence: Fence, body: Any, path: str = "/v1/chat/completions", model_call: bool = True
) -> Exchange:
    w.count += 1
    raw = json.dumps(body).encode()
    meta = RequestMeta(
        provider="p", method="POST", path=path, digest=hashlib.sha256(raw).hexdigest(), model_call=model_call,
        guest_id=f"1.{w.count}",
    )  # fmt: skip
    return await w.log.begin_exchange(fence, meta, raw, "owner")


async def answer(
    w: World, x: Exchange, body: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = JSON
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    half = len(raw) // 2
    chunks = [Chunk(offset=0, data=raw[:half], at_us=1), Chunk(offset=half, data=raw[half:], at_us=2)]
    await w.log.append_response(x.id, x.epoch, ResponseHead(status=status, headers=headers), chunks)
    done = NewEvent(type=EventType.EXCHANGE_COMPLETED, data={"exchange": x.id, "status": status})
    await w.log.finish_exchange(x.id, x.epoch, ExchangeState.COMPLETE, None, done)


def said(text: str) -> dict[str, Any]:
    return {"id": f"c_{text}", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


async def texts(w: World, fence: Fence, form: str = "openai") -> list[str]:
    page = await history.page(w.log, fence, {"form": form})
    assert not page["more"]
    return [str(m["content"]) for m in page["messages"]]


async def test_the_newest_call_of_the_path_and_its_answer(w: World) -> None:
    session, fence = await w.start()
    assert await texts(w, fence) == []
    await answer(w, await ask(w, fence, chat("a")), said("b"))
    await w.save(fence)
    x = await ask(w, fence, chat("a", "b", "c"))
    assert await texts(w, fence) == ["a", "b", "c"]  # no answer yet
    await answer(w, x, said("d"))
    assert await texts(w, fence) == ["a", "b", "c", "d"]
    await answer(w, await ask(w, fence, {"input": "embed"}, "/v1/embeddings", model_call=False), {})
    assert await texts(w, fence) == ["a", "b", "c", "d"]
    await w.control.report_death(fence, Reason.SANDBOX_DIED, "killed")
    _, fence = await w.back(session)
    assert await texts(w, fence) == ["a", "b"]  # the crash took the other one back
    await w.log.adopt_exchange(fence, x.id, "1.9", "tail")
    assert await texts(w, fence) == ["a", "b", "c", "d"]


async def test_a_fresh_attempt_has_the_context_of_former_ones(w: World) -> None:
    session, fence = await w.start()
    await answer(w, await ask(w, fence, chat("a")), said("b"))
    await w.save(fence)
    for _ in range(9):  # it dies again and again, until it boots from the log
        await w.control.report_death(fence, Reason.SANDBOX_DIED, "killed")
        assignment = (await w.node.work(5.0))[-1]
        fence = Fence(session=session, generation=assignment.generation)
        await w.report(fence, State.RUNNING)
        if assignment.action == "start":
            break
    assert (await w.control.session(session)).attempt == 2
    found = await history.page(w.log, fence, {"form": "anthropic"})
    assert [m["role"] for m in found["messages"]] == ["user", "assistant"]
    assert found["messages"][1]["content"] == [{"type": "text", "text": "b"}]


async def test_a_fork_knows_what_was_answered_where_it_began(w: World) -> None:
    session, fence = await w.start()
    await answer(w, await ask(w, fence, chat("a")), said("b"))
    x = await ask(w, fence, chat("a", "b", "c"))
    info = await w.save(fence)
    (made,) = await w.control.fork(session, info.id)
    await answer(w, x, said("d"))
    _, other = await w.back(made.id)
    assert await texts(w, other) == ["a", "b", "c"]
    assert await texts(w, fence) == ["a", "b", "c", "d"]


async def test_what_a_provider_refused_is_no_context_and_what_it_put_off_is(w: World) -> None:
    _, fence = await w.start()
    await answer(w, await ask(w, fence, chat("a")), said("b"))
    await answer(w, await ask(w, fence, chat("nonsense")), {"error": {}}, 400)
    assert await texts(w, fence) == ["a", "b"]
    await answer(w, await ask(w, fence, chat("a", "b", "c")), {"error": {}}, 529)
    assert await texts(w, fence) == ["a", "b", "c"]


async def test_compressed_answers_are_read(w: World) -> None:
    _, fence = await w.start()
    packed = gzip.compress(json.dumps(said("b")).encode())
    await answer(w, await ask(w, fence, chat("a")), packed, headers=(*JSON, ("Content-Encoding", "gzip")))
    assert await texts(w, fence, "responses") == ["a", "b"]


async def test_calls_that_go_on_from_earlier_answers_are_put_together(w: World) -> None:
    _, fence = await w.start()

    def out(ident: str, text: str) -> dict[str, Any]:
        item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
        return {"id": ident, "output": [item]}

    await answer(w, await ask(w, fence, {"input": "a"}, "/v1/responses"), out("r1", "b"))
    await answer(w, await ask(w, fence, {"input": "other"}, "/v1/responses"), out("r2", "x"))
    await answer(w, await ask(w, fence, {"input": "c", "previous_response_id": "r1"}, "/v1/responses"), out("r3", "d"))
    last = {"input": "e", "previous_response_id": "r3", "instructions": "Up."}
    await answer(w, await ask(w, fence, last, "/v1/responses"), out("r4", "f"))
    assert await texts(w, fence) == ["Up.", "a", "b", "c", "d", "e", "f"]


async def test_a_long_one_comes_in_pages_of_one_call(w: World) -> None:
    _, fence = await w.start()
    long = [f"{n}" * 300_000 for n in range(10)]
    await answer(w, await ask(w, fence, chat(*long)), said("end"))
    got: list[str] = []
    exchange = None
    pages = 0
    while True:
        page = await history.page(w.log, fence, {"form": "openai", "after": len(got), "exchange": exchange})
        exchange, pages = page["exchange"], pages + 1
        if pages == 1:  # asked meanwhile, on another thread
            await answer(w, await ask(w, fence, chat("a")), said("b"))
        got += [m["content"] for m in page["messages"]]
        if not page["more"]:
            break
    assert got == [*long, "end"] and pages == 2
    with pytest.raises(InvalidInput, match="'xml' is no form"):
        await history.page(w.log, fence, {"form": "xml"})
