"""A batch size, a device of its own or none between calls: `hps:PATH(batch_size=8, device="cuda:1", offload=True)`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_t2i.rewards.groups import needs_groups
from rlhf_t2i.rewards.imported import literals, takes_metadata
from rlhf_t2i.types import MetadataReward, Reward

_WITH_ARGUMENTS = re.compile(r"(?P<path>.+?)\((?P<arguments>[^()]*)\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Placed:
    """A reward that is called with at most `batch_size` images at once, on a device of its own."""

    function: Reward
    batch_size: int | None
    """None is all images of a call."""
    device: torch.device | None
    """None is that of the images."""
    offload: bool = False
    """True to move the reward's networks to main memory after each call without a gradient."""

    @property
    def needs_groups(self) -> bool:
        """True if the reward compares the images of one prompt, all of which it then gets at once."""
        return needs_groups(self.function)

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return the scores on the device of the images, with the gradient of the reward."""
        device, size = self.device or images.device, self.batch_size or max(len(images), 1)
        starts = range(0, max(len(images), 1), size)
        parts = [
            self.function(images[start : start + size].to(device), prompts[start : start + size]) for start in starts
        ]
        scores = torch.cat(parts).to(images.device)
        if self.offload and not scores.requires_grad:  # a backward pass needs the weights where they are
            offload(self.function)
        return scores


@dataclass(frozen=True, slots=True)
class PlacedWithMetadata:
    """A reward with a parameter `metadata` that is called as `Placed` is."""

    function: MetadataReward
    batch_size: int | None
    device: torch.device | None
    offload: bool = False

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], metadata: list[dict[str, Any]]
    ) -> Float[Tensor, " B"]:
        """Return the scores on the device of the images, with the gradient of the reward."""
        rows = iter(metadata)

        def of_batch(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return self.function(images, prompts, list(islice(rows, len(prompts))))

        scores = Placed(of_batch, self.batch_size, self.device)(images, prompts)
        if self.offload and not scores.requires_grad:
            offload(self.function)
        return scores


def offload(reward: Any) -> None:
    """Move the networks that a reward holds to main memory; its next call moves them back.

    Raises TypeError for a reward that holds none where they can be found, up to two objects below it.
    """
    networks = list(_networks_of(reward, depth=3))
    if not networks:
        raise TypeError(
            f"The reward {type(reward).__qualname__} holds no network that could be moved; leave out offload."
        )
    for network in networks:
        network.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _networks_of(held: Any, *, depth: int) -> Iterator[nn.Module]:
    if isinstance(held, nn.Module):
        yield held
    elif depth and type(held).__module__ not in ("builtins", "torch"):
        names = {*getattr(held, "__dict__", {}), *getattr(type(held), "__slots__", ())}
        for name in sorted(names):
            yield from _networks_of(getattr(held, name, None), depth=depth - 1)


def placed(load: Callable[..., Any], argument: str, *, options: Sequence[str] = ()) -> Any:
    """Load the reward of PATH, or of PATH(batch_size=8, device="cuda:1", offload=True), each of which may be missing.

    Arguments that `options` names are passed to `load`. Raises ValueError for another argument and for a device that
    this machine does not have.
    """
    path, named = path_and_arguments(argument)
    given = {name: named.pop(name) for name in options if name in named}
    if not named:
        return load(path, **given)
    size, device, offloads = (named.pop(name, None) for name in ("batch_size", "device", "offload"))
    is_size = size is None or (isinstance(size, int) and not isinstance(size, bool) and size >= 1)
    if named or not is_size or not isinstance(device, str | None) or not isinstance(offloads, bool | None):
        raise ValueError(
            f"{argument!r} has arguments that are no placement of a reward; write PATH(batch_size=8, device='cuda:1', "
            f"offload=True), with a batch_size of at least 1."
        )
    place = _device(device) if device is not None else None  # before the reward, which may take minutes to load
    reward = load(path, **given)
    kind = PlacedWithMetadata if takes_metadata(reward) else Placed
    return kind(reward, size, place, bool(offloads))


def path_and_arguments(argument: str) -> tuple[str, dict[str, Any]]:
    """Return the parts of PATH(name=value); a path that exists with parentheses in its name has no arguments.

    Raises ValueError for arguments without names or that are no Python literals.
    """
    found = None if Path(argument).exists() else _WITH_ARGUMENTS.fullmatch(argument)
    if found is None:
        return argument, {}
    positional, named = literals(found["arguments"], argument)
    if positional:
        raise ValueError(f"The arguments ({found['arguments']}) of {found['path']!r} need names, as in (batch_size=8).")
    return found["path"], named


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"The device {name!r} of a reward cannot be used: {str(error).splitlines()[0]}") from error
    return device
