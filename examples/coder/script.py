"""The model's side of the demo, played by the scripted provider: what a model might say to the coding agent.

Each answer is a pure function of the conversation, so a call that were made twice would get the same answer.
"""

from __future__ import annotations

import hashlib
import re

from rethaw.testing.provider import ProviderRequest, Reply, by_turn

SERVER = '''\
"""Answers every GET with how many requests it has had, kept in memory only."""

import json
import os
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

started = secrets.token_hex(4)
lock = threading.Lock()
count = 0


class Counter(BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        with lock:
            count += 1
            body = json.dumps({"count": count, "pid": os.getpid(), "started": started}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8000), Counter).serve_forever()
'''
TEST = """\
import json
import threading
import unittest
import urllib.request
from http.server import ThreadingHTTPServer

import server


class CounterTest(unittest.TestCase):
    def test_counts(self):
        httpd = ThreadingHTTPServer(("127.0.0.1", 0), server.Counter)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = "http://127.0.0.1:%d/" % httpd.server_port
        counts = [json.load(opener.open(url))["count"] for _ in range(3)]
        self.assertEqual(counts, [1, 2, 3])
        httpd.shutdown()


if __name__ == "__main__":
    unittest.main()
"""
NOTES = "# Request counter\n\n`python3 server.py` serves on port 8000 and counts its requests in memory.\n"

FILES = {"server.py": SERVER, "test_server.py": TEST, "NOTES.md": NOTES}
SHA256 = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
URL = "http://127.0.0.1:8000/"
CRASH_TURN = 5  # the demo kills the sandbox while this answer (counted from 0) streams; the dev server runs by then


def results(request: ProviderRequest) -> str:
    return " ".join(t.text for t in request.turns if t.role == "tool")


def review(request: ProviderRequest) -> Reply:
    tests = "The tests pass" if "\nOK" in results(request) else "The tests FAIL"
    counts = re.findall(r'"count": (\d+)', results(request))
    question = f"{tests}; the dev server has counted {counts[-1] if counts else 'no'} requests. Shall I go on?"
    return Reply("Time for a person to look at it.", tool_calls=[("ask_approval", {"question": question})])


def after_approval(request: ProviderRequest) -> Reply:
    if '"approved": true' not in " ".join(request.tool_results):
        return Reply("Not approved, so I stop here.")
    return Reply("Approved. Is the dev server still there?", tool_calls=[("fetch_url", {"url": URL})])


def done(request: ProviderRequest) -> Reply:
    seen = re.findall(r'"count": (\d+), "pid": (\d+), "started": "(\w+)"', results(request))
    counts = [int(count) for count, _, _ in seen]
    one_life = len({(pid, started) for _, pid, started in seen}) == 1
    if sorted(counts) != list(range(1, len(counts) + 1)) or not one_life:
        return Reply(f"The dev server lost its memory: {seen}.")
    return Reply(
        f"I made a server that counts its requests, with a test. The same process has served {counts[-1]} requests, "
        "whatever happened on the way."
    )


script = by_turn([
    Reply("I start with the server.", tool_calls=[("write_file", {"path": "server.py", "content": SERVER})]),
    Reply("Now a test.", tool_calls=[("write_file", {"path": "test_server.py", "content": TEST})]),
    Reply("Start it.", tool_calls=[("start_server", {"command": "python3 server.py", "port": "8000"})]),
    Reply("Try it.", tool_calls=[("fetch_url", {"url": URL})]),
    Reply("Twice more, at once.", tool_calls=[("fetch_url", {"url": URL}), ("fetch_url", {"url": URL})]),
    Reply(
        "It counts. I think about the test for a while, because somebody may want to kill me in the middle of this "
        "sentence; and then I run it.",
        tool_calls=[("run_command", {"command": "python3 -m unittest -v"})],
        first_byte_s=0.5,
        chunk_s=0.25,
    ),
    review,
    after_approval,
    Reply("Notes for the next reader.", tool_calls=[("write_file", {"path": "NOTES.md", "content": NOTES})]),
    done,
])  # fmt: skip
TURNS = 10
