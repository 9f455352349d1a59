"""The scripted model of the pytest plugin: which call gets which reply."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rethaw.testing import ProviderRequest, Reply, ScriptedModel
from rethaw.testing.processes import wait_until


@pytest.fixture
def model() -> Iterator[ScriptedModel]:
    scripted = ScriptedModel()
    try:
        yield scripted
    finally:
        scripted.close()


def send(model: ScriptedModel, text: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(model.provider.host, model.provider.port, timeout=20)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    return connection


def ask(model: ScriptedModel, text: str) -> str:
    connection = send(model, text)
    try:
        answer = connection.getresponse()
        found = json.loads(answer.read())
        return found["choices"][0]["message"]["content"] if answer.status == 200 else found["error"]["message"]
    finally:
        connection.close()


def test_replies_in_order_each_once(model: ScriptedModel) -> None:
    model.script("one", Reply("two"), lambda request: f"three to {request.last_text}")
    assert [ask(model, "same") for _ in range(3)] == ["one", "two", "three to same"]
    assert ask(model, "more") == "all 3 scripted answers are used up, and the agent asks 'more': see model.script(...)"
    assert model.calls == 4 and model.prompts == ["same"] * 3 + ["more"]
    assert model.requests[0].json["model"] == "m"


def test_nothing_scripted_and_begun_anew(model: ScriptedModel) -> None:
    assert ask(model, "a").startswith("no answer is scripted")
    model.fail(Reply(status=500, message="later"), times=2)
    model.script("left over")
    model.reset()
    assert model.calls == 0 and model.prompts == [] and ask(model, "b").startswith("no answer is scripted")
    model.script("new")
    assert ask(model, "b") == "new" and model.calls == 2


def test_a_failure_takes_no_reply(model: ScriptedModel) -> None:
    model.script("one", "two")
    model.fail(Reply(status=500, message="down"), when=lambda request: request.last_text == "x")
    assert [ask(model, text) for text in ("y", "x", "x")] == ["one", "down", "two"]
    assert model.calls == 3


def test_a_call_that_was_cut_off_and_is_issued_again_gets_the_same_reply(model: ScriptedModel) -> None:
    model.script(Reply("slow", first_byte_s=30), "second", "third")
    cut = send(model, "first call")
    wait_until(lambda: model.calls == 1, 10, "the call arrives")
    assert ask(model, "another") == "second"
    cut.close()
    wait_until(lambda: model.provider.calls[0].ended_at is not None, 10, "the provider notices")
    again = send(model, "first call")
    wait_until(lambda: model.calls == 3, 10, "it is issued again")
    again.close()
    assert ask(model, "third call") == "third"


def test_a_function_sees_each_call_also_many_at_once(model: ScriptedModel) -> None:
    async def script(request: ProviderRequest) -> str:
        return f"re {request.last_text}"

    model.script(script)
    with ThreadPoolExecutor(8) as pool:
        texts = [str(n) for n in range(40)]
        assert list(pool.map(lambda text: ask(model, text), texts)) == [f"re {text}" for text in texts]
    assert model.calls == 40 and sorted(model.prompts, key=int) == texts


def test_a_script_that_raises_is_an_error_of_the_model(model: ScriptedModel) -> None:
    model.script(lambda request: 1 / 0)  # pyright: ignore[reportArgumentType]
    connection = send(model, "x")
    assert connection.getresponse().status == 500
    connection.close()
