"""Commands about attempts and budgets: retry, budget."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from rethaw.cli import output
from rethaw.cli.app import Json
from rethaw.cli.connect import client

Amount = Parameter(allow_leading_hyphen=True)  # so that a negative one gets an answer that names it


def retry(session: str, /, *, memory: str | None = None, json: Json = False) -> None:
    """Begin the next attempt of a session now.

    Of one that failed or was cancelled, or that waits for the time of a retry:
    a fresh process with the whole context.

    For example:
      rethaw retry s_06f2
      rethaw retry s_06f2 --memory 1GiB

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    memory:
        What it may use from then on, after it ran out of memory.
    """
    from rethaw.cli.render import state_text

    with client() as connection:
        view = connection.sessions.retry(session, memory=memory)
    if json:
        output.emit(view)
    else:
        output.data(f"{view.id}  attempt {view.attempt}  {state_text(view)}")


def budget(
    session: str,
    /,
    *,
    tokens: Annotated[str | None, Amount] = None,
    input_tokens: Annotated[str | None, Amount] = None,
    output_tokens: Annotated[str | None, Amount] = None,
    money: Annotated[str | None, Amount] = None,
    calls: Annotated[str | None, Amount] = None,
    wall: Annotated[str | None, Amount] = None,
    json: Json = False,
) -> None:
    """Show what a session has spent of its budget, or give it another one.

    With a + before it, an amount is added to what the session may spend. One
    that its budget has stopped goes on where it was.

    For example:
      rethaw budget s_06f2
      rethaw budget s_06f2 --tokens +100000
      rethaw budget s_06f2 --money 7.50 --wall +1h

    Parameters
    ----------
    session:
        An id or a unique beginning of one.
    tokens:
        Input and output together.
    input_tokens:
        Input alone.
    output_tokens:
        Output alone.
    money:
        By the prices in the server's rethaw.toml.
    calls:
        Model calls.
    wall:
        Time that it runs, like 2h.
    """
    from rethaw.cli.render import budget_lines, state_text
    from rethaw.sdk.limits import Budget

    given = {
        "tokens": tokens,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "money": money,
        "model_calls": calls,
        "wall": wall,
    }
    given = {name: value.strip() for name, value in given.items() if value is not None}
    with client() as connection:
        if given:
            values = {name: _amount(name, value) for name, value in given.items()}
            add = [name for name, value in given.items() if value.startswith("+")]
            connection.sessions.budget(session, Budget(**values), add=add)
        detail = connection.sessions.detail(session)
    if json:
        output.emit({
            "session": detail.view.id,
            "state": detail.view.state.value,
            "budget": output.jsonable(detail.budget),
            "spent": output.jsonable(detail.spent),
        })  # fmt: skip
        return
    output.data(f"{detail.view.id}  {state_text(detail.view)}")
    for line in budget_lines(detail) or ["no budget"]:
        output.data(line)


def _amount(name: str, text: str) -> Any:
    from rethaw.model.errors import InvalidInput

    plain = text.removeprefix("+")
    if name in ("money", "wall"):
        return plain
    try:
        return int(plain.replace(",", "").replace("_", ""))
    except ValueError:
        raise InvalidInput(f"--{name.replace('model_', '').replace('_', '-')} {text!r} is no number") from None
