"""A poll loop for one thread.

poll(2), not epoll: it carries nothing over a save and restore, the kernel is told everything on each call.
"""

from __future__ import annotations

import os
import select

from rethaw.channel.lean import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, Optional

    Handler = Callable[[int], None]

READ = select.POLLIN | select.POLLPRI
WRITE = select.POLLOUT
GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL
RDHUP: int = getattr(select, "POLLRDHUP", 0)


class Loop:
    """File descriptors and who wants to hear of them."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: Dict[int, Handler] = {}
        self._masks: Dict[int, int] = {}
        self.running = True

    def watch(self, fd: int, mask: int, handler: Handler) -> None:
        """Call `handler(events)` when one of `mask` happens; a mask of 0 still hears of errors and hang-ups."""
        self._handlers[fd] = handler
        if self._masks.get(fd) != mask:
            self._masks[fd] = mask
            self._poll.register(fd, mask)

    def mute(self, fd: int) -> None:
        """Hear nothing of `fd`, not even errors, until it is watched again."""
        if self._masks.pop(fd, None) is not None:
            self._poll.unregister(fd)
        self._handlers.pop(fd, None)

    def run_once(self, timeout_ms: Optional[int] = None) -> None:
        for fd, events in self._poll.poll(timeout_ms):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)


def wait(fd: int, mask: int) -> None:
    """Block until one of `mask` (or an error) is there."""
    poll = select.poll()
    poll.register(fd, mask)
    poll.poll()


def ready(fd: int, mask: int) -> bool:
    """Whether one of `mask` (or an error) is there now."""
    poll = select.poll()
    poll.register(fd, mask)
    return bool(poll.poll(0))


def child_signals() -> int:
    """A descriptor that becomes readable whenever a child may have ended."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.signal(signal.SIGCHLD, _ignore)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read


def _ignore(number: int, frame: object) -> None:
    """A handler has to exist for the wakeup descriptor to be written."""
