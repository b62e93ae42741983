"""A small Hugging Face hub on the loopback, with faults to inject.

It speaks what huggingface_hub 2.4 asks of the real one: a model's commit and files with their
hashes, the listing of a tree, and HEAD and GET of a file, large ones redirected to another host as
the real hub redirects to its storage, with ranges.
"""

import hashlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf")
PIECE = 65536


@dataclass
class Fault:
    """What goes wrong with requests whose path holds a text.

    status, code, message: an answer of the hub's kind. cut: the connection ends after so many
    bytes, with a reset if it is abrupt. content: what is sent instead. delay_s: the wait in front
    of each piece of a file. times: how often it goes wrong, -1 for always.
    """

    status: int = 0
    code: str = ""
    message: str = ""
    cut: int | None = None
    abrupt: bool = False
    content: bytes | None = None
    delay_s: float = 0.0
    times: int = -1


@dataclass(frozen=True)
class Seen:
    """A request that was answered. sent: bytes of a file."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int


@dataclass
class Repository:
    """Files by path, and the names of their commit."""

    files: dict[str, bytes]
    names: tuple[str, ...] = ("main",)
    commit: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(b"".join(name.encode() + data for name, data in self.files.items()))
        self.commit = digest.hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """The server, running until it is stopped. It can be started again at the same address."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[Repository]] = {}
        self.faults: dict[str, Fault] = {}
        self.seen: list[Seen] = []
        self.port = 0
        self.start()

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, folder: Path, *names: str) -> Repository:
        """Publish a folder's files, with names of the revision other than main."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        files["README.md"] = b"not needed"
        repository = Repository(files, ("main", *names))
        self.repositories.setdefault(name, []).insert(0, repository)
        return repository

    def downloads(self) -> list[Seen]:
        """Return the requests for files' contents."""
        return [seen for seen in self.seen if seen.method == "GET" and "/api/" not in seen.path]

    def fault(self, path: str) -> Fault:
        for text, fault in self.faults.items():
            if text in path and fault.times != 0:
                fault.times -= 1
                return fault
        return Fault()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError):  # the client was killed, or we hung up
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.sent = 0
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(path)
        try:
            self._answer(path, fault)
        finally:
            header = self.headers.get
            self.hub.seen.append(
                Seen(self.command, path, header("Range"), header("Authorization"), self.sent)
            )

    def _answer(self, path: str, fault: Fault) -> None:
        if fault.status:
            return self._refuse(fault.status, fault.code, fault.message)
        if path.startswith("/storage/"):
            _, _, name, file = path.split("/", 3)
            repository = self.hub.repositories[name.replace("--", "/")][0]
            return self._file(repository, file, fault)
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/", 3)
        name, (action, rest) = "/".join(parts[:2]), ((*parts[2:], "", "")[:2])
        if name not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        revision, _, file = rest.partition("/") if not api else (rest, "", "")
        found = self._find(name, revision or "main")
        if found is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self._json(
                self._tree(found) if action == "tree" else self._info(name, found), fault.content
            )
        if file not in found.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if not file.endswith(LARGE):
            return self._file(found, file, fault)
        where = f"http://localhost:{self.hub.port}/storage/{name.replace('/', '--')}/{file}"
        data = found.files[file]
        self._head(
            302,
            0,
            found,
            {
                "Location": where,
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            },
        )

    def _find(self, name: str, revision: str) -> Repository | None:
        for repository in self.hub.repositories[name]:
            if revision in (*repository.names, repository.commit):
                return repository
        return None

    def _file(self, repository: Repository, file: str, fault: Fault) -> None:
        data = repository.files[file] if fault.content is None else fault.content
        digest = git_hash(repository.files[file])
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        more = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if asked:
            more["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._head(206 if asked else 200, len(data) - start, repository, more)
        if self.command == "HEAD":
            return
        end = len(data) if fault.cut is None else min(len(data), start + fault.cut)
        for place in range(start, end, PIECE):
            if fault.delay_s:
                time.sleep(fault.delay_s)
            piece = data[place : min(place + PIECE, end)]
            self.wfile.write(piece)
            self.sent += len(piece)
        if end < len(data):
            if fault.abrupt:  # a reset instead of an end
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    def _info(self, name: str, repository: Repository) -> dict[str, Any]:
        siblings = []
        for path, data in repository.files.items():
            sibling = {"rfilename": path, "size": len(data), "blobId": git_hash(data)}
            if path.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        return {"id": name, "sha": repository.commit, "siblings": siblings}

    def _tree(self, repository: Repository) -> list[dict[str, Any]]:
        tree = []
        for path, data in repository.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
            entry["oid"] = git_hash(data)
            if path.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
            tree.append(entry)
        return tree

    def _json(self, content: object, instead: bytes | None) -> None:
        text = json.dumps(content).encode() if instead is None else instead
        self._head(200, len(text), None, {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(text)

    def _refuse(self, status: int, code: str, message: str) -> None:
        more = {"X-Error-Code": code, "X-Error-Message": message}
        self._head(status, 0, None, {name: text for name, text in more.items() if text})

    def _head(
        self, status: int, length: int, repository: Repository | None, more: dict[str, str]
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if repository is not None:
            self.send_header("X-Repo-Commit", repository.commit)
        for name, text in more.items():
            self.send_header(name, text)
        self.end_headers()
