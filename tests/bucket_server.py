"""A server of files in memory in a thread of the test process: S3's protocol, as s3fs speaks it, and plain HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlparse
from xml.sax.saxutils import escape

import pytest

from tests.servers import handling


@dataclass
class Files:
    """What a server serves, and how it fails."""

    content: dict[str, bytes] = field(default_factory=dict)
    """Files by bucket/key."""
    num_drops: int = 0
    """Requests whose connection is closed before an answer."""
    with_tags: bool = True
    """False: answers have no ETag."""
    with_ranges: bool = True
    """False: requests for a part of a file are answered with all of it."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and range of each request."""
    address: str = ""


@contextmanager
def serving(files: Files) -> Iterator[Files]:
    """Serve files; the address stands in `files`."""
    with handling(type("Handler", (_Handler,), {"files": files})) as address:
        files.address = address
        yield files


@contextmanager
def found_by_s3fs(files: Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let s3:// lead to a server; requests are not repeated by s3fs itself."""
    import s3fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1", "AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none",
        "AWS_ENDPOINT_URL": files.address,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    yield
    s3fs.S3FileSystem.clear_instance_cache()


class _Handler(BaseHTTPRequestHandler):
    files: ClassVar[Files]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_content: bool) -> None:
        url = urlparse(self.path)
        name, query = unquote(url.path).strip("/"), parse_qs(url.query)
        self.files.requests.append((self.command, self.path, self.headers["Range"]))
        if self.files.num_drops:
            self.files.num_drops -= 1
            self.close_connection = True
            self.connection.shutdown(2)
        elif "list-type" in query:
            listing = _listing(self.files.content, name, query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
            self._send(200, listing.encode(), {"Content-Type": "application/xml"})
        elif not with_content and any(one.startswith(f"{name}/") for one in self.files.content) and "/" not in name:
            self._send(200, b"", {})  # HeadBucket
        elif name not in self.files.content:
            self._send(404, b"" if not with_content else b"<Error><Code>NoSuchKey</Code></Error>", {})
        else:
            self._send_file(self.files.content[name], with_content=with_content)

    def _send_file(self, content: bytes, *, with_content: bool) -> None:
        headers = {"Accept-Ranges": "bytes", "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT"}
        if self.files.with_tags:
            headers["ETag"] = f'"{hashlib.md5(content).hexdigest()}"'
        status, total = 200, len(content)
        if (wanted := self.headers["Range"]) and self.files.with_ranges:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            status, content = 206, content[int(start) : int(end) + 1 if end else None]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(content) - 1}/{total}"
        self._send(status, content, headers, with_content=with_content)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, with_content: bool = True) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_content and self.command != "HEAD":
            self.wfile.write(content)


def _listing(content: dict[str, bytes], bucket: str, prefix: str, delimiter: str) -> str:
    """Return the answer to ListObjectsV2."""
    keys, folders = list[str](), set[str]()
    for name in sorted(content):
        key = name.removeprefix(f"{bucket}/")
        if not name.startswith(f"{bucket}/") or not key.startswith(prefix):
            continue
        folder, inside, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if inside:
            folders.add(f"{prefix}{folder}{delimiter}")
        else:
            keys.append(key)
    entries = [
        f"<Contents><Key>{escape(key)}</Key><Size>{len(content[f'{bucket}/{key}'])}</Size>"
        f'<ETag>"{hashlib.md5(content[f"{bucket}/{key}"]).hexdigest()}"</ETag>'
        f"<LastModified>2026-11-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
        for key in keys
    ]
    entries += [f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders)]
    return (
        f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
        f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(entries)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>"
    )
