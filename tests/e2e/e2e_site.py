"""A small development server for sandboxes: HTTP/1.1 with what dev servers do, and a WebSocket echo. Standard library only."""

from __future__ import annotations

import hashlib

PORT = 3000
BIG = 20_000_000
SITE = r"""
import base64, hashlib, json, os, socketserver, struct, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

def big(size):
    return b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(size // 32 + 1))[:size]

state = {"hits": 0}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def say(self, status, body, *headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
    def do_GET(self):
        path = self.path.partition("?")[0]
        state["hits"] += 1
        if self.headers.get("Upgrade", "").lower() == "websocket":
            return self.socket()
        if path == "/headers":
            self.say(200, json.dumps([self.path, self.headers.items()]).encode(), ("Content-Type", "application/json"))
        elif path == "/big":
            self.say(200, DATA)
        elif path == "/redirect":
            self.say(302, b"", ("Location", "http://localhost:3000/headers?a=1"), ("Set-Cookie", "sid=1; Path=/; Domain=localhost; HttpOnly"),
                     ("Set-Cookie", "rethaw_link=stolen; Path=/"), ("Service-Worker-Allowed", "/"), ("X-Own", "kept"))
        elif path == "/stream":
            self.send_response(200); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
            for n in range(5):
                self.wfile.write(b"2\r\n%d\n\r\n" % n); self.wfile.flush(); time.sleep(0.1)
            self.wfile.write(b"0\r\n\r\n")
        elif path == "/hang":
            self.send_response(200); self.send_header("Content-Length", "100"); self.end_headers()
            self.wfile.write(b"part"); self.wfile.flush()
            print("hanging", flush=True)
            time.sleep(1000)
        elif path == "/count":
            self.say(200, b"%d" % state["hits"])
        else:
            self.say(404, b"not here")
    do_HEAD = do_GET
    def do_POST(self):
        if self.headers.get("Transfer-Encoding"):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size); self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.say(200, hashlib.sha256(body).hexdigest().encode())
    def socket(self):
        key = base64.b64encode(hashlib.sha1((self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()
        if self.path.startswith("/nosocket"):
            return self.say(403, b"no sockets for you")
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", key)):
            self.send_header(name, value)
        if "vite" in self.headers.get("Sec-WebSocket-Protocol", ""):
            self.send_header("Sec-WebSocket-Protocol", "vite")
        self.end_headers()
        self.close_connection = True
        self.frame(1, json.dumps([self.path, self.headers.items()]).encode())
        while True:
            first, second = self.rfile.read(2)
            size = second & 127
            if size == 126: size, = struct.unpack(">H", self.rfile.read(2))
            elif size == 127: size, = struct.unpack(">Q", self.rfile.read(8))
            mask = self.rfile.read(4)
            data = self.rfile.read(size)
            data = bytes(a ^ b for a, b in zip(data, (mask * (size // 4 + 1))[:size]))
            if first & 15 == 8:
                return self.frame(8, data[:2])
            if data == b"close":
                return self.frame(8, struct.pack(">H", 4321) + b"bye")
            self.frame(first & 15, data)
    def frame(self, kind, data):
        size = len(data)
        head = bytes([128 | kind, size]) if size < 126 else bytes([128 | kind, 126]) + struct.pack(">H", size) if size < 65536 else bytes([128 | kind, 127]) + struct.pack(">Q", size)
        self.wfile.write(head + data); self.wfile.flush()
    def log_message(self, *args):
        pass

DATA = big(20000000)
def serve():
    server = ThreadingHTTPServer(("127.0.0.1", 3000), Handler)
    server.daemon_threads = True
    print("serving", flush=True)
    server.serve_forever()
"""


def big(size: int = BIG) -> bytes:
    return b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(size // 32 + 1))[:size]
