"""A small server that speaks as much of the Hub's API as downloading and uploading a model takes, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves repositories from folders ``root/org/name`` and takes commits into them.

    ``requests``: method and path of all that was asked. ``cut_after``: if set, the next download of that many bytes or
    more ends there, as on a broken line.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[str] = []
        self.cut_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _not_found(self, code: str) -> None:
        self._json({"error": "not found"}, 404, X_Error_Code=code, X_Error_Message="not found")

    def _folder(self, repo: str) -> Path | None:
        folder = self.server.root / repo
        return folder if folder.is_dir() else None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)(?:/.*)?", path):
            self._list(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._list(found[1], "revision", "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[3])
        else:
            self._not_found("EntryNotFound")

    def _list(self, repo: str, what: str, revision: str) -> None:
        folder = self._folder(repo)
        if folder is None:
            self._not_found("RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._not_found("RevisionNotFound")
        else:
            names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            if what == "tree":
                sizes = ((folder / name).stat().st_size for name in names)
                pairs = zip(names, sizes, strict=True)
                self._json([{"type": "file", "path": n, "size": s, "oid": _etag(folder / n)} for n, s in pairs])
            else:
                siblings = [{"rfilename": name} for name in names]
                self._json({"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings})

    def _file(self, repo: str, name: str) -> None:
        folder = self._folder(repo)
        if folder is None or not (folder / name).is_file():
            self._not_found("EntryNotFound" if folder else "RepoNotFound")
            return
        content, start = (folder / name).read_bytes(), 0
        if (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) is not None:
            start = int(asked[1])
        headers = {"ETag": f'"{_etag(folder / name)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.server.cut_after
        if self.command == "GET" and cut is not None and len(content) - start >= cut:
            self.server.cut_after = None
            self.send_response(206 if start else 200)
            for header, value in {"Content-Length": str(len(content) - start), **headers}.items():
                self.send_header(header.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content[start : start + cut])
            self.close_connection = True
            return
        self._answer(206 if start else 200, content[start:], **headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (self.headers.get("Transfer-Encoding") or "") == "chunked":
            body = self._chunks()
        self.server.requests.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "", asked["name"])))
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self.server.url}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/preupload/", self.path):
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = self.server.root / found[1] / entry["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            self._json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._not_found("EntryNotFound")

    def _chunks(self) -> bytes:
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """A server of the repositories below a folder, while the block runs."""
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
