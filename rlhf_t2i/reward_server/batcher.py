"""Many ask, one judges: requests that wait share a forward pass, and what was done is counted."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.reward_server.protocol import numbers
from rlhf_t2i.rewards.load import WeightedSum

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, math.inf)

Answer = dict[str, Any]
"""What is sent as JSON."""


@dataclass
class Metrics:
    """What a server has done since its start."""

    answers: Counter[int] = field(default_factory=Counter)
    """By status."""
    answer_seconds: float = 0.0
    batches: Counter[float] = field(default_factory=Counter)
    """By the least of _BATCH_SIZES that their images are no more than."""
    images: int = 0
    scoring_seconds: float = 0.0
    scoring_errors: int = 0

    def answered(self, status: int, *, seconds: float) -> None:
        """Count a request."""
        self.answers[status] += 1
        self.answer_seconds += seconds

    def judged(self, num_images: int, *, seconds: float) -> None:
        """Count a forward pass."""
        self.batches[next(size for size in _BATCH_SIZES if num_images <= size)] += 1
        self.images += num_images
        self.scoring_seconds += seconds

    def text(self, *, queue_length: int) -> str:
        """In the text format of Prometheus."""
        upto = {
            str(size).replace("inf", "+Inf"): sum(n for least, n in self.batches.items() if least <= size)
            for size in _BATCH_SIZES
        }
        metrics = {
            "requests_total counter": {f'{{status="{status}"}}': n for status, n in sorted(self.answers.items())},
            "request_seconds_total counter": {"": self.answer_seconds},
            "queue_length gauge": {"": queue_length},
            "images_total counter": {"": self.images},
            "judge_seconds_total counter": {"": self.scoring_seconds},
            "judge_errors_total counter": {"": self.scoring_errors},
            "batch_images histogram": {
                **{f'_bucket{{le="{size}"}}': n for size, n in upto.items()},
                "_sum": self.images,
                "_count": upto["+Inf"],
            },
        }
        lines: list[str] = []
        for title, values in metrics.items():
            lines.append(f"# TYPE rlhf_t2i_{title}")
            lines += [f"rlhf_t2i_{title.split()[0]}{label} {value}" for label, value in values.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, eq=False)
class Job:
    """The images of one request, and where their scores are awaited."""

    images: Float[Tensor, "B 3 Y X"]
    prompts: list[str]
    arrived: float
    abandoned: Callable[[], Awaitable[bool]]
    """Whether nobody wants the answer any more."""
    answer: asyncio.Future[Answer]


class Batcher:
    """Requests that wait are judged in one forward pass, first come first served, in a thread of their own."""

    def __init__(self, reward: WeightedSum, *, device: str, batch_size: int, max_wait: float) -> None:
        """At most `batch_size` images are judged at once; a request waits `max_wait` seconds for others at most."""
        self.reward, self.device, self.batch_size, self.max_wait = reward, device, batch_size, max_wait
        self.metrics = Metrics()
        self._waiting: asyncio.Queue[Job] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llava_reward")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within it requests are judged; who leaves it has waited for all answers."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            self._thread.shutdown()

    async def score(
        self, images: Float[Tensor, "B 3 Y X"], prompts: list[str], *, abandoned: Callable[[], Awaitable[bool]]
    ) -> Answer:
        """The answer to one request, or the exception of a judge that looked at these images and no others."""
        loop = asyncio.get_running_loop()
        job = Job(images, prompts, loop.time(), abandoned, loop.create_future())
        self._waiting.put_nowait(job)
        return await job.answer

    async def _run(self) -> None:
        """Gather and judge for ever."""
        left_over: Job | None = None
        while True:
            first, left_over = left_over or await self._waiting.get(), None
            batch, num_images = [first], len(first.images)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(first.arrived + self.max_wait):
                    while num_images < self.batch_size:
                        job = await self._waiting.get()
                        num_images += len(job.images)
                        if job.images.shape[1:] != first.images.shape[1:] or num_images > self.batch_size:
                            left_over = job
                            break
                        batch.append(job)
            if batch := [job for job in batch if not await self._abandoned(job)]:
                await self._judge(batch)

    async def _abandoned(self, job: Job) -> bool:
        if abandoned := await job.abandoned():
            job.answer.set_exception(ConnectionAbortedError("The trainer has gone."))
        return abandoned

    async def _judge(self, batch: Sequence[Job]) -> None:
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        try:
            total, each = await loop.run_in_executor(self._thread, self._scores, batch)
        except (ValueError, RuntimeError) as error:
            if len(batch) > 1:  # only the request that it was about shall fail
                for job in batch:
                    await self._judge([job])
            else:
                self.metrics.scoring_errors += 1
                batch[0].answer.set_exception(error)
            return
        self.metrics.judged(len(total), seconds=time.perf_counter() - began)
        start = 0
        for job in batch:
            rows = slice(start, start := start + len(job.images))
            scores = {name: numbers(scores[rows]) for name, scores in each.items()}
            job.answer.set_result({"total": numbers(total[rows]), "scores": scores})

    def _scores(self, batch: Sequence[Job]) -> tuple[Tensor, dict[str, Tensor]]:
        """ValueError if a judge refuses the images or prompts, RuntimeError for whatever else it raises."""
        try:
            images = torch.cat([job.images for job in batch]).to(self.device)
            prompts = [prompt for job in batch for prompt in job.prompts]
            with torch.no_grad():
                return self.reward(images, prompts, batch_size=self.batch_size)
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
