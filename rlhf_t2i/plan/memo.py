"""Run work that repeats on tensors of the same shapes once, and count it as often as it would run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rlhf_t2i.plan.tracker import Counts, Tracker
from rlhf_t2i.types import Prediction


class Memo:
    """What a tracker has seen of a policy's work without gradient, by the shapes of its inputs.

    Where tensors are real all work runs, since it would give other values.
    """

    def __init__(self, tracker: Tracker, *, is_off: bool) -> None:
        """Take the tracker that counts; `is_off` to run all work as often as the recipe does."""
        self._tracker = tracker
        self.is_off = is_off or tracker.fake is None

    def watch(self, policy: Any) -> None:
        """Count the denoiser's calls, and run equal calls without gradient once."""
        networks = [policy.network] if policy.reference is None else [policy.network, policy.reference]
        for network in networks:
            self._method_once(network, "forward", calls=True)
        for encoder in policy.text_encoders:
            self._method_once(encoder.model, "forward", phase="encode")
        for method in ("decode", "encode"):
            self._method_once(policy.autoencoder.vae, method)
        self._predict_once(policy)

    def each(self, items: Sequence[Any]) -> Iterator[Any]:
        """Yield items that stand for all in a loop that does the same with each: the first two of every size."""
        sizes = [num_rows(item) if isinstance(item, Tensor) else 1 for item in items]
        for size in dict.fromkeys(sizes):
            first, count = sizes.index(size), sizes.count(size)
            for i, times in enumerate((1, count - 1) if count > 1 else (1,)):
                with self._tracker.times(times):
                    yield items[first + i]

    def _method_once(self, module: Any, method: str, *, calls: bool = False, phase: str | None = None) -> None:
        original, tracker, again = getattr(module, method), self._tracker, self._once()
        state = _adapter_state(module)

        def run(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if calls:
                tracker.current.denoiser_calls += tracker.weight * num_rows(result)
            return result

        def call(*args: Any, **kwargs: Any) -> Any:
            key = *_shapes((args, kwargs)), state()
            with tracker.during(phase or tracker.phase):
                return again(key, lambda: run(*args, **kwargs))

        setattr(module, method, call)

    def _predict_once(self, policy: Any) -> None:
        original, again, state = policy.predict, self._once(), _adapter_state(policy.network)

        def predict(latents: Tensor, level: Any, conditioning: Any, *, guidance_scale: float) -> Prediction:
            key = *_shapes((latents, conditioning.parts)), guidance_scale, policy.denoiser is policy.reference, state()

            def parts() -> tuple[Tensor, Tensor]:
                found = original(latents, level, conditioning, guidance_scale=guidance_scale)
                return found.clean, found.noise

            return Prediction(*again(key, parts))

        policy.predict = predict

    def _once(self) -> Callable[[Any, Callable[[], Any]], Any]:
        """Return a function that does work without gradient once for each key, and then only counts its cost again."""
        tracker = self._tracker
        seen: dict[Any, tuple[Any, Counts]] = {}

        def again(key: Any, work: Callable[[], Any]) -> Any:
            if torch.is_grad_enabled() or self.is_off:
                return work()
            if key not in seen:
                result, cost = tracker.measured(work)
                with tracker.fake or torch.no_grad():
                    seen[key] = tree_map(_shape_of, result), cost
                return result
            shapes, cost = seen[key]
            tracker.count_again(cost)
            return tree_map(lambda leaf: leaf.make(tracker) if isinstance(leaf, _Shape) else leaf, shapes)

        return again


@dataclasses.dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: torch.dtype

    def make(self, tracker: Tracker) -> Tensor:
        return tracker.empty(self.shape, dtype=self.dtype)


def num_rows(batch: Any) -> int:
    """Return the number of rows of a batch: of its first tensor, or of a list of images."""
    if isinstance(batch, Tensor):
        return len(batch)
    if dataclasses.is_dataclass(batch):
        return num_rows(getattr(batch, dataclasses.fields(batch)[0].name))
    if isinstance(batch, list):
        return len(batch)
    return num_rows(next(part for part in batch if not isinstance(part, int | float)))


def _shape_of(leaf: Any) -> Any:
    return _Shape(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _shapes(arguments: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _adapter_state(module: nn.Module) -> Callable[[], Any]:
    """Return a function that says which LoRA adapters of a network are in use."""
    layers: list[Any] = [layer for layer in module.modules() if getattr(layer, "disable_adapters", None) is False][:1]
    return lambda: tuple((layer.disable_adapters, *layer.active_adapters) for layer in layers)
