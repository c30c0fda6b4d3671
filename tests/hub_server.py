"""A small Hub on the loopback interface: the routes that pushing and loading a model use, kept in memory.

It has real histories, checks the token of every write and the hash of every large file, and can be told to
fail. Not there: deleting files, xet, pull requests, gated repositories, data sets and spaces.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class Commit:
    message: str
    files: dict[str, bytes]
    parent: str = ""

    @property
    def oid(self) -> str:
        digests = {name: hashlib.sha1(data).hexdigest() for name, data in self.files.items()}
        return hashlib.sha1(json.dumps([self.parent, self.message, digests]).encode()).hexdigest()


@dataclass
class Repo:
    name: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        for commit in (commit for history in self.branches.values() for commit in history):
            if commit.oid == revision:
                return commit
        raise RefusedError(404, "RevisionNotFound")


class BrokenLineError(Exception):
    """The connection ends after half of this answer, or without any."""

    def __init__(self, headers: dict[str, str] | None = None, payload: bytes = b""):
        super().__init__()
        self.headers, self.payload = headers, payload


class RefusedError(Exception):
    def __init__(self, status: int, code: str = "", **details: str):
        super().__init__(status, code)
        self.status, self.code, self.details = status, code, details


def blob_id(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Runs inside `with`; `requests`, `repos` and `commits` tell afterwards what reached it."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failing: dict[str, int] = {}
        self.cut: set[str] = set()
        self.wrong_etags = False
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Variables that send another process here; huggingface_hub reads them when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """History without the commit that creating a repository makes."""
        return self.repos[repo_id].branches[branch][1:]

    def fail(self, route: str, status: int = 500) -> None:
        """Answer every request to a route, such as "commit", with this status."""
        self.failing[route] = status

    def cut_downloads(self) -> None:
        """Break connections in the middle of every file."""
        self.cut = {"resolve"}

    def cut_uploads(self) -> None:
        """Break connections at every large file that arrives."""
        self.cut = {"upload"}

    def lie_about_etags(self) -> None:
        """Send tags that are not those of the files."""
        self.wrong_etags = True

    def behave(self) -> None:
        """Do everything right again."""
        self.failing, self.cut, self.wrong_etags = {}, set(), False

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[dict[str, str], bytes]:
        with self._lock:
            self.requests.append((method, path))
            for verbs, pattern, name in ROUTES:
                match = re.fullmatch(pattern, path) if method in verbs.split() else None
                if match is None:
                    continue
                if name in self.failing:
                    raise RefusedError(self.failing[name])
                if method == "POST" and token != TOKEN:
                    raise RefusedError(401)
                parts = {key: unquote(value) for key, value in match.groupdict(default="main").items()}
                repo = None
                if "repo" in parts and (repo := self.repos.get(parts.pop("repo"))) is None:
                    raise RefusedError(404, "RepoNotFound")
                if name in self.cut and name == "upload":
                    raise BrokenLineError
                result = getattr(self, f"_{name}")(repo, body, **parts)
                if name in self.cut and len(result[1]) > 1000:
                    raise BrokenLineError(*result)
                return result if isinstance(result, tuple) else ({}, json.dumps(result).encode())
        raise RefusedError(404)

    def _create(self, _: None, body: bytes) -> Any:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo_id in self.repos:
            raise RefusedError(409, url=f"{self.url}/{repo_id}")
        first = Commit("initial commit", {".gitattributes": b""})
        self.repos[repo_id] = Repo(repo_id, wanted.get("visibility") == "private", {"main": [first]})
        return {"url": f"{self.url}/{repo_id}", "id": repo_id}

    def _branch(self, repo: Repo, body: bytes, revision: str) -> Any:
        if revision in repo.branches:
            raise RefusedError(409)
        start = repo.find(json.loads(body or b"{}").get("startingPoint", "main"))
        repo.branches[revision] = [start]
        return {}

    def _info(self, repo: Repo, _: bytes, revision: str) -> Any:
        commit = repo.find(revision)
        files = [{"rfilename": file} for file in commit.files]
        return {"id": repo.name, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": files}

    def _preupload(self, repo: Repo, body: bytes, revision: str) -> Any:
        there = repo.find(revision).files
        return {
            "files": [
                {
                    "path": (path := file["path"]),
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": blob_id(path, there[path]) if path in there else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, _: Repo, body: bytes) -> Any:
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(body)["objects"]]
        for item in objects:
            # An object that is there already must have no "actions" at all.
            if item["oid"] not in self.blobs:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _upload(self, _: None, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400)
        self.blobs[oid] = body
        return {}

    def _validate(self, _: None, __: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def _commit(self, repo: Repo, body: bytes, revision: str) -> Any:
        parent = repo.find(revision)
        files, message = dict(parent.files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                raise RefusedError(501)
        commit = Commit(message, files, parent.oid)
        repo.branches[revision].append(commit)
        return {
            "commitUrl": f"{self.url}/{repo.name}/commit/{commit.oid}",
            "commitOid": commit.oid,
            "success": True,
        }

    def _tree(self, repo: Repo, _: bytes, revision: str) -> Any:
        entries = []
        for name, data in repo.find(revision).files.items():
            entry = {"type": "file", "path": name, "size": len(data), "oid": blob_id(name, data)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": entry["oid"], "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def _resolve(self, repo: Repo, _: bytes, revision: str, file: str) -> Any:
        commit = repo.find(revision)
        if file not in commit.files:
            raise RefusedError(404, "EntryNotFound")
        data = commit.files[file]
        tag = blob_id(file, data)[:: -1 if self.wrong_etags else 1]
        return {"ETag": f'"{tag}"', "X-Repo-Commit": commit.oid}, data


_REPO, _REVISION = "(?P<repo>[^/]+/[^/]+?)", "(?P<revision>[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", "branch"),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", "tree"),
    ("GET", f"/api/models/{_REPO}(?:/revision/{_REVISION})?", "info"),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            status = 200
            headers, payload = self.hub.answer(self.command, urlsplit(self.path).path, body, token)
        except BrokenLineError as line:
            if line.headers is not None:
                self.send_response(200)
                for name, value in {**line.headers, "Content-Length": str(len(line.payload))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(line.payload[: len(line.payload) // 2])
            self.close_connection = True
            self.connection.close()
            return
        except RefusedError as refusal:
            status, payload = refusal.status, json.dumps({"error": "refused", **refusal.details}).encode()
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(payload))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output quiet."""
