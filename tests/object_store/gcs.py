"""Google's XML interface before moto's S3 server: nobody packages an emulator of it that has generations and ETags.

The two interfaces differ in headers alone, as far as objects are put, got, listed and deleted: a generation number stands
where S3 goes by ETags, `x-goog-if-generation-match` where it has `If-None-Match` and `If-Match`, and to delete what is not
there is an error. What is compared and what is set at once stays moto's matter.
"""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler

from tests.serving import Serving

SIGNED = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
GENERATION = "x-amz-meta-generation"  # where moto keeps it
MATCH = "x-goog-if-generation-match"
PASSED_ON = ("range", "content-type", "if-match", "if-none-match")
ABSENT = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>NoSuchKey</Code><Message>No such object</Message></Error>"
CHANGED = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>PreconditionFailed</Code><Message>No</Message></Error>"
Answer = tuple[int, dict[str, str], bytes]


class Front(Serving):
    """Takes requests of a GCS client and asks an S3 server on this machine."""

    def __init__(self, target: int) -> None:
        self.target, self.last, self.lock = target, 0, threading.Lock()
        super().__init__(self.answer)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        given = {name.lower(): value for name, value in handler.headers.items()}
        self.send(handler, *self.translated(handler.command, handler.path, given, body))

    def translated(self, method: str, path: str, given: dict[str, str], body: bytes) -> Answer:
        """What the S3 server answers to the same request in its own words."""
        headers = {name: given[name] for name in PASSED_ON if name in given}
        if method == "DELETE" and self.ask("HEAD", path, {}, b"")[0] == 404:
            return 404, {}, ABSENT
        if method == "PUT":
            headers[GENERATION] = generation = self.next_generation()
            wanted = given.get(MATCH)
            if wanted == "0":
                headers["If-None-Match"] = "*"
            elif wanted:
                _, there, _ = self.ask("HEAD", path, {}, b"")
                if there.get(GENERATION) != wanted:
                    return 412, {}, CHANGED
                headers["If-Match"] = there["etag"]
        status, found, content = self.ask(method, path, headers, body)
        if status == 404 and wanted_of(given):  # S3's word for a condition on what is not there
            return 412, {}, CHANGED
        if method == "PUT" and status == 200:
            found["x-goog-generation"] = generation
        elif GENERATION in found:
            found["x-goog-generation"] = found.pop(GENERATION)
        return status, found, content

    def next_generation(self) -> str:
        """Microseconds, as Google's are, and never the same twice."""
        with self.lock:
            self.last = max(self.last + 1, time.time_ns() // 1000)
            return str(self.last)

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """One request of the S3 server."""
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        connection.request(method, path, body, headers | {"Authorization": SIGNED, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def send(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        """One answer; none of S3's own headers gets through."""
        length = headers.get("content-length", str(len(content))) if handler.command == "HEAD" else str(len(content))
        dropped = ("connection", "transfer-encoding", "content-length", "date", "server")
        handler.send_response(status)
        for name, value in (headers | {"content-length": length}).items():
            if (name not in dropped and not name.startswith("x-amz")) or name == "content-length":
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"" if handler.command == "HEAD" else content)


def wanted_of(given: dict[str, str]) -> bool:
    """Whether a request is for one generation of an object that is there."""
    return given.get(MATCH, "0") != "0"
