"""Dynamic batching: requests that wait at the same time share a forward pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.reward_server.metrics import Metrics
from rlhf_t2i.rewards.load import WeightedSum
from rlhf_t2i.rewards.wire_format import numbers

ScoreResponse = dict[str, Any]
"""The JSON body of a response: total and scores."""


@dataclass(frozen=True, eq=False)
class Job:
    """The images of one request, and the future of its response."""

    images: Float[Tensor, "B 3 Y X"]
    prompts: list[str]
    arrived: float
    """Time of arrival on the clock of the event loop."""
    is_disconnected: Callable[[], Awaitable[bool]]
    """Return True if the client has gone."""
    response: asyncio.Future[ScoreResponse]


class Batcher:
    """Score requests in order of arrival, several in one forward pass, in one thread."""

    def __init__(self, reward: WeightedSum, *, device: str, batch_size: int, max_wait: float) -> None:
        """Score at most `batch_size` images at once; a request waits at most `max_wait` seconds for others.

        A reward that compares the images of one prompt gets the images of one request alone.
        """
        self.reward, self.device, self.batch_size, self.max_wait = reward, device, batch_size, max_wait
        self.metrics = Metrics()
        self._waiting: asyncio.Queue[Job] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Score requests inside this context; leaving it waits for the forward pass in progress."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            self._thread.shutdown()

    async def score(
        self, images: Float[Tensor, "B 3 Y X"], prompts: list[str], *, is_disconnected: Callable[[], Awaitable[bool]]
    ) -> ScoreResponse:
        """Return the response to one request.

        Raises ValueError if a reward refuses these images or prompts, RuntimeError for another failure on them, and
        ConnectionAbortedError if the client has gone.
        """
        loop = asyncio.get_running_loop()
        job = Job(images, prompts, loop.time(), is_disconnected, loop.create_future())
        self._waiting.put_nowait(job)
        return await job.response

    @property
    def num_waiting(self) -> int:
        """Requests that are not in a forward pass yet."""
        return self._waiting.qsize()

    async def _run(self) -> None:
        """Form batches and score them until cancelled."""
        left_over: Job | None = None
        limit = 0 if self.reward.needs_groups else self.batch_size
        while True:
            first, left_over = left_over or await self._waiting.get(), None
            batch, num_images = [first], len(first.images)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(first.arrived + self.max_wait):
                    while num_images < limit:
                        job = await self._waiting.get()
                        num_images += len(job.images)
                        if job.images.shape[1:] != first.images.shape[1:] or num_images > limit:
                            left_over = job
                            break
                        batch.append(job)
            if batch := [job for job in batch if not await self._abandoned(job)]:
                await self._score(batch)

    async def _abandoned(self, job: Job) -> bool:
        if abandoned := await job.is_disconnected():
            job.response.set_exception(ConnectionAbortedError("The client disconnected."))
        return abandoned

    async def _score(self, batch: Sequence[Job]) -> None:
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        try:
            total, scores = await loop.run_in_executor(self._thread, self._forward, batch)
        except (ValueError, RuntimeError) as error:
            if len(batch) > 1:  # so that only the request at fault fails
                for job in batch:
                    await self._score([job])
            else:
                self.metrics.count_error()
                batch[0].response.set_exception(error)
            return
        self.metrics.count_batch(len(total), seconds=time.perf_counter() - began)
        start = 0
        for job in batch:
            rows = slice(start, start := start + len(job.images))
            own = {name: numbers(values[rows]) for name, values in scores.items()}
            job.response.set_result({"total": numbers(total[rows]), "scores": own})

    def _forward(self, batch: Sequence[Job]) -> tuple[Tensor, dict[str, Tensor]]:
        """Score all images of a batch; raises ValueError as a reward did, and RuntimeError for any other exception."""
        try:
            images = torch.cat([job.images for job in batch]).to(self.device)
            prompts = [prompt for job in batch for prompt in job.prompts]
            with torch.no_grad():
                return self.reward(images, prompts, batch_size=self.batch_size)
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
