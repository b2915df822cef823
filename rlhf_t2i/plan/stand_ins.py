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
from torch.utils._pytree import tree_leaves, tree_map

from rlhf_t2i.data.image_pairs import ImagePairs, PairBatch
from rlhf_t2i.models import base
from rlhf_t2i.plan.tracker import Counts, Tracker
from rlhf_t2i.search.run import SearchRun
from rlhf_t2i.training.run import Run
from rlhf_t2i.training.trainer import Trainer


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
    denoiser_calls: int | float = 0
    images: int = 0
    num_steps: int = 0
    policy: Any = None
    trainer: Trainer | None = None
    _costs: dict[int, tuple[Counts, int | float]] = dataclasses.field(
        default_factory=dict[int, tuple[Counts, int | float]]
    )
    """FLOPs and bytes of a microbatch of so many rows, and its denoiser calls."""

    # --- training ---

    def start(self, trainer: Trainer) -> None:
        """Take the optimiser's step before the first one, so that its state exists, as in all later steps."""
        self.trainer, self.num_steps = trainer, trainer.config.num_steps
        self.watch(trainer.policy)
        engine: Any = trainer.engine
        with self.tracker.during("optimizer"):
            for group in engine._optimizer.param_groups if self.on_gpu else ():
                group["foreach"] = True
            for parameter in trainer.policy.trainable.values():
                parameter.grad = torch.zeros_like(parameter)
            engine.optimizer_step(0.0)
        self.tracker.counts.clear()
        self.denoiser_calls = 0.0

    @contextmanager
    def timed(self, trainer: Trainer, part: str) -> Iterator[None]:
        """Count what runs in a part of the step as its phase."""
        del trainer
        with self.tracker.during(part):
            yield

    def accumulate(self, trainer: Trainer, batches: Sequence[Any]) -> Iterator[Any]:
        """Yield batches that stand for all: at most three of the first optimiser step, and none of later ones."""
        weights = dict.fromkeys(range(len(batches)), 1)
        if self.tracker.fake is not None:
            sizes = [_rows(batch) for batch in batches]
            weights = {sizes.index(size): sizes.count(size) for size in sizes}
            if self._costs.keys() >= set(sizes):
                for i, weight in weights.items():
                    self._add(self._costs[sizes[i]], weight)
                return
            if weights[0] > 1:
                weights = weights | {0: 1, 1: weights[0] - 1}
        for index, weight in weights.items():
            is_last, before, calls = index == len(batches) - 1, self._so_far(), self.denoiser_calls
            with trainer.engine.accumulating(last=is_last), self.tracker.during(self.tracker.phase, weight=weight):
                yield batches[index]
            spent = self._so_far()
            flops, moved = ((getattr(spent, n) - getattr(before, n)) / weight for n in ("flops", "bytes"))
            self._costs[_rows(batches[index])] = Counts(flops, moved), (self.denoiser_calls - calls) / weight

    def _so_far(self) -> Counts:
        counts = self.tracker.counts.values()
        return Counts(sum(each.flops for each in counts), sum(each.bytes for each in counts))

    def _add(self, cost: tuple[Counts, int | float], weight: int | float) -> None:
        counts, calls = cost
        self.tracker.current.flops += weight * counts.flops
        self.tracker.current.bytes += weight * counts.bytes
        self.denoiser_calls += weight * calls

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
        self._once(policy.network, "forward", calls=True)
        if policy.reference is not None:
            self._once(policy.reference, "forward", calls=True)
        for encoder in policy.text_encoders:
            self._once(encoder.model, "forward", phase="encode")
        for method in ("decode", "encode"):
            self._once(policy.autoencoder.vae, method)

    def _once(self, module: Any, method: str, *, calls: bool = False, phase: str | None = None) -> None:
        original, tracker = getattr(module, method), self.tracker
        seen: dict[Any, tuple[Any, Counts]] = {}
        adapters = [layer for layer in module.modules() if getattr(layer, "disable_adapters", None) is False][:1]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            key = (*((t.shape, t.dtype) for t in tensors), _without(adapters))
            with tracker.during(phase or tracker.phase):
                if torch.is_grad_enabled() or tracker.fake is None or key not in seen:
                    result, cost = self._measured(lambda: original(*args, **kwargs))
                    if not torch.is_grad_enabled():
                        with tracker.fake or torch.no_grad():
                            seen[key] = tree_map(_shape_of, result), cost
                else:
                    shapes, cost = seen[key]
                    tracker.current.flops += tracker.weight * cost.flops
                    tracker.current.bytes += tracker.weight * cost.bytes
                    tracker.current.peak = max(tracker.current.peak, tracker.now + cost.peak)
                    result = tree_map(lambda leaf: leaf.make(tracker) if isinstance(leaf, _Shape) else leaf, shapes)
            if calls:
                self.denoiser_calls += tracker.weight * _rows(result)
            return result

        setattr(module, method, call)

    def _measured(self, work: Callable[[], Any]) -> tuple[Any, Counts]:
        tracker = self.tracker
        before, now = dataclasses.replace(tracker.current), tracker.now
        tracker.current.peak = now
        result = work()
        found, weight = tracker.current, tracker.weight
        cost = Counts((found.flops - before.flops) / weight, (found.bytes - before.bytes) / weight, found.peak - now)
        found.peak = max(found.peak, before.peak)
        return result, cost

    # --- all of it ---

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Context in which methods of runs and models are those of this rehearsal."""
        self._batches, self._score, add_lora = SearchRun.batches, _context().score, base.add_lora

        def add_fake_lora(*args: Any, **kwargs: Any) -> None:
            with _all_fake(self.tracker):
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
            (Trainer, "finish_step", lambda trainer, step, **metrics: self.finish_step(trainer, step, **metrics)),
            (SearchRun, "batches", lambda search: self.batches(search)),
            (SearchRun, "write_results", _stop),
            (_context(), "score", lambda context, *args, **kwargs: self.score(context, *args, **kwargs)),
            (ImagePairs, "load", load),
            (base, "add_lora", add_fake_lora),
            *([(nn.Module, "_apply", _convert)] if self.tracker.fake else []),
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


@dataclasses.dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: torch.dtype

    def make(self, tracker: Tracker) -> Tensor:
        return tracker.empty(self.shape, dtype=self.dtype)


def _shape_of(leaf: Any) -> Any:
    return _Shape(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _rows(batch: Any) -> int:
    """Return the number of rows of a batch: of its first tensor, or of a list of images."""
    if isinstance(batch, Tensor):
        return len(batch)
    if dataclasses.is_dataclass(batch):
        return _rows(getattr(batch, dataclasses.fields(batch)[0].name))
    if isinstance(batch, list):
        return len(batch)
    return _rows(next(part for part in batch if not isinstance(part, int | float)))


def _without(adapters: Sequence[Any]) -> bool:
    return any(layer.disable_adapters for layer in adapters)


def _context() -> Any:
    from rlhf_t2i.search.context import SearchContext

    return SearchContext


def _stop(*args: Any, **kwargs: Any) -> None:
    del args, kwargs
    raise StepFinished


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Apply a conversion to a network's tensors, as `nn.Module._apply` does: it refuses fake tensors that are known."""
    for child in module.children() if recurse else ():
        _convert(child, function)
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
def _all_fake(tracker: Tracker) -> Iterator[None]:
    tracker.all_fake = tracker.fake is not None
    try:
        yield
    finally:
        tracker.all_fake = False
