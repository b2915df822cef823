"""Judge while the painter paints on: images are handed over as they come, and all verdicts are fetched at the end."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.load import WeightedSum

Verdicts = tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]


class AsyncReward:
    """A reward that works in the background, on one thing after the other and without a gradient.

        with Overlap(reward) as judges:
            for images, prompts in painting:
                judges.submit(images, prompts)
            totals, verdicts = judges.results()

    Leaving the block, however that happens, drops what has not begun and waits for what has.
    """

    def __init__(self, reward: WeightedSum, *, batch_size: int | None = None) -> None:
        """At most `batch_size` images are judged at once."""
        self.reward, self.batch_size = reward, batch_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._submitted: list[Future[Verdicts]] = []

    def submit(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> None:
        """Have these judged, soon; they must not be changed until the results are there."""
        self._submitted.append(self._thread.submit(self._judge, images, list(prompts)))

    def results(self) -> Verdicts:
        """What `reward` would have said of all images since the last results at once, in the order of submission.

        Raises what it raised, for the first submission that failed; ValueError if there was none at all.
        """
        submitted, self._submitted = self._submitted, []
        if not submitted:
            raise ValueError("No images were submitted, so there are no results.")
        try:
            totals, verdicts = zip(*[future.result() for future in submitted], strict=True)
        finally:
            for future in submitted:
                future.cancel()
        return torch.cat(totals), {name: torch.cat([each[name] for each in verdicts]) for name in verdicts[0]}

    def __enter__(self) -> AsyncReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _judge(self, images: Tensor, prompts: list[str]) -> Verdicts:
        # The caller's grad mode and current device are its thread's own.
        with torch.no_grad(), torch.cuda.device_of(images):
            return self.reward(images, prompts, batch_size=self.batch_size)
