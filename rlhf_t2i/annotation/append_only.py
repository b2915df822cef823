"""A file of lines that only grows: a line is on disk when `append` returns, or the file is as before."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_t2i.output.files import flush


class AppendOnlyFile:
    """A file of lines, opened for appending; an incomplete last line, left by a crash, is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        as_bytes = getattr(os, "O_BINARY", 0)  # or Windows would write other ends of lines
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | as_bytes, 0o644)
        flush(path.parent)  # a new file survives a crash only if its folder is flushed too
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        self.truncated_line = content[end:]
        """The line that was removed; empty if there was none."""
        if self.truncated_line:
            os.ftruncate(self._file, end)
            os.fsync(self._file)

    def lines(self) -> list[bytes]:
        """Return all lines, without their ends."""
        return self.path.read_bytes().split(b"\n")[:-1]

    def append(self, line: bytes) -> None:
        """Write a line, its end included, to disk; if that fails, raise OSError with the file as before."""
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(f"The disk of {self.path} is full.")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
