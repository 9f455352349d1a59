"""A guest that writes checksummed patterns everywhere, all the time, while it is saved and restored again and again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import ask, restored

from rethaw.engines.base import Engine, SandboxSpec

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(900)]

# Every worker counts its rounds in `rounds` and says in `wrong` what it found that it had not left there.
TORTURE = r"""
import os, socket, struct, subprocess, threading, time, zlib
BLOCK, BLOCKS = 32768, 64
rounds, wrong = {}, []

def worker(name):
    def start(f):
        def run():
            rounds[name] = 0
            try:
                for _ in f():
                    rounds[name] += 1
                    time.sleep(0.002)
            except BaseException as error:
                wrong.append("%s: %r" % (name, error))
        threading.Thread(target=run, daemon=True).start()
        return f
    return start

def pattern(n):
    return (b"%016d" % n) * (BLOCK // 16)

def blocks(read, write):
    sums = {}
    n = 0
    while True:
        at = (n * 7) % BLOCKS
        if at in sums and zlib.crc32(read(at)) != sums[at]:
            raise ValueError("block %d is not what was written" % at)
        n += 1
        data = pattern(n) if n % 5 else os.urandom(BLOCK)
        write(at, data)
        sums[at] = zlib.crc32(data)
        yield

def in_file(path, sync):
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, BLOCK * BLOCKS)
    def write(at, data):
        if os.pwrite(fd, data, at * BLOCK) != len(data):
            raise OSError("a short write")
        if sync:
            os.fsync(fd)
    return blocks(lambda at: os.pread(fd, BLOCK, at * BLOCK), write)

def through(write, read):
    "Numbered pieces that come back in order and whole."
    n = 0
    while True:
        n += 1
        data = struct.pack(">QI", n, zlib.crc32(pattern(n)[:5000])) + pattern(n)[:5000]
        write(data)
        back = b""
        while len(back) < len(data):
            more = read(len(data) - len(back))
            if not more:
                raise EOFError("it ended")
            back += more
        if back != data:
            raise ValueError("piece %d came back changed" % n)
        yield

@worker("memory")
def memory():
    held = bytearray(BLOCK * BLOCKS)
    def write(at, data):
        held[at * BLOCK:(at + 1) * BLOCK] = data
    return blocks(lambda at: bytes(held[at * BLOCK:(at + 1) * BLOCK]), write)

@worker("tmpfs")
def tmpfs():
    return in_file("/dev/shm/torture", False)

@worker("disk")
def disk():
    return in_file("/srv/torture", False)

@worker("synced disk")
def synced():
    return in_file("/srv/torture-synced", True)

@worker("deleted file")
def deleted():
    made = in_file("/srv/torture-deleted", False)
    next(made)
    os.unlink("/srv/torture-deleted")
    return made

@worker("pipe")
def pipe():
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    return through(child.stdin.write, child.stdout.read)

@worker("socket")
def sockets():
    listening = socket.create_server(("127.0.0.1", 0))
    def echo():
        there = listening.accept()[0]
        while True:
            there.sendall(there.recv(4096))
    threading.Thread(target=echo, daemon=True).start()
    here = socket.create_connection(listening.getsockname())
    return through(here.sendall, here.recv)
"""
WORKERS = {"memory", "tmpfs", "disk", "synced disk", "deleted file", "pipe", "socket"}


@pytest.mark.parametrize("generations", [5, pytest.param(50, marks=pytest.mark.long)])
async def test_nothing_is_ever_lost_or_changed(
    generations: int, engine: Engine, spec: SandboxSpec, boot: Any, staging: Path
) -> None:
    box = await boot()
    await ask(box, TORTURE)
    await ask(box, "time.sleep(0.2)")
    before: dict[str, int] = {}
    for generation in range(generations):
        if generation % 3 == 2:  # also one that is saved and runs on
            await box.capture(staging / f"beside-{generation}")
        saved = await box.capture(staging / str(generation))
        await box.destroy()
        box = await boot(await restored(engine, spec, saved))
        for path in staging.rglob("*"):
            if path.is_file():
                path.unlink()
        seen: dict[str, int] = {}
        for _ in range(200):
            assert await ask(box, "wrong") == [], f"generation {generation}"
            seen = await ask(box, "rounds")
            if set(seen) == WORKERS and all(seen[name] > before.get(name, 0) for name in WORKERS):
                break
            await ask(box, "time.sleep(0.05)")
        else:
            pytest.fail(f"generation {generation}: some worker stands still: {before} {seen}")
        before = seen
    await ask(box, "time.sleep(0.5)")
    assert await ask(box, "wrong") == []
