"""A real S3 server in a process of its own (moto's), and a proxy in front of it that does what networks do."""

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler

from tests.helpers import free_port
from tests.serving import Serving

KINDS = ("refused", "refused though done", "cut in the request", "answer lost", "cut in the answer", "late")
BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}
LATE_SECONDS = 0.4
PAGE = 20  # names of one answer to a listing; S3 itself gives 1,000


class Server:
    """moto's S3 over HTTP."""

    def __init__(self) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        settings = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
        self.process = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.1)
        raise AssertionError("moto's server does not listen")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Proxy(Serving):
    """Passes requests on; with chance `share` one meets a fault of `kinds`, drawn by a seeded generator."""

    def __init__(self, target: int) -> None:
        self.target, self.share, self.kinds, self.random = target, 0.0, KINDS, random.Random(0)
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()
        super().__init__(self.pass_on)

    def trouble(self, share: float, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> None:
        """From now on so many requests meet a fault."""
        with self.lock:
            self.share, self.kinds, self.random = share, kinds, random.Random(seed)
            self.requests.clear()
            self.faults.clear()

    def pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.requests[handler.command] += 1
            fault = self.random.choice(self.kinds) if self.random.random() < self.share else ""
            if fault:
                self.faults[fault] += 1
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if fault == "cut in the request":  # what the server got of it is no request
            return self.cut(handler)
        if fault == "late":
            time.sleep(LATE_SECONDS)
        if fault == "refused":
            return self.send(handler, 503, {}, BUSY)
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        connection.request(handler.command, handler.path, body, dict(handler.headers.items()))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "answer lost":
            return self.cut(handler)
        if fault == "refused though done":
            return self.send(handler, 503, {}, BUSY)
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
        self.send(handler, answer.status, kept, content, cut=fault == "cut in the answer")

    @staticmethod
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    def send(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, cut: bool = False
    ) -> None:
        handler.send_response_only(status)
        if not any(name.lower() == "content-length" for name in headers):
            headers = headers | {"Content-Length": str(len(content))}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if cut else b"" if handler.command == "HEAD" else content)
        handler.wfile.flush()
        if cut:
            self.cut(handler)
