"""The kernel's host name: each session's own, in a fork as well, and known to the resolver."""

# Paths are plain strings here, see daemon.
# ruff: noqa: PTH101, PTH105, PTH118, PTH123

from __future__ import annotations

import os

from rethaw.channel.lean import signal, socket
from rethaw.guest.wire import note

HOSTS = "/etc/hosts"
WANTED = "hostname"  # in guestd's directory, for a PID 1 that has the right to do it


def of(session: str) -> str:
    """RFC 1123: letters, digits and hyphens, at most 63."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in session).strip("-").lower()[:63]


def change(session: str, run_dir: str) -> None:
    """Take the name of `session`. guestd does it itself where it is PID 1, and else asks its parent, if that is PID 1
    (see engines.microvm.starter). On a machine that is not its own (tests) nothing is changed."""
    name = of(session)
    if not name or 1 not in (os.getpid(), os.getppid()):
        return
    try:
        former = socket.gethostname()
        if os.getpid() == 1:
            socket.sethostname(name)
        else:
            with open(os.path.join(run_dir, WANTED), "w", encoding="ascii") as file:
                file.write(name)
            os.kill(1, signal.SIGUSR1)
        known(HOSTS, former, name)
    except OSError as error:
        note(f"the host name stays: {error}")


def known(path: str, former: str, name: str) -> None:
    """Replace `former` by `name` in a file like /etc/hosts. A file without it is left as it is."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read().split("\n")
    changed = [" ".join(name if w == former else w for w in line.split(" ")) for line in lines]
    if changed == lines:
        return
    with open(path + ".rethaw", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\n".join(changed))
    os.chmod(path + ".rethaw", 0o644)
    os.replace(path + ".rethaw", path)
