"""As much of the Hub as a publication needs, on this machine: repositories, commits, large files, failures."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "s3cret" * 6
LARGE = (".safetensors", ".png")
"""What the Hub stores by its hash, beside git."""


@dataclass
class Commit:
    files: dict[str, bytes]
    summary: str = "initial commit"

    @property
    def sha(self) -> str:
        listed = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()})
        return hashlib.sha1((self.summary + listed).encode()).hexdigest()


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit({".gitattributes": b""})]})
    card: dict[str, Any] = field(default_factory=dict)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.branches[branch][-1].files


@dataclass
class Failure:
    """What happens to the next requests whose method and path fit."""

    pattern: str
    status: int | None = None
    """None drops the connection ..."""
    message: str = ""
    after_work: bool = False
    """... after the work was done."""
    times: int = 1


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class FakeHub:
    """Knows one user, `me`, member of `team`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.endpoint = ""

    def fail(self, pattern: str, **how: Any) -> None:
        self.failures.append(Failure(pattern, **how))

    def count(self, pattern: str) -> int:
        """How many requests came that fit."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def failure_of(self, request: str) -> Failure | None:
        for failure in self.failures:
            if failure.times > 0 and re.search(failure.pattern, request):
                failure.times -= 1
                return failure
        return None

    # --- what it answers ---

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Any:
        if method == "PUT" and path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != path[5:]:
                raise RefusedError(400, "not what the hash says")
            self.objects[path[5:]] = body
            return {}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if method == "GET" and (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)):
            return self.info(found[1], found[2] or "main", token)
        if token != TOKEN:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return {"name": "me", "orgs": [{"name": "team"}]}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path):
            act = {"branch": self.branch, "preupload": self.preupload, "commit": self.commit}[found[2]]
            return act(found[1], found[3], body)
        raise RefusedError(404, f"no {method} {path} here")

    def info(self, repo: str, revision: str, token: str | None) -> Any:
        known = self.repos.get(repo)
        if known is None or (known.private and token != TOKEN):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if revision not in known.branches:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = known.branches[revision][-1]
        siblings = [{"rfilename": name} for name in head.files]
        private = known.private
        return {"id": repo, "sha": head.sha, "private": private, "siblings": siblings, "cardData": known.card}

    def create(self, asked: dict[str, Any]) -> Any:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.repos:
            raise RefusedError(409, "You already created this model repo")
        self.repos[repo] = Repository(private=asked.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{repo}"}

    def branch(self, name: str, branch: str, body: bytes) -> Any:
        self.repos[name].branches[branch] = list(self.repos[name].branches["main"])
        return {}

    def preupload(self, repo: str, revision: str, body: bytes) -> Any:
        """How each file is to come, and by which hash it is there already."""
        answers: list[dict[str, Any]] = []
        for file in json.loads(body)["files"]:
            name, large = file["path"], file["path"].endswith(LARGE)
            here = self.repos[repo].files(revision).get(name)
            oid = None
            if here is not None:
                git = hashlib.sha1(b"blob %d\0" % len(here) + here).hexdigest()
                oid = hashlib.sha256(here).hexdigest() if large else git
            mode = "lfs" if large else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, asked: dict[str, Any]) -> Any:
        def action(one: dict[str, Any]) -> dict[str, Any]:
            upload = {} if one["oid"] in self.objects else {
                "actions": {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}
            }  # fmt: skip
            return {**one, **upload}

        return {"transfer": "basic", "objects": [action(one) for one in asked["objects"]]}

    def commit(self, name: str, revision: str, body: bytes) -> Any:
        repo = self.repos[name]
        head, *operations = [json.loads(line) for line in body.splitlines()]
        tip = repo.branches[revision][-1]
        if head["value"].get("parentCommit", tip.sha) != tip.sha:
            raise RefusedError(412, "A commit has happened since")
        files = dict(tip.files)
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise RefusedError(400, f"unknown operation {other}")
        repo.branches[revision].append(Commit(files, head["value"]["summary"]))
        sha = repo.branches[revision][-1].sha
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{sha}", "commitOid": sha}


class _Handler(BaseHTTPRequestHandler):
    def _handle(self) -> None:
        hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = f"{self.command} {path}"
        hub.requests.append(request)
        failure = hub.failure_of(request)
        try:
            if failure is not None and failure.status is not None:
                raise RefusedError(failure.status, failure.message)
            if failure is None or failure.after_work:
                answer = hub.answer(self.command, path, body, token)
            if failure is not None:
                self.close_connection = True
                return
            self._send(200, answer)
        except RefusedError as refusal:
            self._send(refusal.status, {"error": refusal.message}, code=refusal.code)

    do_GET = do_POST = do_PUT = _handle  # noqa: N815

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _send(self, status: int, answer: Any, *, code: str = "") -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A Hub of one's own, as long as the block lasts."""
    hub = FakeHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.hub = hub  # type: ignore[attr-defined]
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
