"""The HTTP server of rewards; `python -m rlhf_t2i.reward_server` starts it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import torch

from rlhf_t2i.access import TOKEN_VARIABLE, listen, token
from rlhf_t2i.reward_server.batcher import Batcher, ScoreResponse
from rlhf_t2i.reward_server.metrics import CONTENT_TYPE
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.rewards.wire_format import MAX_METADATA_BYTES, TooLargeError, unpack
from rlhf_t2i.settings.reward_server import Config

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from rlhf_t2i.http_server import Guard, listens_on_loopback, make_server
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; the reward server needs: pip install 'rlhf-t2i[serve]'") from error

_LOG = logging.getLogger("uvicorn.error")
_HEADER_BYTES = 2**20 + MAX_METADATA_BYTES
"""Allowance for the part of a body that is not pixels."""


class Service:
    """The endpoints of the server."""

    def __init__(
        self, batcher: Batcher, *, max_requests: int, max_images: int, max_bytes: int, secret: str | None
    ) -> None:
        self.batcher, self.secret = batcher, secret
        self.max_requests, self.max_images, self.max_bytes = max_requests, max_images, max_bytes
        self.num_accepted = 0
        """Requests in progress: received, waiting or scored."""
        batcher.metrics.watch_queue(lambda: self.num_accepted)

    async def health(self) -> JSONResponse:
        """Respond that the rewards are loaded, and whether one needs all images of a prompt at once; needs no token."""
        return JSONResponse({"status": "ok", "needs_groups": self.batcher.reward.needs_groups})

    async def metrics(self, request: Request) -> Response:
        """Respond with the metrics."""
        self.check_token(request)
        return Response(self.batcher.metrics.text(), media_type=CONTENT_TYPE)

    async def score(self, request: Request) -> JSONResponse:
        """Respond with scores, or with an error."""
        began = time.perf_counter()
        try:
            response = JSONResponse(await self._scores(request))
        except Exception as error:
            response = _error_response(error)
        self.batcher.metrics.count_request(response.status_code, seconds=time.perf_counter() - began)
        return response

    async def _scores(self, request: Request) -> ScoreResponse:
        self.check_token(request)
        if self.num_accepted >= self.max_requests:
            message = f"{self.num_accepted} requests are in progress, which is the limit (--max_requests)."
            raise HTTPException(503, message, headers={"Retry-After": "1"})
        self.num_accepted += 1
        try:
            body = await request.body()
            images, prompts = await asyncio.to_thread(
                unpack, body, request.headers.get("Content-Type", ""),
                max_images=self.max_images, max_bytes=self.max_bytes,
            )  # fmt: skip
            return await self.batcher.score(images, prompts, is_disconnected=request.is_disconnected)
        finally:
            self.num_accepted -= 1

    def check_token(self, request: Request) -> None:
        """Raise HTTPException 401 for a wrong token; the comparison takes the same time for any wrong token."""
        given = request.headers.get("Authorization", "").encode()
        if self.secret and not hmac.compare_digest(given, f"Bearer {self.secret}".encode()):
            message = f"The header Authorization does not have this server's token ({TOKEN_VARIABLE})."
            raise HTTPException(401, message, headers={"WWW-Authenticate": "Bearer"})


def create_app(service: Service, *, loopback: bool = True) -> FastAPI:
    """Return the server as an ASGI application; with `loopback` it answers to the names of its own machine only."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.batcher.running():
            yield

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return _error_response(error)

    app = FastAPI(lifespan=lifespan, openapi_url=None, exception_handlers={HTTPException: refuse})
    app.add_middleware(
        Guard, loopback=loopback, max_body_bytes=service.max_bytes + _HEADER_BYTES, hint=" (--max_body_mb)"
    )
    app.add_api_route("/health", service.health, response_model=None)
    app.add_api_route("/metrics", service.metrics, response_model=None)
    app.add_api_route("/score", service.score, methods=["POST"], response_model=None)
    return app


def _error_response(error: Exception) -> JSONResponse:
    """Return the status and message of an exception; one that is not the client's fault is logged."""
    headers: Mapping[str, str] | None = None
    match error:
        case HTTPException():
            status, message, headers = error.status_code, error.detail, error.headers
        case ClientDisconnect() | ConnectionAbortedError():
            status, message = 499, "The client disconnected."
        case TooLargeError():
            status, message = 413, str(error)
        case ValueError():
            status, message = 422, str(error)
        case _:
            status, message = 500, str(error)
            _LOG.error("A request failed.", exc_info=error)
    return JSONResponse({"error": message}, status, headers=headers)


def main(config: Config) -> None:
    """Load the rewards and serve them until SIGTERM or Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again after a clean shutdown
        signal.signal(number, lambda *_: sys.exit(0))
    listener = listen(config.host, config.port)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.empty(0, device=device)  # a missing device is an error now, not in every request
    batcher = Batcher(
        load_rewards(config.rewards, finite=False),  # the trainer decides if a score may be infinite
        device=device,
        batch_size=config.microbatch_size,
        max_wait=config.max_wait_ms / 1000,
    )
    service = Service(
        batcher,
        max_requests=config.max_requests,
        max_images=config.max_images,
        max_bytes=config.max_body_mb * 2**20,
        secret=token(),
    )
    server = make_server(create_app(service, loopback=listens_on_loopback(listener)), lifespan="on")
    host, port = listener.getsockname()[:2]
    listener.listen()  # whoever reads the address may connect at once
    _LOG.info("Serving %s at http://%s:%d", config.rewards, f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[listener])
