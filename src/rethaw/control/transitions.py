"""The state machine of a session, as a table. Nothing else decides which move is legal."""

from __future__ import annotations

from rethaw.model.enums import State
from rethaw.model.errors import Conflict

_S = State
_ENDS = frozenset({_S.COMPLETED, _S.FAILED, _S.CANCELLED})

# observed by a node: what `report` may ask for
REPORTED: dict[State, frozenset[State]] = {
    _S.STARTING: frozenset({_S.RUNNING, _S.WAITING}) | _ENDS,
    _S.RUNNING: frozenset({_S.WAITING, _S.SUSPENDING}) | _ENDS,
    _S.WAITING: frozenset({_S.RUNNING, _S.SUSPENDING}) | _ENDS,
    _S.SUSPENDING: frozenset({_S.SUSPENDED, _S.RUNNING, _S.WAITING}) | _ENDS,
    _S.RESUMING: frozenset({_S.RUNNING, _S.WAITING}) | _ENDS,
    _S.RECOVERING: frozenset({_S.RUNNING, _S.WAITING}) | _ENDS,
}

# decided by control itself
_DECIDED: dict[State, frozenset[State]] = {
    _S.CREATED: frozenset({_S.QUEUED, _S.STARTING, _S.FAILED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.STARTING, _S.RESUMING, _S.FAILED, _S.CANCELLED}),  # resuming: from a template
    # To resuming: a rewind, from anywhere but before the first start. To queued: a new attempt after a failure. They are
    # the only ways out of an end. (A fork begins as resuming or suspended.)
    _S.STARTING: frozenset({_S.RECOVERING, _S.RESUMING, _S.QUEUED}),
    _S.RUNNING: frozenset({_S.RECOVERING, _S.RESUMING, _S.QUEUED}),
    _S.WAITING: frozenset({_S.RECOVERING, _S.RESUMING, _S.QUEUED}),
    _S.SUSPENDING: frozenset({_S.RECOVERING, _S.RESUMING, _S.QUEUED}),
    _S.SUSPENDED: frozenset({_S.RESUMING, _S.SUSPENDED, _S.FAILED, _S.CANCELLED}),  # itself: another reason
    _S.RESUMING: frozenset({_S.RECOVERING, _S.RESUMING, _S.QUEUED}),
    _S.RECOVERING: frozenset({_S.RECOVERING, _S.RESUMING, _S.QUEUED}),  # itself: it died again before it ran
    **{end: frozenset({_S.RESUMING, _S.QUEUED}) for end in _ENDS},
}

ALLOWED: dict[State, frozenset[State]] = {
    state: REPORTED.get(state, frozenset()) | _DECIDED.get(state, frozenset()) for state in State
}


def allowed(old: State, new: State, *, reported: bool = False) -> bool:
    """Whether a session may move from `old` to `new`; `reported`: at a node's word."""
    return new in (REPORTED if reported else ALLOWED).get(old, frozenset())


def check(session: str, old: State, new: State, *, reported: bool = False) -> None:
    """Raises Conflict naming both states when the move is not in the table."""
    if not allowed(old, new, reported=reported):
        raise Conflict(
            f"session {session} is {old.value} and cannot become {new.value}",
            remedy="see `rethaw why` for what it is doing" if not old.final else "it has ended; start a new one",
            session=session,
            state=old.value,
            wanted=new.value,
        )
