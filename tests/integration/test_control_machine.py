"""Random histories of one session: whatever people, nodes and crashes do, the invariants hold."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from control_fixtures import AGENT, World, cluster_fixture, dsn_fixture, world  # noqa: F401 - fixtures
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from rethaw.control import transitions
from rethaw.control.policy import Policy
from rethaw.model.enums import Desired, EventType, Reason, State
from rethaw.model.errors import Conflict, Fenced
from rethaw.model.types import Assignment, Fence, RetrySpec, WaitSpec

S = State
TRIED_AGAIN = AGENT.model_copy(update={"retries": RetrySpec(max=2, delay_s=0.0, jitter=False)})


class _Runner:
    """One event loop and one world for the whole test; each history is a session of its own."""

    def __init__(self, dsn: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._context = world(dsn, Policy(deaths_per_step=2, lease_s=3600))
        self.w: World = self.run(self._context.__aenter__())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self._context.__aexit__(None, None, None))
        self.loop.close()


@pytest.fixture(name="runner")
def runner_fixture(control_dsn: str) -> Iterator[_Runner]:
    made = _Runner(control_dsn)
    yield made
    made.close()


def machine(runner: _Runner) -> type[RuleBasedStateMachine]:
    w, run = runner.w, runner.run

    class Session(RuleBasedStateMachine):
        """The node of this model does what it is told, later or never, and crashes at will."""

        def __init__(self) -> None:
            super().__init__()
            view, _ = run(w.control.create(TRIED_AGAIN, {}))
            self.id: str = view.id
            self.todo: list[Assignment] = []
            self.fence: Fence | None = None  # of the life that the node runs
            self.zombies: list[Fence] = []
            self.counter = 0  # in guest memory
            self.number = 1  # of the attempt that the node runs
            self.saved: dict[str, int] = {}  # the counter in each snapshot
            self.sent = 0
            self.waiting: set[str] = set()

        def teardown(self) -> None:
            run(w.control.erase(self.id, force=True))  # the next history begins with an empty node

        def view(self) -> Any:
            return run(w.control.session(self.id))

        def attempt(self, work: Coroutine[Any, Any, Any], *allowed: type[Exception]) -> Any:
            try:
                return run(work)
            except allowed:
                return None

        def drop(self) -> None:
            if self.fence is not None:
                self.zombies.append(self.fence)
            self.fence = None

        # ---- people

        @rule()
        def suspend(self) -> None:
            self.attempt(w.control.suspend(self.id), Conflict)

        @rule()
        def resume(self) -> None:
            self.attempt(w.control.resume(self.id), Conflict)

        @rule(key=st.sampled_from([None, "a", "b"]))
        def message(self, key: str | None) -> None:
            self.attempt(w.control.send(self.id, b"1", key), Conflict)

        @rule()
        def signal(self) -> None:
            self.attempt(w.control.signal(self.id, "go", b"1"), Conflict)

        @rule(now=st.booleans(), really=st.integers(0, 19))
        def cancel(self, now: bool, really: int) -> None:
            if really == 0:
                self.attempt(w.control.cancel(self.id, now=now), Conflict)

        # ---- the node

        def listen(self) -> None:
            run(w.loops.fire())
            self.todo += [a for a in run(w.node.work()) if a.session == self.id]

        @rule()
        def obey(self) -> None:
            self.listen()
            if not self.todo:
                return
            task = self.todo.pop(0)
            fence = Fence(session=self.id, generation=task.generation)
            if task.action in ("start", "restore"):
                self.drop()
                try:
                    run(w.report(fence, S.RUNNING))
                except (Fenced, Conflict):
                    return
                self.fence, self.waiting, self.number = fence, set(), task.attempt
                self.counter = self.saved[task.snapshot.id] if task.snapshot else 0
            elif task.action == "kill":
                if self.fence == fence:
                    self.drop()
            elif task.action == "suspend" and self.fence == fence:
                self.freeze(Reason.REQUESTED)
            elif task.action == "cancel" and self.fence == fence:
                self.attempt(w.report(fence, S.CANCELLED, exit_code=143), Fenced, Conflict)
                self.drop()

        def freeze(self, reason: Reason) -> None:
            fence = self.fence
            assert fence is not None
            try:
                run(w.report(fence, S.SUSPENDING, reason=reason))
                self.save_now("suspend")
                run(w.report(fence, S.SUSPENDED, reason=reason, waits=tuple(self.waiting)))
            except Fenced:
                self.drop()
            except Conflict:
                self.attempt(w.report(fence, S.RUNNING), Fenced, Conflict)
            else:
                self.drop()

        @precondition(lambda self: self.fence is not None)
        @rule()
        def idle(self) -> None:
            self.freeze(Reason.IDLE)

        def save_now(self, why: str) -> None:
            assert self.fence is not None
            info = run(w.save(self.fence, why=why))
            self.saved[info.id] = self.counter

        @precondition(lambda self: self.fence is not None)
        @rule()
        def save(self) -> None:
            try:
                self.save_now("exchange")
            except (Fenced, Conflict):
                self.drop()

        @precondition(lambda self: self.fence is not None)
        @rule(reason=st.sampled_from([Reason.SANDBOX_DIED, Reason.OUT_OF_MEMORY]))
        def die(self, reason: Reason) -> None:
            assert self.fence is not None
            self.attempt(w.control.report_death(self.fence, reason, "x"), Fenced)
            self.drop()

        @rule(really=st.integers(0, 9))
        def node_restarts(self, really: int) -> None:
            if really == 0:
                self.drop()
                self.todo = []
                run(w.node.restart())

        @precondition(lambda self: self.fence is not None)
        @rule(really=st.integers(0, 9))
        def exit(self, really: int) -> None:
            if really == 0 and self.fence is not None:
                self.attempt(w.report(self.fence, S.COMPLETED, exit_code=0), Fenced, Conflict)
                self.drop()

        @precondition(lambda self: self.fence is not None)
        @rule(really=st.integers(0, 3))
        def fail(self, really: int) -> None:
            if really == 0 and self.fence is not None:
                failed = w.report(self.fence, S.FAILED, reason=Reason.EXITED, exit_code=1)
                self.attempt(failed, Fenced, Conflict)
                self.drop()

        @rule(really=st.integers(0, 4))
        def try_again(self, really: int) -> None:
            if really == 0:
                self.attempt(w.control.retry(self.id), Conflict)

        # ---- the agent, who acts most of the time

        def say(self, work: Callable[[Fence], Coroutine[Any, Any, Any]]) -> Any:
            assert self.fence is not None
            try:
                return run(work(self.fence))
            except (Fenced, Conflict):
                self.drop()
                return None

        @precondition(lambda self: self.fence is not None)
        @rule(again=st.integers(0, 3))
        def speak(self, again: int) -> None:
            for _ in range(again + 1):
                if self.fence is not None:
                    self.send()

        def send(self) -> None:
            self.counter += 1
            key = f"send:{self.number}.{self.counter}"
            self.sent += 1
            name = f"m_{self.id}_{self.sent}"
            text = b"%d.%d" % (self.number, self.counter)
            self.say(lambda f: w.append(f, EventType.MESSAGE_SENT, text, message=name, key=key))

        @precondition(lambda self: self.fence is not None)
        @rule(kind=st.sampled_from(["inbox", "signal"]))
        def wait(self, kind: Any) -> None:
            self.counter += 1
            spec = WaitSpec(id=f"w{self.counter}", kind=kind, name="go" if kind == "signal" else None)
            attempt = self.view().attempt
            state = self.say(lambda f: w.control.open_wait(f, attempt, spec))
            if state is not None and not state.done:
                self.waiting.add(spec.id)

        # ---- what always holds

        @invariant()
        def sound(self) -> None:
            view = self.view()
            events = run(w.log.read(self.id, all_lines=True, limit=100_000))
            assert [e.seq for e in events] == list(range(1, view.last_seq + 1)), "the log has a gap"
            states = [State(e.data["state"]) for e in events if e.type == EventType.SESSION_STATE]
            assert states[-1] == view.state
            for old, new in itertools.pairwise(states):
                assert transitions.allowed(old, new), (old, new)
            if view.state.final:
                assert all(new == S.QUEUED for old, new in itertools.pairwise(states) if old.final)
            attempts = [e.attempt for e in events]
            assert attempts == sorted(attempts) and max(attempts) <= view.attempt
            if view.retry_at is not None:
                assert view.state == S.QUEUED and view.node is None
            if view.state == S.SUSPENDED:
                assert view.node is None and view.snapshot is not None
                # nothing sleeps through what it waits for
                if view.reason in (Reason.IDLE,) and view.desired == Desired.RUNNING:
                    unheard = run(
                        w.sql(
                            "SELECT id FROM waits WHERE session = %s AND state = 'done' AND id = ANY(%s)",
                            self.id,
                            sorted(self.waiting),
                        )
                    )
                    assert not unheard, unheard
            used = run(
                w.sql(
                    """SELECT u.signal, count(*) FROM signal_uses u JOIN signals g ON g.id = u.signal
                       JOIN rethaw_path(%s, %s) p ON u.line = p.line AND u.seq <= p.upto
                       WHERE g.session = %s GROUP BY 1 HAVING count(DISTINCT (u.attempt, u.wait)) > 1""",
                    self.id,
                    view.line,
                    self.id,
                )
            )
            assert not used, "one signal completed two waits of the path"
            outbox = run(w.control.outbox(self.id))
            assert [m.number for m in outbox] == list(range(1, len(outbox) + 1))
            published = {m.id for m in outbox}
            path = run(w.log.read(self.id, limit=100_000))
            durable = [s for s in run(w.catalog.list(self.id)) if s.unusable is None]
            for event in path:
                if event.type == EventType.MESSAGE_SENT and event.data["message"] not in published:
                    same = [m for m in outbox if m.payload == event.body]
                    covered = [s for s in durable if s.id == view.snapshot and s.seq >= event.seq]
                    assert same or not covered, "a message in a durable snapshot is not published"

        @invariant()
        def fenced(self) -> None:
            view = self.view()
            for zombie in self.zombies[-3:]:
                if zombie.generation != view.generation:
                    with pytest.raises(Fenced):
                        run(w.report(zombie, S.WAITING))

    return Session


def test_random_histories(runner: _Runner) -> None:
    run_state_machine_as_test(
        machine(runner),
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
