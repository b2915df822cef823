"""Score images in a background thread while the next ones are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.load import WeightedSum

TotalAndScores = tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]


class AsyncReward:
    """A weighted sum of rewards that is computed in one background thread, in order, without a gradient.

        with AsyncReward(reward) as scoring:
            for images, prompts in batches:
                scoring.submit(images, prompts)
            total, scores = scoring.results()

    Leaving the block, also by an exception, cancels what has not started and waits for what has.
    """

    def __init__(self, reward: WeightedSum, *, batch_size: int | None = None, group_size: int | None = None) -> None:
        """Call each reward with at most `batch_size` images at once; None is all images of a submission.

        If a reward needs whole groups, of `group_size` images each, all submissions are scored together by `results`.
        """
        self.reward, self.batch_size, self.group_size = reward, batch_size, group_size
        self._waiting: list[tuple[Tensor, list[str]]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._submitted: list[Future[TotalAndScores]] = []

    def forget(self) -> None:
        """Cancel what was submitted since the last `results`, and wait for what has started."""
        for future in self._submitted:
            future.cancel()
        wait(self._submitted)
        self._waiting, self._submitted = [], []

    def submit(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> None:
        """Queue images for scoring and return at once; they must not be changed before `results` returns."""
        if self.reward.needs_groups:
            self._waiting.append((images, list(prompts)))
        else:
            self._submitted.append(self._thread.submit(self._score, images, list(prompts)))

    def results(self) -> TotalAndScores:
        """Wait for all submissions since the last call and return `reward` of all their images, in order.

        Raises the exception of the first submission that failed, and ValueError if there was no submission.
        """
        if self._waiting:
            images, prompts = zip(*self._waiting, strict=True)
            self._waiting = []
            whole = torch.cat(images), [prompt for part in prompts for prompt in part]
            self._submitted.append(self._thread.submit(self._score, *whole))
        submitted, self._submitted = self._submitted, []
        if not submitted:
            raise ValueError("No images were submitted, so there are no results.")
        try:
            totals, scores = zip(*[future.result() for future in submitted], strict=True)
        finally:
            for future in submitted:
                future.cancel()
        return torch.cat(totals), {name: torch.cat([each[name] for each in scores]) for name in scores[0]}

    def __enter__(self) -> AsyncReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _score(self, images: Tensor, prompts: list[str]) -> TotalAndScores:
        # Grad mode and the current CUDA device belong to a thread and are not inherited from the caller's.
        with torch.no_grad(), torch.cuda.device_of(images):
            return self.reward(images, prompts, batch_size=self.batch_size, group_size=self.group_size)
