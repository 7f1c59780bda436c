"""A stand-in of the hub on this machine: what its client calls to create, upload and load a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_loopback"
LFS = (".safetensors", "tokenizer.json")  # large files, and one that is not


@dataclass
class Repo:
    """Files by path, and what was said of each commit."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(len(self.summaries)).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The endpoints of the hub that creating, uploading and loading a model call; others are noted as unknown."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}/blobs"  # of another host, to the client
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.asked: list[str] = []
        self.unknown: list[str] = []
        self.refuse: tuple[str, int] | None = None  # what requests of the path that holds this are answered


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body, path, hub = self._body(), self.path.split("?")[0], self.server
        hub.asked.append(f"{self.command} {path}")
        if hub.refuse is not None and hub.refuse[0] in path:
            return self._send(hub.refuse[1], {"error": "no, says the stand-in"})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.command in ("POST", "PUT") and not path.startswith("/blobs/") and token != TOKEN:
            return self._send(401, {"error": "Invalid username or password."})
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None and self.command in method:
                name = found.groupdict().get("repo")
                if name is None:
                    return answer(self, body, **found.groupdict())
                repo = hub.repos.get(name)
                if repo is None or (repo.private and token != TOKEN):
                    return self._send(404 if token == TOKEN else 401, {"error": "x"}, {"X-Error-Code": "RepoNotFound"})
                if found.groupdict().get("revision", "main") not in ("main", repo.commit):
                    return self._send(404, {"error": "x"}, {"X-Error-Code": "RevisionNotFound"})
                return answer(self, body, **{**found.groupdict(), "repo": repo})
        hub.unknown.append(f"{self.command} {path}")
        return self._send(404, {"error": "unknown"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, Repo(asked["visibility"] == "private"))
        self._send(status, {"url": f"{self.server.url}/{name}"})

    def preupload(self, body: bytes, repo: Repo, revision: str) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        files = [
            {"path": p, "uploadMode": "lfs" if p.endswith(LFS) else "regular", "shouldIgnore": False} for p in paths
        ]
        self._send(200, {"files": files})

    def batch(self, body: bytes, repo: Repo) -> None:
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.server.blobs:
                place = f"{self.server.storage}/{one['oid']}"
                one["actions"] = {"upload": {"href": place}, "verify": {"href": f"{self.server.url}/verify"}}
        self._send(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        right = hashlib.sha256(body).hexdigest() == oid
        if right:
            self.server.blobs[oid] = body
        self._send(200 if right else 400)

    def get_blob(self, body: bytes, oid: str) -> None:
        self._send(200, self.server.blobs[oid])

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        self.server.verified.add(asked["oid"])
        self._send(200 if len(self.server.blobs[asked["oid"]]) == asked["size"] else 400, {})

    def commit(self, body: bytes, repo: Repo, revision: str) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert operation["key"] == "lfsFile"
                repo.files[value["path"]] = self.server.blobs[value["oid"]]
        repo.summaries.append(header["value"]["summary"])
        self._send(200, {"commitUrl": f"{self.server.url}/x/x/commit/{repo.commit}", "commitOid": repo.commit})

    def info(self, body: bytes, repo: Repo, revision: str = "main") -> None:
        siblings = [{"rfilename": path} for path in repo.files]
        self._send(200, {"id": "x", "sha": repo.commit, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: Repo, revision: str, under: str | None) -> None:
        if under:  # no model here has folders
            return self._send(404, {"error": "x"}, {"X-Error-Code": "EntryNotFound"})
        files = [
            {"type": "file", "path": p, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for p, data in repo.files.items()
        ]
        return self._send(200, files)

    def resolve(self, body: bytes, repo: Repo, revision: str, path: str) -> None:
        data, headers = repo.files.get(path), {"X-Repo-Commit": repo.commit}
        if data is None:
            return self._send(404, {"error": "x"}, {**headers, "X-Error-Code": "EntryNotFound"})
        if not path.endswith(LFS):
            return self._send(200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.server.blobs[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return self._send(302, b"", {**headers, **linked, "Location": f"{self.server.storage}/{oid}"})


_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", Answer.create),
    ("POST", _MODEL + "/preupload/(?P<revision>.+)", Answer.preupload),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Answer.batch),
    ("PUT", "/blobs/(?P<oid>.+)", Answer.put_blob),
    ("GET HEAD", "/blobs/(?P<oid>.+)", Answer.get_blob),
    ("POST", "/verify", Answer.verify),
    ("POST", _MODEL + "/commit/(?P<revision>.+)", Answer.commit),
    ("GET", _MODEL + "(/revision/(?P<revision>.+))?", Answer.info),
    ("GET", _MODEL + "/tree/(?P<revision>[^/]+)(/(?P<under>.+))?", Answer.tree),
    ("GET HEAD", "/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Answer.resolve),
]
