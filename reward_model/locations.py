"""Files on this machine, and in buckets through fsspec, which are read by ranges and never copied.

A bucket may drop a connection: every request is tried several times, and then named with its file.
"""

# fsspec has no usable types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec

NUM_TRIES = 5
"""Requests for the same bytes before a bucket is given up."""
_FIRST_WAIT = 0.5
"""Seconds before the second try; they double with each."""
_BLOCK = 1 << 22
"""Bytes that are requested at once when a file is read from its start to its end."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Answers that another request would not change."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BucketPath:
    """A file or folder of a bucket, such as s3://bucket/pairs.jsonl, with the methods of a `Path` that readers use."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The part behind the last slash."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, such as .jsonl."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> BucketPath:
        """The folder that the file is in."""
        return BucketPath(self.url.rstrip("/").rpartition("/")[0])

    @property
    def is_http(self) -> bool:
        """True for an address of a web server, which has files but no folders to list."""
        return self.url.startswith(("http://", "https://"))

    def is_file(self) -> bool:
        """Return whether there is a file of this name."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Return whether there is anything in a folder of this name; of a web server, which does not know, True."""
        return self.is_http or self._kind() == "directory"

    def size(self) -> int:
        """Return the number of bytes of the file."""
        size = self._ask(_info)["size"]
        if size is None:
            raise ValueError(f"{self.url} has no size: its server does not state a Content-Length. Download it.")
        return int(size)

    def version(self) -> str:
        """Return a text that changes when the file is replaced: its ETag, generation or time of change."""
        if self.is_http:  # fsspec's own is one of the address
            info = self._ask(_info)
            return str([info.get(key) for key in ("ETag", "Last-Modified", "Content-MD5", "Digest", "size")])
        return self._ask(lambda system, path: str(system.ukey(path)))

    def _kind(self) -> str | None:
        # isfile and isdir take a lost connection for a missing file.
        try:
            return self._ask(_info)["type"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self) -> dict[str, int]:
        """Return the name and the number of bytes of each file in the folder."""
        found = self._ask(lambda system, path: system.ls(path, detail=True))
        files = [one for one in found if one["type"] == "file"]
        return {str(one["name"]).rpartition("/")[2]: int(one["size"] or 0) for one in files}

    def iterdir(self) -> Iterator[BucketPath]:
        """Yield the files in the folder."""
        yield from (self / name for name in self.sizes())

    def read_range(self, start: int, size: int) -> bytes:
        """Return `size` bytes from byte `start` on, fewer at the end of the file."""
        if size <= 0:
            return b""
        content = self._ask(lambda system, path: bytes(system.cat_file(path, start=start, end=start + size)))
        if len(content) > size:
            raise ValueError(f"{self.url} cannot be read by ranges of bytes: its server sends all of it. Download it.")
        return content

    def read_bytes(self) -> bytes:
        """Return the content of the file."""
        return self.read_range(0, self.size())

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for reading."""
        assert mode == "rb"
        return io.BufferedReader(_RangeReader(self), _BLOCK)

    def _ask(self, question: Callable[[Any, str], T]) -> T:
        """Return the answer of a bucket, asked several times if it fails; ValueError, naming the file, in the end."""
        since = time.monotonic()
        try:
            fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # a library that is not installed, an unknown protocol
            raise ValueError(f"{self.url} cannot be read: {error}.") from error
        for left in reversed(range(NUM_TRIES)):
            try:
                # Looked up each time: a file system is not to be used by a process that was forked from its own.
                system, path = fsspec.core.url_to_fs(self.url)
                return question(system, path)
            except _FINAL:
                raise
            # Of the dozen libraries behind fsspec, each has its own errors for a lost connection.
            except Exception as error:
                if not left:
                    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    raise ConnectionError(
                        f"{self.url} could not be read in {NUM_TRIES} tries within {time.monotonic() - since:.0f} s: "
                        f"{what}. Check the connection and the access, then start again."
                    ) from error
                time.sleep(_FIRST_WAIT * 2 ** (NUM_TRIES - 1 - left))
        raise AssertionError


def _info(system: Any, path: str) -> dict[str, Any]:
    """Return type, size and more of a file or folder. Raises FileNotFoundError if there is none."""
    try:
        return system.info(path)
    except FileNotFoundError as error:
        # fsspec calls whatever a web server answers, and a lost connection too, a missing file.
        cause = error.__cause__
        if path.startswith("http") and cause is not None and (status := getattr(cause, "status", None)) != 404:
            if status in (401, 403):
                raise PermissionError(f"{path} may not be read: {cause}.") from error
            raise OSError(f"{type(cause).__name__}: {cause}") from error
        raise


class _RangeReader(io.RawIOBase):
    """The bytes of a file in a bucket, requested when they are read."""

    def __init__(self, path: BucketPath) -> None:
        self._path, self._size, self._at = path, path.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._at))
        found = self._path.read_range(self._at, wanted)
        if len(found) < wanted:
            raise ValueError(
                f"{self._path} has {self._at + len(found):,} bytes and had {self._size:,}; it has changed."
            )
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


Location = Path | BucketPath


def is_in_bucket(path: object) -> bool:
    """Return whether a path is of a bucket: PROTOCOL://REST."""
    return "://" in str(path)


def is_of_hub(source: object) -> bool:
    """Return whether a source is hf:ID@SPLIT, a data set of the Hub; hf://... is a file there, as of any bucket."""
    return str(source).startswith("hf:") and not is_in_bucket(source)


def location(path: str | Path | BucketPath) -> Location:
    """Return a path of this machine or of a bucket."""
    if isinstance(path, BucketPath):
        return path
    return BucketPath(str(path)) if is_in_bucket(path) else Path(path)


def num_bytes(path: Location) -> int:
    """Return the number of bytes of a file."""
    return path.size() if isinstance(path, BucketPath) else path.stat().st_size


@lru_cache(maxsize=4096)
def version_in_bucket(url: str) -> str:
    """Return the version of a file of a bucket, which is asked for once in a process."""
    return BucketPath(url).version()
