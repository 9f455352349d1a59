"""Agent definitions: what they check, and what becomes of them on the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rethaw.model.enums import Durability
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.model.types import BudgetSpec, RetrySpec
from rethaw.sdk.agents import Agent, agent, find
from rethaw.sdk.images import Image
from rethaw.sdk.limits import Budget, Retries


@agent(
    image=Image.debian("bookworm").apt_install("jq").pip_install("openai>=2").env(LANG="C.UTF-8"),
    memory="1GiB",
    idle_suspend="1h30m",
    durability="relaxed",
    max_duration=90,
    env={"MODEL": "x"},
)
def greet(ctx: Any, name: str, times: int = 1) -> str:
    return name * times


@agent
async def plain(ctx: Any) -> None: ...


def test_wire_form_has_every_option() -> None:
    spec = greet.spec("0" * 64)
    assert spec.name == "greet" and spec.code == "0" * 64
    assert spec.entry == "test_sdk_agents.py::greet" and spec.command == ()
    assert spec.memory_bytes == 1 << 30 and spec.idle_suspend_s == 5400 and spec.max_duration_s == 90
    assert spec.durability is Durability.RELAXED and spec.env == {"MODEL": "x"}
    assert spec.image.apt == ("jq",) and spec.image.pip == ("openai>=2",) and spec.image.env == {"LANG": "C.UTF-8"}


def test_defaults_are_those_of_the_wire_type() -> None:
    from rethaw.model.types import AgentSpec

    found = plain.spec("a").model_copy(update={"agents": {}, "signature": None})  # this file has others
    assert found == AgentSpec(name="plain", entry="test_sdk_agents.py::plain", code="a")


def test_retries_and_budgets_on_the_wire() -> None:
    made = agent(name="x", retries=2, budget=Budget(tokens=5, money=1.5, wall="2h"))(lambda ctx: None).options.spec(
        entry="e"
    )
    assert made.retries == RetrySpec(max=2) and made.budget == BudgetSpec(tokens=5, money="1.5", wall_s=7200.0)
    policy = Retries(max=1, delay="2s", factor=3, max_delay=60, jitter=False, not_on=(2,))
    changed = greet.with_options(retries=policy, budget=Budget(model_calls=3)).spec("a")
    assert changed.retries == RetrySpec(max=1, delay_s=2, factor=3, max_delay_s=60, jitter=False, not_on=(2,))
    assert changed.budget == BudgetSpec(model_calls=3) and greet.spec("a").budget is None
    assert Budget(tokens=1).over(Budget(tokens=2, wall="1h")) == Budget(tokens=1, wall="1h")
    assert Retries().spec() == RetrySpec() and Budget().spec() == BudgetSpec()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Retries(max=-1), "retries -1"),
        (lambda: Retries(delay="-1s"), "'-1s'"),
        (lambda: Retries(factor=0.5), "factor 0.5"),
        (lambda: Retries(max_delay="soon"), "'soon'"),
        (lambda: Retries(not_on=(0,)), "not_on"),
        (lambda: Retries(files="some"), "files 'some'"),
        (lambda: Budget(tokens=-5), "tokens -5"),
        (lambda: Budget(model_calls=True), "model_calls True"),
        (lambda: Budget(money="5 EUR"), "money '5 EUR'"),
        (lambda: Budget(money="nan"), "money 'nan'"),
        (lambda: Budget(money=-1), "money -1"),
        (lambda: Budget(wall="-2h"), "'-2h'"),
    ],
)
def test_limits_that_do_not_fit_are_named(make: Any, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        make()
    assert said in caught.value.message and caught.value.remedy


def test_agent_is_still_the_function() -> None:
    assert greet(None, "a", times=3) == "aaa"
    assert greet.__name__ == "greet"


def test_arguments_travel_by_name() -> None:
    assert greet.arguments("a") == {"name": "a"}
    assert greet.arguments("a", 2) == greet.arguments(times=2, name="a") == {"name": "a", "times": 2}


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "name"),
        (("a", 1, 2), {}, "too many"),
        (("a",), {"nope": 1}, "nope"),
        ((b"a",), {}, "argument name = b'a' does not fit: it is no str"),
        (("a", float("nan")), {}, "times"),
    ],
)
def test_arguments_that_do_not_fit(args: tuple[Any, ...], kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=r"greet") as caught:
        greet.arguments(*args, **kwargs)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "lots"},
        {"memory": 0},
        {"durability": "eternal"},
        {"idle_suspend": "soon"},
        {"name": "has space"},
        {"name": ""},
        {"pids": 0},
        {"workdir": "app"},
        {"env": {"A-B": "1"}},
        {"env": {"A": 1}},
        {"retries": -1},
        {"retries": 1.5},
        {"retries": True},
        {"budget": 5},
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        agent(**options)(lambda ctx: None)


def test_signature_must_take_a_context_and_names() -> None:
    with pytest.raises(InvalidInput, match="Context"):
        agent(name="none")(lambda: None)  # type: ignore[arg-type]

    def positional(ctx: Any, a: int, /) -> None: ...

    def many(ctx: Any, *args: int) -> None: ...

    for function in (positional, many):
        with pytest.raises(InvalidInput, match="by name"):
            agent(function)


def test_key_stays_with_its_own_agent() -> None:
    keyed = greet.with_options(key="k")
    assert keyed.key == "k" and greet.key is None and keyed.name == greet.name


def test_defined_inside_something_else_is_refused() -> None:
    @agent
    def inner(ctx: Any) -> None: ...

    with pytest.raises(InvalidInput, match="top level"):
        inner.spec("a")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image.debian("sid-of-tomorrow"),
        lambda: Image.debian().apt_install("jq; rm -rf /"),
        lambda: Image.debian().apt_install("--yes"),
        lambda: Image.debian().pip_install("--index-url=x"),
        lambda: Image.debian().pip_install(""),
        lambda: Image.debian().env({"1A": "x"}),
    ],
)
def test_images_that_do_not_fit(make: Any) -> None:
    with pytest.raises(InvalidInput):
        make()


def test_images_are_values() -> None:
    base = Image.debian()
    assert base.apt_install("jq") is not base and base.apt == ()
    assert base.env(B="2", A="1") == base.env({"A": "1"}).env(B="2")


# ---------------------------------------------------------------- finding an agent in a file


FILE = """
from rethaw.sdk import agent
from words_beside import WORD

@agent
def one(ctx, word=WORD): ...

@agent(name="second")
def two(ctx): ...
"""


def test_find_by_name(tmp_path: Path) -> None:
    (tmp_path / "words_beside.py").write_text("WORD = 'w'")
    file = tmp_path / "my-agents.py"
    file.write_text(FILE)
    assert isinstance(find(file, "one"), Agent)
    assert find(file, "two").name == find(file, "second").name == "second"
    assert find(file, "one").entry == "my-agents.py::one"
    with pytest.raises(NotFound, match="nope"):
        find(file, "nope")
    with pytest.raises(InvalidInput, match=r"2 agents.*my-agents.py::one"):
        find(file)


def test_imported_agents_are_not_the_files_own(tmp_path: Path) -> None:
    (tmp_path / "other_agents.py").write_text("from rethaw.sdk import agent\n@agent\ndef theirs(ctx): ...")
    file = tmp_path / "mine.py"
    file.write_text("from rethaw.sdk import agent\nfrom other_agents import theirs\n@agent\ndef own(ctx): ...")
    assert find(file).name == "own"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "no agent"),
        ("def broken(:", "SyntaxError"),
        ("1/0", "ZeroDivisionError"),
        ("import package_that_nobody_has", r"package_that_nobody_has.*not installed.*inside the function"),
    ],
)
def test_files_that_define_none(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "agent_file.py"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=said):
        find(file)
    with pytest.raises(NotFound):
        find(tmp_path / "nothing.py")


# ---------------------------------------------------------------- agents beside it


FAMILY = {
    "boss.py": """
import rethaw, helpers.tools
from workers import summarize

@rethaw.agent(name="chief", memory="1GiB")
def boss(ctx): ...

@rethaw.agent
def other(ctx): ...

def inner():
    @rethaw.agent
    def hidden(ctx): ...
    return hidden
hidden = inner()
""",
    "workers.py": """
import rethaw

@rethaw.agent(memory="2GiB")
def summarize(ctx, url: str): ...
""",
    "helpers/__init__.py": "",
    "helpers/tools.py": "import rethaw\n@rethaw.agent\ndef tool(ctx): ...\n",
}


def test_what_an_agent_may_spawn_travels_with_it(tmp_path: Path) -> None:
    for name, text in FAMILY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = find(tmp_path / "boss.py", "chief")
    spec = found.spec("c0de")
    assert {name: one.entry for name, one in spec.agents.items()} == {
        "other": "boss.py::other", "summarize": "workers.py::summarize", "tool": "helpers/tools.py::tool",
    }  # fmt: skip
    assert {one.code for one in spec.agents.values()} == {"c0de"}
    assert spec.agents["summarize"].memory_bytes == 2 << 30
    assert all(not one.agents for one in spec.agents.values())
    assert set(find(tmp_path / "boss.py", "other").spec("c").agents) == {"chief", "summarize", "tool"}
    assert find(tmp_path / "workers.py").spec("c").agents == {}
    twice = "from workers import summarize\nimport rethaw\n@rethaw.agent(name='summarize')\ndef again(ctx): ...\n"
    (tmp_path / "twice.py").write_text(twice)
    with pytest.raises(InvalidInput, match="named 'summarize'"):
        find(tmp_path / "twice.py", "again").spec("c")


def test_an_unknown_option_of_agent_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"@rethaw.agent has no option 'memroy'; did you mean memory\?"):
        agent(memroy="1GiB")  # pyright: ignore[reportCallIssue]
