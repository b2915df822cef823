"""A fake Hugging Face Hub on this machine: repositories, commits, large files, and failures on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "s3cret" * 6
LARGE = (".safetensors", ".png")
"""Suffixes of files that the Hub stores by their SHA-256 instead of in git."""


@dataclass
class Commit:
    files: dict[str, bytes]
    summary: str = "initial commit"

    @property
    def sha(self) -> str:
        listed = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()})
        return hashlib.sha1((self.summary + listed).encode()).hexdigest()


@dataclass
class Download:
    data: bytes
    commit: str


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit({".gitattributes": b""})]})
    card: dict[str, Any] = field(default_factory=dict)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.branches[branch][-1].files


@dataclass
class Failure:
    """A failure of the next requests whose method and path match a pattern."""

    pattern: str
    status: int | None = None
    """HTTP status of the answer; None drops the connection."""
    message: str = ""
    after_work: bool = False
    """True if the request takes effect before the failure."""
    times: int = 1
    meanwhile: Callable[[], object] | None = None
    """Called before the request takes effect; the request then succeeds."""


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class FakeHub:
    """A Hub with one user, `me`, who belongs to the organisation `team`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.endpoint = ""

    def fail(self, pattern: str, **how: Any) -> None:
        self.failures.append(Failure(pattern, **how))

    def count(self, pattern: str) -> int:
        """Number of requests that match."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def failure_of(self, request: str) -> Failure | None:
        for failure in self.failures:
            if failure.times > 0 and re.search(failure.pattern, request):
                failure.times -= 1
                return failure
        return None

    # --- answers ---

    def answer(self, request: str, body: bytes, token: str | None) -> Any:
        """Answer with the first route that matches; routes with a star need the token."""
        known = token == TOKEN
        for pattern, act in {
            r"PUT /lfs/(.+)": lambda oid: self.store(oid, body),
            r"POST /api/validate-yaml": lambda: {"errors": [], "warnings": []},
            r"GET /api/models/([^/]+/[^/]+)": lambda repo: self.info(repo, "main", known),
            r"GET /api/models/([^/]+/[^/]+)/revision/(.+)": lambda repo, at: self.info(repo, at, known),
            r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)": lambda repo, at: self.tree(repo, at, known),
            r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": lambda repo, at, name: self.file(
                repo, at, name, known
            ),
            r"* GET /api/whoami-v2": lambda: {"name": "me", "orgs": [{"name": "team"}]},
            r"* POST /api/repos/create": lambda: self.create(json.loads(body)),
            r"* POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": lambda repo: self.batch(json.loads(body)),
            r"* POST /api/models/([^/]+/[^/]+)/branch/(.+)": self.branch,
            r"* POST /api/models/([^/]+/[^/]+)/preupload/(.+)": lambda repo, at: self.preupload(
                repo, at, json.loads(body)
            ),
            r"* POST /api/models/([^/]+/[^/]+)/commit/(.+)": lambda repo, at: self.commit(repo, at, body),
        }.items():
            if found := re.fullmatch(pattern.removeprefix("* "), request):
                if pattern.startswith("* ") and not known:
                    raise RefusedError(401, "Invalid credentials in Authorization header")
                return act(*found.groups())
        raise RefusedError(404, f"no {request} here")

    def store(self, oid: str, data: bytes) -> Any:
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusedError(400, "the content does not match its hash")
        self.objects[oid] = data
        return {}

    def head(self, repo: str, revision: str, known: bool) -> Commit:
        """Head of a branch, or the commit with a hash."""
        if repo not in self.repos or (self.repos[repo].private and not known):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        branches = self.repos[repo].branches
        named = {commit.sha: commit for commits in branches.values() for commit in commits}
        named |= {branch: commits[-1] for branch, commits in branches.items()}
        if revision not in named:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return named[revision]

    def info(self, repo: str, revision: str, known: bool) -> Any:
        head, own = self.head(repo, revision, known), self.repos[repo]
        siblings = [{"rfilename": name} for name in head.files]
        return {"id": repo, "sha": head.sha, "private": own.private, "siblings": siblings, "cardData": own.card}

    def tree(self, repo: str, revision: str, known: bool) -> Any:
        files = self.head(repo, revision, known).files
        return [
            {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)} for name, data in files.items()
        ]

    def file(self, repo: str, revision: str, name: str, known: bool) -> Download:
        commit = self.head(repo, revision, known)
        if name not in commit.files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        return Download(commit.files[name], commit.sha)

    def create(self, request: dict[str, Any]) -> Any:
        repo = f"{request['organization']}/{request['name']}"
        if repo in self.repos:
            raise RefusedError(409, "You already created this model repo")
        self.repos[repo] = Repository(private=request.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{repo}"}

    def branch(self, repo: str, branch: str) -> Any:
        self.repos[repo].branches[branch] = list(self.repos[repo].branches["main"])
        return {}

    def preupload(self, repo: str, revision: str, request: dict[str, Any]) -> Any:
        """Upload mode of each file, and the hash of the version that the repository holds."""
        answers: list[dict[str, Any]] = []
        for file in request["files"]:
            name, large = file["path"], file["path"].endswith(LARGE)
            here = self.repos[repo].files(revision).get(name)
            oid = None
            if here is not None:
                oid = hashlib.sha256(here).hexdigest() if large else git_hash(here)
            mode = "lfs" if large else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, request: dict[str, Any]) -> Any:
        def action(item: dict[str, Any]) -> dict[str, Any]:
            href = {"href": f"{self.endpoint}/lfs/{item['oid']}"}
            return item if item["oid"] in self.objects else {**item, "actions": {"upload": href}}

        return {"transfer": "basic", "objects": [action(item) for item in request["objects"]]}

    def commit(self, repo: str, revision: str, body: bytes) -> Any:
        head, *operations = [json.loads(line) for line in body.splitlines()]
        commits = self.repos[repo].branches[revision]
        if head["value"].get("parentCommit", commits[-1].sha) != commits[-1].sha:
            raise RefusedError(412, "A commit has happened since")
        files = dict(commits[-1].files)
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
        commits.append(Commit(files, head["value"]["summary"]))
        return {"commitUrl": f"{self.endpoint}/{repo}/commit/{commits[-1].sha}", "commitOid": commits[-1].sha}


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
        if failure is not None and failure.meanwhile is not None:
            failure.meanwhile()
            failure = None
        try:
            if failure is not None and failure.status is not None:
                raise RefusedError(failure.status, failure.message)
            if failure is None or failure.after_work:
                answer = hub.answer(request, body, token)
            if failure is not None:
                self.close_connection = True
                return
            if isinstance(answer, Download):
                headers = {"X-Repo-Commit": answer.commit, "ETag": f'"{git_hash(answer.data)}"'}
                self._send(200, answer.data, headers)
            else:
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        except RefusedError as refusal:
            message = json.dumps({"error": refusal.message}).encode()
            self._send(refusal.status, message, {"X-Error-Code": refusal.code} if refusal.code else {})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Serve a new Hub until the block ends."""
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
