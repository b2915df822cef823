"""The smallest parts of a run that fake tensors cannot follow, each replaced by one that has the same shapes."""

# `Run`, `Trainer` and the rest stay free of this module: a dry run replaces some of their methods for its duration.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from rlhf_t2i.data.image_pairs import ImagePairs, PairBatch
from rlhf_t2i.models import base
from rlhf_t2i.plan.memo import Memo, num_rows
from rlhf_t2i.plan.tracker import Counts, Tracker
from rlhf_t2i.sampling import rollout
from rlhf_t2i.search.run import SearchRun
from rlhf_t2i.training.microbatches import Microbatches
from rlhf_t2i.training.run import Run
from rlhf_t2i.training.trainer import Trainer


class _AllKnown(Exception):  # noqa: N818  # no error
    """Raised in place of the batches of an optimiser step whose costs are known."""


class StepFinished(Exception):  # noqa: N818  # no error: the end of a dry run
    """Raised when one step of a recipe has run."""


@dataclasses.dataclass
class Rehearsal:
    """One step of a recipe as it runs under a tracker, and what was seen of it."""

    tracker: Tracker
    processes: int
    config: Any
    on_gpu: bool
    """True to step the optimiser as on a GPU, with all tensors at once."""
    repeats: bool = False
    """True to run everything as often as the recipe does, also on fake tensors."""
    images: int = 0
    num_steps: int = 0
    policy: Any = None
    trainer: Trainer | None = None
    _accumulated: Any = None
    """What the last optimiser step's work returned; _AllKnown while it runs."""
    _costs: dict[int, Counts] = dataclasses.field(default_factory=dict[int, Counts])
    """Costs of a microbatch of so many rows."""

    def __post_init__(self) -> None:
        self._memo = Memo(self.tracker, is_off=self.repeats)

    # --- training ---

    def start(self, trainer: Trainer) -> None:
        """Take the optimiser's step before the first one, so that its state exists, as in all later steps."""
        self.trainer, self.num_steps = trainer, trainer.config.num_steps
        self.watch(trainer.policy)
        engine: Any = trainer.engine
        with self.tracker.during("optimizer"):
            if self.on_gpu and self.config.optimizer != "adamw_8bit":
                for group in engine._optimizer.param_groups:
                    group["foreach"] = True
            for parameter in trainer.policy.trainable.values():
                parameter.grad = torch.zeros_like(parameter)
            engine.optimizer_step(0.0)
        self.tracker.counts.clear()

    @contextmanager
    def timed(self, trainer: Trainer, part: str) -> Iterator[None]:
        """Count what runs in a part of the step as its phase."""
        del trainer
        with self.tracker.during(part):
            yield

    def accumulated(self, microbatches: Microbatches, work: Callable[[int], Any], *, most: int) -> Any:
        """Return what the work of an optimiser step returns, or did in the last one if its costs are known."""
        del most
        before, self._accumulated = self._accumulated, _AllKnown
        try:
            self._accumulated = work(microbatches.size)
        except _AllKnown:
            self._accumulated = before
        return self._accumulated

    def accumulate(self, trainer: Trainer, batches: Sequence[Any]) -> Iterator[Any]:
        """Yield batches that stand for all: one of each size in the first optimiser step, and none in later ones.

        If there are several of a size, gradients exist from the start, as in all microbatches but the first.
        """
        weights, tracker = dict.fromkeys(range(len(batches)), 1), self.tracker
        if not self._memo.is_off:
            sizes = [num_rows(batch) for batch in batches]
            weights = {sizes.index(size): sizes.count(size) for size in sizes}
            if self._costs.keys() >= set(sizes):
                for i, weight in weights.items():
                    tracker.current.add(self._costs[sizes[i]], times=weight)
                if self._accumulated is _AllKnown:
                    raise _AllKnown
                return
            if len(batches) > 1:
                for parameter in trainer.policy.trainable.values():
                    parameter.grad = tracker.empty(parameter.shape, dtype=parameter.dtype)
        for index, weight in weights.items():
            is_last, before = index == len(batches) - 1, self.total
            with trainer.engine.accumulating(last=is_last), tracker.times(weight):
                yield batches[index]
            cost = Counts()
            cost.add(self.total, times=1 / weight)
            cost.add(before, times=-1 / weight)
            self._costs[num_rows(batches[index])] = cost

    @property
    def total(self) -> Counts:
        """Costs of all phases; no peak."""
        total = Counts()
        for counts in self.tracker.counts.values():
            total.add(counts, times=1)
        return total

    def finish_step(self, trainer: Trainer, step: int, **metrics: Any) -> None:
        """End the dry run after the step's averages."""
        del step
        for average in trainer.averages.values():
            average.update(trainer.engine.weights)
        self.images = int(metrics["images"])
        raise StepFinished

    # --- search ---

    def batches(self, search: SearchRun) -> Iterator[Any]:
        """Yield the first batch of searches."""
        config = search.config
        self.watch(search.context.model)
        self.tracker.counts.clear()
        found = next(iter(self._batches(search)))
        own = len(search.prompts) * config.images_per_prompt / self.processes
        self.num_steps, self.images = -(-int(own) // config.searches_per_batch), len(found) * self.processes
        with self.tracker.during("search"):
            yield found

    def score(self, context: Any, latents: Tensor, prompts: Sequence[str], **options: Any) -> Any:
        """Count the decoding of a search's candidates as its own phase."""
        with self.tracker.during("reward"):
            return self._score(context, latents, prompts, **options)

    # --- models ---

    def watch(self, policy: Any) -> None:
        """Count the denoiser's calls, and run equal calls without gradient once."""
        self.policy = policy
        self._memo.watch(policy)

    # --- all of it ---

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Context in which methods of runs and models are those of this rehearsal."""
        self._batches, self._score, add_lora = SearchRun.batches, _context().score, base.add_lora

        def add_fake_lora(*args: Any, **kwargs: Any) -> None:
            with all_fake(self.tracker):
                add_lora(*args, **kwargs)

        def load(pairs: ImagePairs, indices: Sequence[int], rows: Sequence[int], *, step: int) -> PairBatch:
            del indices, step
            policy: Any = pairs.policy
            winner, loser = (
                self.tracker.empty((len(rows), *policy.latent_shape), dtype=torch.float32) for _ in range(2)
            )
            return PairBatch(winner, loser, policy.encode([pairs.pairs[0].winner_prompt] * len(rows)))

        def gather(run: Run, tensor: Tensor) -> Tensor:
            del run
            return torch.cat([tensor] * self.processes) if self.processes > 1 else tensor

        replaced: list[tuple[Any, str, Any]] = [
            (Run, "num_processes", property(lambda run: self.processes)),
            (Run, "gather", gather),
            (Run, "print", lambda run, message: None),
            (Run, "mean", lambda run, values: dict(values)),
            (Trainer, "evaluate", lambda trainer: self.start(trainer)),
            (Trainer, "timed", lambda trainer, part: self.timed(trainer, part)),
            (Trainer, "accumulate", lambda trainer, batches: self.accumulate(trainer, batches)),
            (Microbatches, "accumulated", lambda *args, **kwargs: self.accumulated(*args, **kwargs)),
            (Trainer, "finish_step", lambda trainer, step, **metrics: self.finish_step(trainer, step, **metrics)),
            (SearchRun, "batches", lambda search: self.batches(search)),
            (SearchRun, "write_results", _stop),
            (_context(), "score", lambda context, *args, **kwargs: self.score(context, *args, **kwargs)),
            (ImagePairs, "load", load),
            *([(rollout, "each", self._memo.each)] if not self._memo.is_off else []),
            (base, "add_lora", add_fake_lora),
            *([(nn.Module, "_apply", convert)] if self.tracker.fake else []),
        ]
        with ExitStack() as stack:
            for owner, name, stand_in in replaced:
                stack.enter_context(patch.object(owner, name, stand_in))
            yield


def stand_in_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return scores of the shape of a reward's: random, or differentiable where a gradient to the pixels is needed."""
    if images.requires_grad:
        return images.mean(dim=(1, 2, 3))
    return torch.rand(len(prompts))


def _context() -> Any:
    from rlhf_t2i.search.context import SearchContext

    return SearchContext


def _stop(*args: Any, **kwargs: Any) -> None:
    del args, kwargs
    raise StepFinished


def convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Apply a conversion to a network's tensors, as `nn.Module._apply` does: it refuses fake tensors that are known."""
    for child in module.children() if recurse else ():
        convert(child, function)
    groups: tuple[Any, ...] = (module._parameters, module._buffers)
    for tensors in groups:
        for name, old in tensors.items():
            if old is None:
                continue
            with torch.no_grad():
                new = function(old)
            if new is not old:
                tensors[name] = nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new
    return module


@contextmanager
def all_fake(tracker: Tracker) -> Iterator[None]:
    """Context in which small tensors have no data either, if large ones have none."""
    tracker.all_fake = tracker.fake is not None
    try:
        yield
    finally:
        tracker.all_fake = False
