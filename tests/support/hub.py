"""A stand-in of the Hugging Face hub on loopback: what huggingface_hub asks for when a model is published.

It keeps repositories in memory, counts the bytes of large files that it receives, and can be told to cut the
connection in the middle of an upload, or to refuse requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "StandInForTests" * 2
LARGE = (".safetensors", ".sums")  # what the hub keeps as large files, whatever their size
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """One repository: the files of each branch, and the large files that any commit may name."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their summaries


class StandInHub:
    """A hub whose only user is `owner`, with the token TOKEN; use it as a context."""

    def __init__(self, owner: str = "ours", *, role: str = "write", part_bytes: int = 1 << 40):
        self.owner, self.role, self.part_bytes = owner, role, part_bytes
        self.orgs: list[str] | None = ["our-lab"]  # None: not a word of them
        self.repos: dict[str, Repo] = {}
        self.received: Counter[str] = Counter()  # bytes of large files by SHA-256, those of broken uploads too
        self.asked: list[str] = []  # "METHOD /path" of each request
        self.refusals: dict[str, tuple[int, str]] = {}  # part of "METHOD /path" -> status and words
        self.warning = ""  # sent with every answer
        self.cuts: dict[str, int] = {}  # SHA-256 -> bytes of each upload of it after which the connection is cut
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to publish here. Xet's service has no stand-in."""
        known = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN}
        return known | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch but for the one that every repository begins with."""
        return {name: data for name, data in self.repos[repo].branches[branch].items() if name != ".gitattributes"}

    def serve_library(self, monkeypatch: Any) -> None:
        """Points the huggingface_hub of this very process here, whose waits between two tries take no time."""
        from huggingface_hub import constants
        from huggingface_hub.utils import _http

        settings = {"ENDPOINT": self.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
        settings |= {"HUGGINGFACE_CO_URL_TEMPLATE": f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        for name, text in self.environment.items():
            monkeypatch.setenv(name, text)


class Handler(BaseHTTPRequestHandler):
    """One connection; `hub` is what all share."""

    hub: StandInHub
    protocol_version = "HTTP/1.1"
    routes = (  # method, pattern of the path, name of the method that answers
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/agent-harnesses", "nothing"),  # which the library asks for once a process
        ("GET", rf"/api/models/{REPO}(/revision/(?P<branch>[^/]+))?", "info"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<branch>[^/]+)", "tree"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "make_branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<branch>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<branch>[^/]+)", "commit"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", rf"/store/{REPO}/(?P<oid>\w+)", "store"),
        ("PUT", rf"/store/{REPO}/(?P<oid>\w+)/(?P<part>\d+)", "store_part"),
        ("POST", rf"/store/{REPO}/(?P<oid>\w+)/complete", "complete"),
        ("POST", rf"/store/{REPO}/(?P<oid>\w+)/verify", "verify"),
        ("HEAD", rf"/{REPO}/resolve/(?P<branch>[^/]+)/(?P<file>.+)", "resolve"),
        ("GET", rf"/{REPO}/resolve/(?P<branch>[^/]+)/(?P<file>.+)", "resolve"),
    )

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        """Answers any request: what is refused, unknown or unauthorised first."""
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.query = parse_qs(urlsplit(self.path).query)
        with self.hub.lock:
            self.hub.asked.append(request)
        large = self.command == "PUT"
        self.body = b"" if large else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, (status, words) in self.hub.refusals.items():
            if part in request:
                self.rfile.read(int(self.headers.get("Content-Length") or 0) if large else 0)
                return self.answer({"error": words}, status, {"X-Error-Message": " ".join(words.split())})
        if not large and self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/store/" not in path:
            return self.answer({"error": "Invalid username or password."}, 401)
        for method, pattern, name in self.routes:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                if "repo" in match.groupdict() and match["repo"] not in self.hub.repos:
                    return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return getattr(self, name)(**match.groupdict())
        self.answer({"error": f"the stand-in knows no {request}"}, 501)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json"} | (headers or {})
        headers |= {"X-HF-Warning": self.hub.warning} if self.hub.warning else {}
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self) -> None:
        """Ends the connection as a broken network does, without a word."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def receive(self, oid: str) -> bytes | None:
        """The body of an upload; None where the connection was cut in the middle of it."""
        left, pieces, until = int(self.headers["Content-Length"]), [], self.hub.cuts.get(oid)
        while left:
            piece = self.rfile.read(min(left, 4096))
            with self.hub.lock:
                self.hub.received[oid] += len(piece)
            pieces.append(piece)
            left -= len(piece)
            if not piece or (until is not None and sum(map(len, pieces)) >= until):
                self.cut()
                return None
        return b"".join(pieces)

    def whoami(self) -> None:
        auth = {"accessToken": {"role": self.hub.role}}
        orgs = {} if self.hub.orgs is None else {"orgs": [{"name": name} for name in self.hub.orgs]}
        self.answer({"type": "user", "name": self.hub.owner, "auth": auth} | orgs)

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked["organization"] or self.hub.owner
        name = f"{owner}/{asked['name']}"
        if owner not in (self.hub.owner, "our-lab"):
            return self.answer({"error": f"You have no rights in {owner}"}, 403)
        if name in self.hub.repos:
            return self.answer({"error": "You already created this repo", "url": f"{self.hub.url}/{name}"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private)
        self.answer({"url": f"{self.hub.url}/{name}"})

    def nothing(self) -> None:
        self.answer({})

    def info(self, repo: str, branch: str | None) -> None:
        self.answer({"id": repo, "private": self.hub.repos[repo].private, "sha": "0" * 40, "tags": [], "siblings": []})

    def tree(self, repo: str, branch: str) -> None:
        files = self.hub.repos[repo].branches[branch]
        self.answer([{"type": "file", "path": n, "size": len(d), "oid": git_hash(d)} for n, d in files.items()])

    def make_branch(self, repo: str, branch: str) -> None:
        branches = self.hub.repos[repo].branches
        if branch in branches:
            return self.answer({"error": "Reference already exists"}, 409)
        branches[branch] = dict(branches["main"])
        self.answer({})

    def preupload(self, repo: str, branch: str) -> None:
        files, answers = self.hub.repos[repo].branches[branch], []
        for asked in json.loads(self.body)["files"]:
            large, data = asked["path"].endswith(LARGE), files.get(asked["path"])
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else git_hash(data)
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append({"path": asked["path"], "oid": oid} | mode)
        self.answer({"files": answers})

    def batch(self, repo: str) -> None:
        answers = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            at, found = f"{self.hub.url}/store/{repo}/{oid}", {"oid": oid, "size": size}
            if oid not in self.hub.repos[repo].objects:
                upload: dict[str, Any] = {"href": at}
                if size > self.hub.part_bytes:
                    count = -(-size // self.hub.part_bytes)
                    urls = {str(number): f"{at}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{at}/complete", "header": {"chunk_size": str(self.hub.part_bytes), **urls}}
                found["actions"] = {"upload": upload, "verify": {"href": f"{at}/verify"}}
            answers.append(found)
        self.answer({"transfer": "basic", "objects": answers})

    def store(self, repo: str, oid: str) -> None:
        if (data := self.receive(oid)) is not None:
            self.keep(repo, oid, data)

    def store_part(self, repo: str, oid: str, part: str) -> None:
        if (data := self.receive(oid)) is not None:
            self.hub.parts.setdefault(oid, {})[int(part)] = data
            self.answer({}, headers={"ETag": f"{oid[:8]}-{part}"})

    def complete(self, repo: str, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        named = [f"{oid[:8]}-{number}" for number in sorted(parts)]
        assert [part["etag"] for part in json.loads(self.body)["parts"]] == named
        self.keep(repo, oid, b"".join(parts[number] for number in sorted(parts)))

    def keep(self, repo: str, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer({"error": "these bytes have another SHA-256"}, 400)
        self.hub.repos[repo].objects[oid] = data
        self.answer({})

    def verify(self, repo: str, oid: str) -> None:
        self.answer({}, 200 if oid in self.hub.repos[repo].objects else 404)

    def commit(self, repo: str, branch: str) -> None:
        kept = self.hub.repos[repo]
        files = dict(kept.branches[branch])
        (_, header), *operations = [tuple(json.loads(line).values()) for line in self.body.splitlines()]
        for kind, value in operations:
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in kept.objects:
                files[value["path"]] = kept.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                return self.answer({"error": f"no such object: {value}"}, 400)
        kept.branches[branch] = files
        kept.commits.append(header["summary"])
        oid = hashlib.sha1(self.body).hexdigest()
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})

    def resolve(self, repo: str, branch: str, file: str) -> None:
        data = self.hub.repos[repo].branches.get(branch, {}).get(file)
        if data is None:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        self.answer(data, headers={"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": "0" * 40})


def git_hash(data: bytes) -> str:
    """What git knows a file by."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
