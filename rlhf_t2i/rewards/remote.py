"""Rewards on other machines: images are sent over HTTP, scores come back."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.text_files import parse_json
from rlhf_t2i.access import TOKEN_VARIABLE, token
from rlhf_t2i.rewards.answers import Answer, fetch, printable, run
from rlhf_t2i.rewards.wire_format import PIXELS, SAFETENSORS, pack, totals

_LOG = logging.getLogger(__name__)
_JITTER = random.Random()  # apart from the global generator, whose numbers must not change
_RETRY_STATUSES = (429, 502, 503, 504)
_CONNECT_SECONDS = 10.0
WAIT_VARIABLE = "RLHF_T2I_SERVER_WAIT"
"""Environment variable with the seconds that a server may take to start; 60 without it."""
_MAX_BACKOFF_SECONDS = 15.0
_MAX_PART_BYTES = 256 * 2**20
_NEED_GROUPS: set[str] = set()
"""Addresses of the servers that have said that their rewards compare the images of one prompt."""


class _Unavailable(Exception):  # noqa: N818
    """A valid request that this server cannot serve now."""

    def __init__(self, reason: str, *, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass
class _Server:
    address: str
    failures: int = 0
    """Consecutive failures."""
    retry_at: float = 0.0
    """Earliest time of the next request, on the clock `time.monotonic`."""
    state: str = "no response yet"
    """Its last failure, for messages."""

    def back_off(self, error: _Unavailable) -> None:
        """Delay the next request, twice as long after each failure and no less than the server's Retry-After."""
        self.failures, self.state = self.failures + 1, str(error)
        wait = max(min(0.1 * 2 ** min(self.failures, 10), _MAX_BACKOFF_SECONDS), error.retry_after)
        wait *= _JITTER.uniform(1, 1.5)  # so that many trainers do not return at once
        self.retry_at = time.monotonic() + wait
        if self.failures == 1:
            _LOG.warning("%s: %s; next attempt in %.1f s.", self.address, error, wait)


class RemoteReward:
    """The total of the rewards that `python -m rlhf_t2i.reward_server` serves; without a gradient.

    Images are split into parts. Several servers take one part at a time; a part that a server cannot score goes to the
    next free server. Pixels are sent as float32 by default, so that scores have the same bits as in this process. For
    other settings define `my_reward = RemoteReward(..., part_size=8)` in a module of your own and use
    `my_module:my_reward`.
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
        """Take the address `http://host:port`, or several separated by `|`; no request is sent yet.

        `timeout`: seconds for all images of a call. `attempt_timeout`: seconds for one part on one server, after which
        another server is tried. `part_size`: largest number of images in one request. `pixels`: type that images are
        sent as, float32, float16 or uint8. `finite`: scores that are not finite are an error. Raises ValueError for a
        value out of range and for a malformed address.
        """
        if pixels not in PIXELS:
            raise ValueError(f"pixels is {pixels}; it must be one of {', '.join(map(str, PIXELS))}.")
        if not (timeout > 0 and attempt_timeout > 0 and part_size >= 1):
            raise ValueError(
                f"timeout ({timeout:g}) and attempt_timeout ({attempt_timeout:g}) must be positive seconds, and "
                f"part_size ({part_size}) at least 1 image."
            )
        self.servers = [_Server(address(server.strip())) for server in servers.split("|")]
        self.timeout, self.attempt_timeout, self.part_size = timeout, attempt_timeout, part_size
        self.pixels, self.finite = pixels, finite
        self._certificates = ssl.create_default_context()

    @property
    def needs_groups(self) -> bool:
        """True if a server has said, to any reward of this process, that its rewards compare the images of one prompt.

        All images of a call then go to a server at once.
        """
        return any(server.address in _NEED_GROUPS for server in self.servers)

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return the totals of the servers, float32, in the order of the images.

        Raises TimeoutError after `timeout` seconds, PermissionError for a wrong token, and ValueError or RuntimeError
        for a response that cannot be used; each names the server.
        """
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        return run(self._score(images.detach().cpu(), list(prompts))).to(images.device)

    def wait_until_reachable(self) -> None:
        """Return as soon as one of the servers responds; no images are sent.

        Raises ConnectionError if none does within the seconds of the environment variable RLHF_T2I_SERVER_WAIT, by
        default 60. A line says at once that they are waited for.
        """
        run(self._wait(_wait_seconds()))

    async def _wait(self, seconds: float) -> None:
        deadline, is_first = time.monotonic() + seconds, True
        async with httpx.AsyncClient(timeout=_CONNECT_SECONDS, trust_env=False, verify=self._certificates) as client:
            while not any([await _responds(client, server) for server in self.servers]):
                states = ", ".join(f"{server.address} ({server.state})" for server in self.servers)
                if time.monotonic() >= deadline:
                    raise ConnectionError(
                        f"No reward server responded within {seconds:g} s: {states}. Start it, correct its address, or "
                        f"wait longer by the environment variable {WAIT_VARIABLE}."
                    )
                if is_first and os.environ.get("RANK", "0") == "0":
                    _LOG.warning("Waiting up to %g s (%s) for %s to start.", seconds, WAIT_VARIABLE, states)
                is_first = False
                await asyncio.sleep(min(1.0, max(0.0, deadline - time.monotonic())))

    async def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        parts: asyncio.Queue[range] = asyncio.Queue()
        size = min(
            self.part_size, -(-len(images) // len(self.servers)), _MAX_PART_BYTES // (4 * images[0].numel()) or 1
        )
        size = len(images) if self.needs_groups else size
        for start in range(0, len(images), size):
            parts.put_nowait(range(start, min(start + size, len(images))))
        scores: dict[int, Tensor] = {}  # by the first row of a part

        async def work(server: _Server) -> None:
            while True:
                await asyncio.sleep(server.retry_at - time.monotonic())
                rows = await parts.get()
                part = images[rows.start : rows.stop], prompts[rows.start : rows.stop]
                try:
                    scores[rows.start] = await self._post(client, server.address, *part)
                    server.failures, server.state = 0, "slow"
                except _Unavailable as error:
                    server.back_off(error)
                    parts.put_nowait(rows)
                parts.task_done()

        try:
            # Without trust_env no proxy of the environment is used.
            limits = httpx.Timeout(None, connect=_CONNECT_SECONDS)
            client = httpx.AsyncClient(timeout=limits, trust_env=False, verify=self._certificates)
            async with asyncio.timeout(self.timeout), client, asyncio.TaskGroup() as group:
                workers = [group.create_task(work(server)) for server in self.servers]
                await parts.join()
                for worker in workers:
                    worker.cancel()
        except TimeoutError:
            for start in range(0, len(images), size):
                if start not in scores:
                    raise TimeoutError(
                        f"No reward for the prompt {prompts[start]!r} (image {start} of {len(images)}) came within "
                        f"{self.timeout:g} s from {', '.join(f'{s.address} ({s.state})' for s in self.servers)}."
                    ) from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return torch.cat([scores[start] for start in sorted(scores)])

    async def _post(self, client: httpx.AsyncClient, server: str, images: Tensor, prompts: list[str]) -> Tensor:
        """Return the totals of one server; raises _Unavailable if another attempt can succeed."""
        headers = {"Content-Type": SAFETENSORS}
        if secret := token():
            headers["Authorization"] = f"Bearer {secret}"
        body = pack(images, prompts, pixels=self.pixels)
        try:
            async with asyncio.timeout(self.attempt_timeout):
                response = await fetch(client, "POST", f"{server}/score", content=body, headers=headers)
        except ValueError as error:
            raise ValueError(f"The reward server {server} {error}. Is it `python -m rlhf_t2i.reward_server`?") from None
        except TimeoutError:
            raise _Unavailable(f"no response within {self.attempt_timeout:g} s") from None
        except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
            raise _Unavailable(_reason(error)) from error
        scores = _scores(response, server, num_images=len(images))
        if self.finite and not (finite := scores.isfinite()).all():
            worst = int((~finite).nonzero()[0])
            raise ValueError(
                f"The reward server {server} returned {scores[worst].item()} for the prompt {prompts[worst]!r}; "
                f"rewards must be finite."
            )
        return scores


def _reason(error: BaseException) -> str:
    """Return the system's error behind one of httpx, such as "Connection refused", or else its own text."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, ConnectionError) and cause.errno):
        cause = cause.__cause__ or cause.__context__
    return os.strerror(cause.errno) if cause and cause.errno else str(error) or type(error).__name__


def _wait_seconds() -> float:
    text = os.environ.get(WAIT_VARIABLE, "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"The environment variable {WAIT_VARIABLE} is {text!r}; it must be seconds, at least 0.")
    return seconds


async def _responds(client: httpx.AsyncClient, server: _Server) -> bool:
    """Return True if a server responds to a request, whatever the response is, or accepts it and is busy."""
    try:
        async with asyncio.timeout(2 * _CONNECT_SECONDS):
            answer = await fetch(client, "GET", f"{server.address}/health")
    except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout, ValueError):
        return True
    except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
        server.state = _reason(error)
        return False
    with suppress(ValueError, AttributeError):  # another server's answer
        if parse_json(answer.text).get("needs_groups") is True:
            _NEED_GROUPS.add(server.address)
    return True


def _scores(response: Answer, server: str, *, num_images: int) -> Float[Tensor, " B"]:
    """Return the totals in a response; raises an exception that names the server if it has none."""
    if response.status_code in _RETRY_STATUSES:
        wait = response.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isdecimal() and len(wait) < 6 else 0.0
        raise _Unavailable(f"{response.status_code}, {_shown(response)}", retry_after=seconds)
    if response.status_code == 401:
        problem = "is not the server's token" if token() else "is not set, but the server requires a token"
        raise PermissionError(
            f"The reward server {server} returned 401: the environment variable {TOKEN_VARIABLE} {problem}."
        )
    if response.status_code != 200:
        raise RuntimeError(
            f"The reward server {server} returned {response.status_code} for {num_images} images: {_shown(response)}"
        )
    try:
        scores = totals(response.text)
    except ValueError:
        raise ValueError(
            f"The reward server {server} returned {_shown(response)}; it must return JSON with a list of numbers as "
            f"`total`. Is it `python -m rlhf_t2i.reward_server`?"
        ) from None
    if len(scores) != num_images:
        raise ValueError(f"The reward server {server} returned {len(scores)} scores for {num_images} images.")
    return scores


def _shown(response: Answer) -> str:
    """Return the text of a response in one short line of printable characters; a token that it echoes is masked."""
    kind, text = "", response.text
    try:
        text = str(parse_json(text)["error"])
    except (ValueError, KeyError, TypeError):
        kind = f"{printable(response.headers.get('Content-Type', 'something'))[:100]} that begins with "
    text = printable(text.replace(token() or "\0", "***"))[:300]
    return kind + text if text else "an empty body"


def address(text: str, *, key: str = TOKEN_VARIABLE) -> str:
    """Return the address of a server without a slash at its end; ValueError if it is none."""
    if "@" in text:  # not shown, because of the password
        raise ValueError(f"The address of a reward server takes no user or password; set {key} instead.")
    try:
        parts = urlsplit(text)
        works = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and text.split() == [text]
    except ValueError:
        works = False
    if not works or "?" in text or "#" in text:
        raise ValueError(f"The reward server {text!r} is not of the form http://host:port.")
    return text.rstrip("/")
