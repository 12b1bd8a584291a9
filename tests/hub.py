"""The Hugging Face hub's read side over HTTP, as far as its own client asks: revisions, trees, files and their ranges."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.serving import Serving

Files = dict[str, bytes]


def names_of(files: Files) -> list[str]:
    """Files and the folders they lie in."""
    folders = {"/".join(name.split("/")[:depth]) for name in files for depth in range(1, name.count("/") + 1)}
    return sorted({*files, *folders})


class Hub(Serving):
    """Repositories `models/org/name` and `datasets/org/name`: commits of files, and branches that may move."""

    def __init__(self) -> None:
        self.refs: dict[str, dict[str, str]] = {}
        self.commits: dict[tuple[str, str], Files] = {}
        super().__init__(self.answer)

    def commit(self, repository: str, files: Files, *branches: str) -> str:
        """Give the branches a commit that holds `files`; its name."""
        content = "".join(f"{name}{hashlib.sha1(files[name]).hexdigest()}" for name in sorted(files))
        number = hashlib.sha1(content.encode()).hexdigest()
        self.commits[repository, number] = files
        self.refs.setdefault(repository, {}).update(dict.fromkeys(branches, number))
        return number

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        path = [unquote(part) for part in urlsplit(handler.path).path.strip("/").split("/")]
        if path[0] == "api":
            return self.describe(handler, path[1:], body)
        kind, path = (path[0], path[1:]) if path[0] == "datasets" else ("models", path)
        repository, revision, name = f"{kind}/{'/'.join(path[:2])}", path[3], "/".join(path[4:])
        found = self.find(handler, repository, revision)
        if not found:
            return None
        number, files = found
        if name not in files:
            return self.refuse(handler, "EntryNotFound", {"X-Repo-Commit": number})
        content, status = files[name], 200
        headers = {"X-Repo-Commit": number, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if (ranged := handler.headers.get("Range")) and handler.command == "GET":
            first, last = (int(part) for part in ranged.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        return self.send(handler, status, content, headers)

    def describe(self, handler: BaseHTTPRequestHandler, path: list[str], body: bytes) -> None:
        """What the API says of a repository."""
        repository, asked, rest = "/".join(path[:3]), path[3] if len(path) > 3 else "revision", path[4:]
        found = self.find(handler, repository, "/".join(rest[:1]) or "main")
        if not found:
            return
        number, files = found
        if asked == "revision":
            siblings = [{"rfilename": name} for name in files]
            said: Any = {"id": "/".join(path[1:3]), "sha": number, "siblings": siblings, "private": False, "tags": []}
        elif asked == "tree":
            below, every = "/".join(rest[1:]), "recursive=True" in handler.path
            names = [name for name in names_of(files) if not below or name.startswith(f"{below}/")]
            deeper = below.count("/") + bool(below)
            said = [self.entry(name, files) for name in names if every or name.count("/") == deeper]
        else:
            wanted = parse_qs(body.decode())["paths"]
            said = [self.entry(name, files) for name in wanted if name in names_of(files)]
        self.send(handler, 200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def entry(name: str, files: Files) -> dict[str, Any]:
        """A file or folder in a listing."""
        if name not in files:
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
        return {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}

    def find(self, handler: BaseHTTPRequestHandler, repository: str, revision: str) -> tuple[str, Files] | None:
        """The commit that a revision names, and its files; None once the request was refused."""
        number = self.refs.get(repository, {}).get(revision, revision)
        if (repository, number) in self.commits:
            return number, self.commits[repository, number]
        return self.refuse(handler, "RevisionNotFound" if repository in self.refs else "RepoNotFound")

    def refuse(self, handler: BaseHTTPRequestHandler, code: str, headers: dict[str, str] | None = None) -> None:
        """As the hub does."""
        self.send(handler, 404, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def send(self, handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]) -> None:
        """One answer."""
        handler.send_response_only(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"" if handler.command == "HEAD" else content)
