"""The last steps before postgres or initdb runs. Started as a program of its own (`python -I -S launch.py SPEC`) so that
nothing has to run between fork and exec of a process with threads. Standard library only.

SPEC is JSON: `uid`, `gid` (null: stay who we are), `parent` (pid to die with), `signal` (what to be sent then), `binds`
[[source, target], ...] under `mount` (a private mount namespace shows directories that the unprivileged user could not
reach otherwise), `argv`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWNS = 0x20000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        sys.exit(f"{what}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if v is None else v.encode() for v in (source, target, kind, data)]
    _check(
        _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]),
        f"cannot mount {source} on {target}",
    )


def main(text: str) -> None:
    spec = json.loads(text)
    if spec["binds"]:
        _check(_libc.unshare(CLONE_NEWNS), "cannot make a mount namespace")
        _mount("none", "/", None, MS_REC | MS_PRIVATE)
        _mount("rethaw", spec["mount"], "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=64k")
        for source, target in spec["binds"]:
            os.mkdir(target)  # noqa: PTH102
            _mount(source, target, None, MS_BIND | MS_REC)
    if spec["uid"] is not None:
        os.setgroups([])
        os.setgid(spec["gid"])
        os.setuid(spec["uid"])
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "cannot set no_new_privs")
    # After setuid, which clears it. The parent may have died before; then nobody would ever tell us.
    _check(_libc.prctl(PR_SET_PDEATHSIG, spec["signal"], 0, 0, 0), "cannot set the parent-death signal")
    if os.getppid() != spec["parent"]:
        sys.exit("the parent is gone")
    os.umask(0o077)
    os.chdir("/")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
    os.execve(spec["argv"][0], spec["argv"], env)


if __name__ == "__main__":
    main(sys.argv[1])
