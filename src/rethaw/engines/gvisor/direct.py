"""Saves and restores by a sandbox's own control socket, as `runsc checkpoint` and `runsc restore` do it, but without the
process: the same guest is saved in 46 ms in place of 65, which a frozen agent waits for, and forks one after another.

The protocol is one JSON object each way over a unix socket, with descriptors beside the request's first byte. It is
private to runsc, so only builds on which it was checked are spoken to (`speaks`), and the commands remain for the others.
What the commands do beside the call is kept: the same files under the same names, the same network of a loopback alone.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rethaw.engines.gvisor.runsc import Result
from rethaw.model.errors import EngineError

# The order in which the sentry wants the files.
STATE, PAGES_META, PAGES = "checkpoint.img", "pages_meta.img", "pages.img"
_FILES = (STATE, PAGES_META, PAGES)
_CHECKED = re.compile(r"^(release-20240729|0\.0~20240729)\b")
_ANSWER_LIMIT = 1 << 20
_CREATED, _RUNNING = b'"status":"created"', b'"status":"running"'  # of one length
_Call = tuple[str, dict[str, Any], list[int]]  # method, argument, descriptors


def speaks(version: str) -> bool:
    """Whether this build's control socket is known to do what is asked of it here."""
    return bool(_CHECKED.match(version))


def _loopback() -> dict[str, Any]:
    """The arguments that `runsc --network=none` sends: masks are bytes, which Go writes as base64."""
    return {
        "LoopbackLinks": [
            {
                "Name": "lo",
                "Addresses": [{"Address": "127.0.0.1", "PrefixLen": 8}, {"Address": "::1", "PrefixLen": 128}],
                "Routes": [
                    {"Destination": {"IP": "127.0.0.0", "Mask": "/wAAAA=="}, "Gateway": ""},
                    {"Destination": {"IP": "::1", "Mask": "/////////////////////w=="}, "Gateway": ""},
                ],
                "GVisorGRO": False,
            }
        ],
        "FDBasedLinks": None,
        "XDPLinks": None,
    }


async def save(control: Path, directory: Path, timeout_s: float) -> Result:
    """Save the sandbox behind the socket `control` into new files in `directory`; it runs on. As `runsc checkpoint
    -leave-running -compression=none -exclude-committed-zero-pages`, of which the result has code and message. Raises
    OSError when the files cannot be made."""
    request = {
        "key": None,
        "metadata": {"compression": "none"},
        "MemoryFileSaveOpts": {"ExcludeCommittedZeroPages": True},
        "have_pages_file": True,
        "Resume": True,
    }
    with _opened([directory / name for name in _FILES], os.O_RDWR | os.O_CREAT | os.O_EXCL) as files:
        return await _session(control, [("containerManager.Checkpoint", request, files)], timeout_s)


async def restore(control: Path, sections: Mapping[str, Path], timeout_s: float) -> Result:
    """Restore saved files into the created sandbox behind the socket `control`, as `runsc restore`."""
    request = {"HavePagesFile": True, "HaveDeviceFile": False}
    network: _Call = ("Network.CreateLinksAndRoutes", _loopback(), [])
    try:
        with _opened([sections[name] for name in _FILES], os.O_RDONLY) as files:
            return await _session(control, [network, ("containerManager.Restore", request, files)], timeout_s)
    except OSError as error:
        return Result(1, "", str(error))


def note_running(root: Path, id: str) -> None:
    """Say in runsc's own record of the sandbox `id` that it runs, as the restore command does: else `runsc kill` and
    others refuse it. Blocking, 0.1 ms."""
    record = root / f"{id}_sandbox:{id}.state"
    with contextlib.suppress(OSError), record.open("r+b") as file:
        at = file.read().find(_CREATED)
        if at != -1:
            file.seek(at)
            file.write(_RUNNING)


async def _session(control: Path, calls: Sequence[_Call], timeout_s: float) -> Result:
    """Make the calls on one connection, up to the first that fails. Raises EngineError after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            with await _connect(control) as connection:
                for method, argument, files in calls:
                    answer = await _call(connection, method, argument, files)
                    if answer.get("success") is not True:
                        return Result(1, "", f"{method}: {answer.get('err') or 'it did not say why'}")
    except TimeoutError:
        raise EngineError(f"the sandbox took longer than {timeout_s:.0f}s", remedy="see `rethaw doctor`") from None
    except (OSError, ValueError) as error:
        return Result(1, "", f"the sandbox cannot be spoken to: {error}")
    return Result(0, "", "")


async def _connect(control: Path) -> socket.socket:
    # The path may be longer than an address: the socket is opened first, and named by its descriptor.
    handle = os.open(control, os.O_PATH | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, f"/proc/self/fd/{handle}")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(handle)
    return connection


async def _call(connection: socket.socket, method: str, argument: dict[str, Any], files: list[int]) -> dict[str, Any]:
    request = json.dumps({"method": method, "arg": argument}).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    # Smaller than any socket buffer, and nothing else is in it.
    if connection.sendmsg([request], ancillary) != len(request):
        raise OSError(f"{method} was taken in part")
    loop, said = asyncio.get_running_loop(), bytearray()
    while len(said) < _ANSWER_LIMIT:
        data = await loop.sock_recv(connection, 65536)
        if not data:
            raise OSError("it hung up")
        said += data
        with contextlib.suppress(ValueError):  # not whole yet
            answer = json.loads(said)
            if isinstance(answer, dict):
                return answer  # pyright: ignore[reportUnknownVariableType]
            raise OSError(f"it answered {bytes(said[:80])!r}")
    raise OSError("its answer does not end")


@contextlib.contextmanager
def _opened(paths: Sequence[Path], flags: int) -> Generator[list[int]]:
    with contextlib.ExitStack() as stack:
        files: list[int] = []
        for path in paths:
            files.append(os.open(path, flags | os.O_CLOEXEC, 0o644))
            stack.callback(os.close, files[-1])
        yield files
