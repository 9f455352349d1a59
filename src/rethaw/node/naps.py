"""When a program without a wait of its Context may be suspended for a while: nothing of it is seen, and it hardly computes."""

from __future__ import annotations

import time

from rethaw.node.life import Life

_LOOK_S = 1.0  # while something is open whose end nobody tells


class Stretch:
    """A time in which nothing of the agent is seen, from now on."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._since = life.still_since()
        self._at, self._cpu_s = time.monotonic(), life.sandbox.cpu_s()

    def lasts(self, life: Life) -> bool:
        return self._since is not None and life is self._life and life.still_since() == self._since

    def left(self, life: Life) -> float:
        """Seconds until it is long enough for a nap; 0 when it is."""
        freeze = life.agent.idle_suspend_s
        if self._since is None or freeze is None:
            return _LOOK_S
        now = time.monotonic()
        left = max(self._since, self._at) + freeze - now
        if self._since > now:
            left = min(left, _LOOK_S)
        return max(0.01, left) if left > 0 else 0.0

    def computed(self, life: Life, share: float) -> bool:
        """Whether the sandbox used more than `share` of one CPU in it."""
        return life.sandbox.cpu_s() - self._cpu_s > share * (time.monotonic() - self._at)
