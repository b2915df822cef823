"""What the HTTP servers of this package refuse before their endpoints see it, and the limits of their connections."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf_t2i.access import is_loopback

HEAD_SECONDS = 10.0
"""Time for the request line and the headers of a request."""
BODY_SECONDS = 300.0
"""Time for all of a body."""
SILENT_SECONDS = 30.0
"""A client that sends nothing of its body for so long has given up."""
MAX_CONNECTIONS = 256
"""Open connections; one more ends the one that has sent no request for longest."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with a number and with a time limit for headers."""

    waiting_since: float | None = None
    """Time since which the client owes the rest of a request's headers; None while a request is answered."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [one for one in self.connections if isinstance(one, Connection) and one.waiting_since is not None]
            min(idle, key=lambda one: one.waiting_since or 0.0).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()
        elif self.waiting_since is None:
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_answering():  # a request that was sent meanwhile
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        cycle: Any = self.cycle  # None before the first request
        return cycle is not None and not cycle.response_complete

    def _wait(self) -> None:
        self._stop_waiting()
        self.waiting_since = time.monotonic()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        self.waiting_since = None
        if self._timer is not None:
            self._timer.cancel()


class Guard:
    """ASGI middleware: own hosts on a loopback address, no requests of other sites, bodies of limited size and time.

    A page of any site may name this machine by a host of its own (DNS rebinding), or post to it; a browser then sends
    that host, or the site as Origin.
    """

    def __init__(self, app: Any, *, loopback: bool, max_body_bytes: int, hint: str = "") -> None:
        """`loopback`: only hosts that mean this machine are served. `hint` ends the message about a large body."""
        self.app, self.loopback, self.max_body_bytes, self.hint = app, loopback, max_body_bytes, hint

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.loopback and not is_loopback(_name_of(f"//{host}")):
            refusal = JSONResponse({"error": "This server answers to the names of its own machine only."}, 421)
            await refusal(scope, receive, send)
        elif origin is not None and origin.partition("://")[2] != host:
            await JSONResponse({"error": "Requests of other sites are refused."}, 403)(scope, receive, send)
        else:
            await self.app(scope, self._limited(receive, headers), send)

    def _limited(self, receive: Receive, headers: Headers) -> Receive:
        stated, size, is_whole, end = headers.get("content-length", "0"), 0, False, time.monotonic() + BODY_SECONDS

        async def limited() -> Message:
            nonlocal size, is_whole
            if is_whole:  # what follows says that the client has gone
                return await receive()
            self._check(int(stated) if stated.isdecimal() and len(stated) < 20 else 0)
            try:
                async with asyncio.timeout(max(0.0, min(SILENT_SECONDS, end - time.monotonic()))):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body did not arrive within {BODY_SECONDS:g} s, or stopped.") from None
            size += len(message.get("body", b""))
            self._check(size)
            is_whole = not message.get("more_body", False)
            return message

        return limited

    def _check(self, size: int) -> None:
        if size > self.max_body_bytes:
            limit = f"{self.max_body_bytes / 2**20:.3g} MB"  # uvicorn discards what follows
            raise HTTPException(413, f"The body has more than {limit}{self.hint}.")


def listens_on_loopback(listener: socket.socket) -> bool:
    """Return True if only this machine can reach a socket."""
    return is_loopback(listener.getsockname()[0])


def make_server(app: Any, **options: Any) -> uvicorn.Server:
    """Return a server of an ASGI application with these limits; `options` are uvicorn's."""
    return uvicorn.Server(uvicorn.Config(app, http=Connection, access_log=False, ws="none", **options))


def _name_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
