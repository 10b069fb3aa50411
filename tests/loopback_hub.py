"""A server on this machine that answers as the Hugging Face Hub does, and fails on demand.

hub.files["OWNER/NAME", "train.jsonl"] = b"..."       a data set's or a model's file, at the commit REVISION
hub.faults += ["cut", 503]                            used up one by every GET of a file's content
"""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Files by repository and path. A fault is a status, "cut" (half the answer) or "stall" (half, then silence)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[tuple[str, str], bytes] = {}
        self.revision = REVISION  # what `main` is
        self.older: set[str] = set()  # commits before, which hold the same files
        self.private: dict[str, str] = {}  # repository -> X-Error-Code of its refusals
        self.faults: list[int | str | None] = []
        self.broken: set[str] = set()  # files that answer 503 until they are taken out of here
        self.sent: list[tuple[str, int, int]] = []  # path, first byte and number of bytes of every GET of a file
        self.released = threading.Event()  # ends the stalled answers
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of these tests."""


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"(/api)?/(?:datasets/|models/)?([\w.-]+/[\w.-]+)(?:/(\w[\w-]*)/([^/]+))?(/.*)?", path)
        if found is None or not any(repo == found[2] for repo, _ in hub.files):
            return self.refuse(401, "RepoNotFound")
        is_api, repo, action, revision, file = found.groups()
        if repo in hub.private:
            return self.refuse(401 if hub.private[repo] == "RepoNotFound" else 403, hub.private[repo])
        if revision not in (None, "main", hub.revision, *hub.older):
            return self.refuse(404, "RevisionNotFound")
        self.commit = revision if revision in hub.older else hub.revision
        if is_api:
            return self.tell(repo, action, (file or "").strip("/"))
        data = hub.files.get((repo, (file or "").strip("/")))
        if data is None:
            return self.refuse(404, "EntryNotFound")
        if (file or "").strip("/") in hub.broken:
            return self.answer(503, [])
        self.send_file(data)

    def tell(self, repo: str, action: str | None, under: str) -> None:
        """The Hub's API: of a repository, of the files under a folder, of some files."""
        files = {path: data for (owner, path), data in self.server.files.items() if owner == repo}
        if action in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            return self.answer_json({"id": repo, "sha": self.commit, "siblings": siblings})
        folders = {path.rsplit("/", n)[0] for path in files for n in range(1, path.count("/") + 1)}
        entries = [{"type": "directory", "path": path, "oid": path} for path in folders]
        entries += [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        if action == "paths-info":
            return self.answer_json([entry for entry in entries if entry["path"] in self.body["paths"]])
        if action == "tree":
            recursive = "recursive=True" in self.path or "recursive=true" in self.path
            inside = [e for e in entries if str(e["path"]).startswith(under and f"{under}/")]
            depth = under.count("/") + 1 if under else 0
            return self.answer_json([e for e in inside if recursive or str(e["path"]).count("/") == depth])
        self.refuse(404, "EntryNotFound")

    def send_file(self, data: bytes) -> None:
        hub = self.server
        fault = hub.faults.pop(0) if hub.faults and self.command == "GET" else None
        if isinstance(fault, int):
            return self.answer(fault, [])
        first, last = 0, len(data) - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            if first > last:
                return self.answer(416, [("Content-Range", f"bytes */{len(data)}")])
        extent = [("Content-Range", f"bytes {first}-{last}/{len(data)}")] if wanted else []
        etag = [("ETag", f'"{hashlib.sha1(data).hexdigest()}"'), ("X-Repo-Commit", self.commit)]
        self.answer(206 if wanted else 200, extent + etag, data[first : last + 1], fault, first)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, [("X-Error-Code", code), ("X-Error-Message", code)])

    def answer_json(self, content: object) -> None:
        self.answer(200, [("Content-Type", "application/json")], json.dumps(content).encode())

    def answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes = b"", fault: str | None = None, first: int = 0
    ) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[: len(body) // 2] if fault else body
        if "/resolve/" in self.path:
            self.server.sent.append((self.path, first, len(body)))  # before the client can have seen them
        self.wfile.write(body)
        self.wfile.flush()
        if fault == "stall":
            self.server.released.wait(20)
        if fault:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[Hub]:
    """A Hub that this process's huggingface_hub asks, with an empty cache. Its libraries read their environment when
    they are imported, so the values are set in their modules too."""
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", f"{tmp_path}/hf")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": f"{tmp_path}/hf/hub",
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.3,
        "DOWNLOAD_CHUNK_SIZE": 1000,  # what a broken connection loses at most
    }
    for name, value in names.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield server
    server.close()
