"""Splitting of a JSON file that is one list into its elements, of which only the one at hand is in memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

MAX_ELEMENT = 64 * 2**20
"""Longest element in characters. A file with holes can claim any length at no cost."""
_CHUNK = 2**20
"""Bytes that are read at once; for an element beyond them, as many as it has so far."""
_BLANKS = " \t\r\n"


class JSONListError(ValueError):
    """A file that is no JSON list, with line and column."""


def split_list(file: BinaryIO) -> Iterator[str]:
    """Yield the source of every element of a JSON list; the syntax is checked, numbers are not converted.

    Raises JSONListError for other text, UnicodeDecodeError for other bytes than UTF-8, with the byte in the file, and
    RecursionError for values that are nested too deeply.
    """
    text = _Text(file)
    if text.next() != "[":
        raise text.error(json.JSONDecodeError("Expecting '['", text.buffer, text.at))
    text.at += 1
    closed = text.next() == "]"
    while not closed:
        yield text.element()
        closed = text.next() == "]"
        if not closed:
            if text.next() != ",":
                raise text.error(json.JSONDecodeError("Expecting ',' or ']'", text.buffer, text.at))
            text.at += 1
            text.next()
    text.at += 1
    if text.next():
        raise text.error(json.JSONDecodeError("Expecting the end of the file", text.buffer, text.at))


class _Text:
    """A sliding window over the text of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.buffer, self.at = file, "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.scanner = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
        self.num_read, self.lines_before, self.column_before = 0, 0, 0

    def next(self) -> str:
        """Move to the next character that is no blank and return it; empty at the end of the file."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in _BLANKS:
                self.at += 1
            if self.at < len(self.buffer) or not self.grow():
                return self.buffer[self.at : self.at + 1]

    def element(self) -> str:
        """Return the source of the value from here on, and move behind it."""
        while True:
            try:
                _, end = self.scanner.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # The rest of a value that is cut here may follow.
                if len(self.buffer) - self.at > MAX_ELEMENT:
                    message = f"An element of over {MAX_ELEMENT:,} characters, or one without an end"
                    raise self.error(json.JSONDecodeError(message, self.buffer, self.at)) from error
                if not self.grow():
                    raise self.error(error) from error
                continue
            # A number may be cut: of -0. only -0 is one so far, of 1e+ only 1.
            if len(self.buffer) - end > 2 or self.buffer[end : end + 1] in (*_BLANKS, ",", "]") or not self.grow():
                source, self.at = self.buffer[self.at : end], end
                return source

    def grow(self) -> bool:
        """Read more of the file, and forget what lies before this place; False at the end of the file."""
        pending, chunk = len(self.decoder.getstate()[0]), self.file.read(max(_CHUNK, len(self.buffer) - self.at))
        try:
            more = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            error.start += self.num_read - pending
            raise
        if not chunk:
            return False
        self.num_read += len(chunk)
        dropped = self.buffer[: self.at]
        self.lines_before += dropped.count("\n")
        is_same_line = "\n" not in dropped
        self.column_before = len(dropped) - dropped.rfind("\n") - 1 + is_same_line * self.column_before
        self.buffer, self.at = self.buffer[self.at :] + more, 0
        return True

    def error(self, error: json.JSONDecodeError) -> JSONListError:
        """Return an error with its place in the whole file."""
        line, column = error.lineno + self.lines_before, error.colno + (error.lineno == 1) * self.column_before
        near = repr(error.doc[max(0, error.pos - 20) : error.pos + 50])
        return JSONListError(f"{error.msg}: line {line}, column {column}, near {near}")
