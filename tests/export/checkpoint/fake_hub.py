"""A hub of one repository on this machine: as much of its interface as downloads ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


GATED = "owner/gated"  # lists its files, and gives none


@contextmanager
def serve(folder: Path, name: str) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    """The address, and what was asked of it: method, file, bytes that were sent."""
    asked: list[tuple[str, str, int]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].replace(
                f"/api/models/{GATED}", f"/api/models/{name}"
            )
            if path.endswith("/revision/gone"):
                self.answer(b"", 404, error="RevisionNotFound")
            elif path.startswith(f"/api/models/{name}/tree/"):
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": etag(p)}
                    for p in sorted(folder.iterdir())
                ]
                self.answer(json.dumps(files).encode())
            elif path.startswith(f"/api/models/{name}"):
                self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
            elif path.startswith("/api/models/"):
                self.answer(b"", 404, error="RepoNotFound")
            else:
                self.do_HEAD()

        def do_HEAD(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/{GATED}/resolve/"):
                self.answer(b"", 401, error="GatedRepo")
                return
            file = folder / path.rpartition("/")[2]
            if not path.startswith(f"/{name}/resolve/") or not file.is_file():
                self.answer(b"", 404)
                return
            data, status = file.read_bytes(), 200
            if (wanted := self.headers.get("range")) and self.command == "GET":
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                data, status = data[int(first) : int(last) + 1 if last else None], 206
            self.answer(data, status, etag(file))

        def answer(self, data: bytes, status: int = 200, tag: str = "", error: str = "") -> None:
            asked.append((self.command, self.path, len(data) if self.command == "GET" else 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
