"""Answers of HTTP servers that are not trusted: bounded in size, uncompressed, UTF-8, and harmless in a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

ResultT = TypeVar("ResultT")
MAX_ANSWER_BYTES = 16 * 2**20
"""Largest body that is read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response that was read to its end."""

    status_code: int
    headers: Mapping[str, str]
    text: str


async def fetch(client: httpx.AsyncClient, method: str, url: str, **request: Any) -> Answer:
    """Return the answer to a request, read as it comes; `request` has further arguments of `client.stream`.

    Raises ValueError for a body that is compressed, or larger than MAX_ANSWER_BYTES, and what httpx raises; the caller
    limits the time.
    """
    headers = {"Accept-Encoding": "identity", **request.pop("headers", {})}
    body = bytearray()
    async with client.stream(method, url, headers=headers, **request) as response:
        if (coding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise ValueError(f"sent a body compressed by {printable(coding)[:40]!r}, which was not asked for")
        async for chunk in response.aiter_raw():  # decoded, a small body may be any number of bytes
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError(f"sent more than {MAX_ANSWER_BYTES / 2**20:g} MB")
    return Answer(response.status_code, response.headers, body.decode("utf-8", "replace"))


def printable(text: str) -> str:
    """Return a text in one line, with a question mark for each character that a terminal might obey."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a coroutine to its end, also inside a running event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
