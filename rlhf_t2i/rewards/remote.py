"""A judge on another machine as a reward: images go there over HTTP, scores come back."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.reward_server.protocol import PIXELS, SAFETENSORS, TOKEN_VARIABLE, pack, token, totals

_LOG = logging.getLogger(__name__)
_JITTER = random.Random()  # its own, so that nothing else draws other numbers
_TRY_AGAIN = (429, 502, 503, 504)
_CONNECT_SECONDS = 10.0
_LONGEST_REST = 15.0
_PART_BYTES = 256 * 2**20


class _Unavailable(Exception):  # noqa: N818
    """Nothing is wrong with the question, but this server cannot answer it now."""

    def __init__(self, reason: str, *, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass
class _Server:
    address: str
    failures: int = 0
    """In a row."""
    back_at: float = 0.0
    """When it is asked again, on the clock `time.monotonic`."""
    trouble: str = "no answer yet"

    def rest(self, trouble: _Unavailable) -> None:
        """Leave it alone for a while, twice as long each time; never shorter than it asked for."""
        self.failures, self.trouble = self.failures + 1, str(trouble)
        wait = max(min(0.1 * 2 ** min(self.failures, 10), _LONGEST_REST), trouble.retry_after)
        wait *= _JITTER.uniform(1, 1.5)  # so that many trainers do not come back at once
        self.back_at = time.monotonic() + wait
        if self.failures == 1:
            _LOG.warning("%s: %s; it is asked again in %.1f s.", self.address, trouble, wait)


class RemoteReward:
    """The weighted verdict of judges that `python -m rlhf_t2i.reward_server` serves elsewhere; without a gradient.

    Several servers share the images, a part each at a time; the part of one that cannot be reached or is busy goes
    to whichever is free next. Pixels travel as float32, so that a judge scores them as if it were here. Other settings
    than these defaults can be had as `module:function`, of a module that has `mine = RemoteReward(..., part_size=8)`.
    """

    def __init__(
        self,
        servers: str,
        *,
        timeout: float = 600.0,
        attempt_timeout: float = 200.0,
        part_size: int = 64,
        pixels: torch.dtype = torch.float32,
        finite: bool = True,
    ) -> None:
        """Take `http://host:port`, or several with `|` between them; nobody is asked yet.

        All images of a call must be scored within `timeout` seconds, and one part of at most `part_size` images
        within `attempt_timeout`, or another server is asked. A score that is not finite is an error unless `finite` is
        false. Raises ValueError for what is no such address, and `pixels` that are none of float32, float16, uint8.
        """
        if pixels not in PIXELS:
            raise ValueError(f"pixels is {pixels}; it must be one of {', '.join(map(str, PIXELS))}.")
        if not (timeout > 0 and attempt_timeout > 0 and part_size >= 1):
            raise ValueError(
                f"timeout ({timeout:g}) and attempt_timeout ({attempt_timeout:g}) must be positive seconds, and "
                f"part_size ({part_size}) at least 1 image."
            )
        self.servers = [_Server(_address(server.strip())) for server in servers.split("|")]
        self.timeout, self.attempt_timeout, self.part_size = timeout, attempt_timeout, part_size
        self.pixels, self.finite = pixels, finite
        self._certificates = ssl.create_default_context()

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """The totals that the servers answered, float32, in the order of the images.

        Raises TimeoutError when the time is over, PermissionError for a token that a server does not know, and
        ValueError or RuntimeError for an answer that cannot be used; each names the server.
        """
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        return _run(self._judge(images.detach().cpu(), list(prompts))).to(images.device)

    async def _judge(self, images: Tensor, prompts: list[str]) -> Tensor:
        parts: asyncio.Queue[range] = asyncio.Queue()
        size = min(self.part_size, -(-len(images) // len(self.servers)), _PART_BYTES // (4 * images[0].numel()) or 1)
        for start in range(0, len(images), size):
            parts.put_nowait(range(start, min(start + size, len(images))))
        found: dict[int, Tensor] = {}

        async def work(server: _Server) -> None:
            while True:
                await asyncio.sleep(server.back_at - time.monotonic())
                rows = await parts.get()
                mine = images[rows.start : rows.stop], prompts[rows.start : rows.stop]
                try:
                    found[rows.start] = await self._ask(client, server.address, *mine)
                    server.failures, server.trouble = 0, "slow"
                except _Unavailable as trouble:
                    server.rest(trouble)
                    parts.put_nowait(rows)
                parts.task_done()

        try:
            # Neither a proxy nor another setting of the environment comes between a trainer and its judge.
            limits = httpx.Timeout(None, connect=_CONNECT_SECONDS)
            client = httpx.AsyncClient(timeout=limits, trust_env=False, verify=self._certificates)
            async with asyncio.timeout(self.timeout), client, asyncio.TaskGroup() as group:
                workers = [group.create_task(work(server)) for server in self.servers]
                await parts.join()
                for worker in workers:
                    worker.cancel()
        except TimeoutError:
            for start in range(0, len(images), size):
                if start not in found:
                    raise TimeoutError(
                        f"No reward for the prompt {prompts[start]!r} (image {start} of {len(images)}) came within "
                        f"{self.timeout:g} s from {', '.join(f'{s.address} ({s.trouble})' for s in self.servers)}."
                    ) from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return torch.cat([found[start] for start in sorted(found)])

    async def _ask(self, client: httpx.AsyncClient, server: str, images: Tensor, prompts: list[str]) -> Tensor:
        """The totals of one server; _Unavailable if it makes sense to ask again."""
        headers = {"Content-Type": SAFETENSORS}
        if secret := token():
            headers["Authorization"] = f"Bearer {secret}"
        body = pack(images, prompts, pixels=self.pixels)
        try:
            async with asyncio.timeout(self.attempt_timeout):
                response = await client.post(f"{server}/score", content=body, headers=headers)
        except TimeoutError:
            raise _Unavailable(f"no answer within {self.attempt_timeout:g} s") from None
        except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
            raise _Unavailable(str(error) or type(error).__name__) from error
        scores = _scores(response, server, num_images=len(images))
        if self.finite and not (finite := scores.isfinite()).all():
            worst = int((~finite).nonzero()[0])
            raise ValueError(
                f"The judge server {server} answered {scores[worst].item()} for the prompt {prompts[worst]!r}; rewards "
                f"must be finite."
            )
        return scores


def _scores(response: httpx.Response, server: str, *, num_images: int) -> Float[Tensor, " B"]:
    """The totals of an answer, if it is one."""
    if response.status_code in _TRY_AGAIN:
        wait = response.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isdecimal() and len(wait) < 6 else 0.0
        raise _Unavailable(f"{response.status_code}, {_shown(response)}", retry_after=seconds)
    if response.status_code == 401:
        problem = "is not the server's token" if token() else "is not set, and the server wants its token there"
        raise PermissionError(f"The judge server {server} answered 401: {TOKEN_VARIABLE} in the environment {problem}.")
    if response.status_code != 200:
        raise RuntimeError(
            f"The judge server {server} answered {response.status_code} to {num_images} images: {_shown(response)}"
        )
    try:
        scores = totals(response.text)
    except ValueError:
        raise ValueError(
            f"The judge server {server} answered {_shown(response)}; it must answer JSON with a list of numbers as "
            f"`total`. Is it `python -m rlhf_t2i.reward_server`?"
        ) from None
    if len(scores) != num_images:
        raise ValueError(f"The judge server {server} answered {len(scores)} scores for {num_images} images.")
    return scores


def _shown(response: httpx.Response) -> str:
    """What a server said, in short, and without the token if it echoes that."""
    kind, text = "", response.text
    try:
        text = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        kind = f"{response.headers.get('Content-Type', 'something')} that begins with "
    text = " ".join(text.replace(token() or "\0", "***").split())[:300]
    return kind + text if text else "nothing"


def _address(text: str) -> str:
    if "@" in text:  # not shown, because of the password
        raise ValueError(f"The address of a judge server has no user or password; set {TOKEN_VARIABLE} instead.")
    try:
        parts = urlsplit(text)
        works = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and text.split() == [text]
    except ValueError:
        works = False
    if not works or "?" in text or "#" in text:
        raise ValueError(f"The judge server {text!r} is not of the form http://host:port.")
    return text.rstrip("/")


def _run(work: Coroutine[Any, Any, Tensor]) -> Tensor:
    """Wait for it, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
