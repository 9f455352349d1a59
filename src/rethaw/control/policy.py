"""The numbers control decides by, in one place. Durations in seconds, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Defaults that fit one machine; tests shorten them."""

    lease_s: float = 15.0  # a node renews at a third of it
    poll_s: float = 1.0  # longest time that anything waits for a notification that was lost
    deaths_per_step: int = 3  # DESIGN §8: deaths after restoring one snapshot without a new event of the agent
    deaths_per_step_total: int = 10  # and whatever it logs meanwhile, or an agent that logs, then dies, loops for ever
    overcommit: float = 4.0  # memory limits of a node's sessions may sum up to this many times its memory
    keep_newest: int = 3  # snapshots of a live session's path that recovery may ask for
    object_store: bool = False  # nodes upload snapshots
    cancel_slack_s: float = 20.0  # on top of an agent's grace period, before control stops waiting for its node
