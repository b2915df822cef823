"""Run one step of a recipe on fake tensors of a fake device: `python -m tests.fake_device CASES.json`.

The file has a list of [name, recipe or "score", options]. A tensor that stays on the CPU among those of the device is
an error of torch's fake tensors, or of `computed` for reward models, whose shapes depend on numbers. The device is a
backend in Python without any kernel, so no GPU and no CUDA build of torch is needed. Prints a line of JSON for each
case: its name, and the error if there was one.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from rlhf_t2i.plan import dry_run, stand_ins
from rlhf_t2i.plan.tracker import Tracker
from rlhf_t2i.training.run import Run

NAME = "fakegpu"
BETWEEN_DEVICES = ("aten.copy_", "aten._to_copy", "aten.index", "aten.index_put_", "aten.index_put")
"""Operations whose tensors may be on two devices; indices of the CPU may choose among rows of a GPU."""
HALF = [torch.bfloat16, torch.float16]


class DeviceTracker(Tracker):
    """A tracker whose networks are on the fake device, and that makes every tensor of the device fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if self.fake is not None and device is not None and torch.device(device).type == NAME and not is_fake:
            with self.fake:
                return func(*(self._fake(argument) for argument in args), **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _fake(self, argument: Any) -> Any:
        """Return a fake tensor for a real one, which the fallback of fake tensors would run on the device."""
        assert self.fake is not None
        return self.fake.from_tensor(argument) if isinstance(argument, Tensor) else argument

    def empty(self, shape: Any, *, dtype: torch.dtype) -> Tensor:
        assert self.fake is not None
        with self.fake:
            return torch.zeros(shape, dtype=dtype, device=NAME)


def register() -> torch.device:
    """Make the device known to torch, once a process."""
    module = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, _is_in_bad_fork=lambda: False, device_count=lambda: 1,
        current_device=lambda: 0, get_amp_supported_dtype=lambda: HALF, manual_seed_all=lambda seed: None,
    )  # fmt: skip
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    _device_constructors()  # which contexts of a device go by, in a cache, before they are replaced
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make(tree_map(lambda leaf: leaf.item() if isinstance(leaf, OnDevice) else leaf, data), **options)
        return made if device is None else made.to(device)

    def as_tensor(data: Any, **options: Any) -> Tensor:
        return data.to(**options) if isinstance(data, Tensor) else tensor(data, **options)

    def new_tensor(like: Tensor, data: Any, **options: Any) -> Tensor:
        return tensor(data, **{"device": like.device, "dtype": like.dtype, **options})

    torch.tensor = tensor  # the constructors themselves copy to a device without asking fake tensors
    torch.as_tensor = as_tensor
    to_list = Tensor.tolist
    Tensor.tolist = lambda held: to_list(held.numbers if isinstance(held, OnDevice) else held)  # type: ignore
    Tensor.new_tensor = new_tensor  # type: ignore[method-assign]
    return torch.device(NAME, 0)


class OnDevice(Tensor):
    """A tensor of the device, with its numbers in a tensor of the CPU, where shapes depend on numbers."""

    numbers: Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], numbers: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.numbers = numbers
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU for tensors of the device; RuntimeError if one of them is of the CPU itself."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_there = any(isinstance(leaf, OnDevice) for leaf in leaves)
    strangers = [leaf for leaf in leaves if not isinstance(leaf, OnDevice) and leaf.dim()]
    name = str(func.overloadpacket)
    if is_there and strangers and name not in BETWEEN_DEVICES:
        raise RuntimeError(f"{name} has tensors of the device and of the CPU, of shape {tuple(strangers[0].shape)}.")
    device = kwargs.get("device")
    goes = is_there if device is None else torch.device(device).type == NAME
    args, kwargs = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    result = func(*args, **(kwargs if device is None else {**kwargs, "device": "cpu"}))
    return tree_map(lambda leaf: OnDevice(leaf) if goes and isinstance(leaf, Tensor) else leaf, result)


class Computing(TorchDispatchMode):
    """Context in which tensors that are made on the device have numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return return_and_correct_aliasing(func, args, kwargs or {}, computed(func, args, kwargs or {}))


@contextmanager
def on_the_device(device: torch.device) -> Iterator[None]:
    """Context in which recipes run on the device, and rewards answer there."""

    def reward(images: Tensor, prompts: Any) -> Tensor:
        assert images.device == device
        return images.mean(dim=(1, 2, 3))

    with (
        patch.object(Run, "device", property(lambda run: device)),
        patch.object(Accelerator, "device", property(lambda accelerator: device)),
        patch.object(dry_run, "Tracker", DeviceTracker),
        patch.object(dry_run, "stand_in_reward", reward),
    ):
        yield


def score(folder: str, device: torch.device) -> None:
    """Score images on the device by a reward model, once without and once with a gradient to the pixels."""
    from reward_model.scoring import LlavaReward

    model = LlavaReward.from_pretrained(folder, device="cpu")
    with Computing(), patch.object(nn.Module, "_apply", stand_ins.convert):
        model.to(device)
        images = torch.rand(2, 3, 28, 28).to(device)
        assert model.score(images, ["a fox", "a red fox"]).device == device
        scores = model.score(images.requires_grad_(True), ["a fox", "a red fox"])
        assert torch.autograd.grad(scores.sum(), images)[0].device == scores.device == device


def leave_on_the_cpu(device: torch.device, *, has_numbers: bool) -> None:
    """Add a tensor of the CPU to one of the device."""
    with Computing() if has_numbers else FakeTensorMode():
        torch.zeros(2, device=device) + torch.zeros(2)


def error_of(kind: str, given: dict[str, Any], device: torch.device) -> str | None:
    """Run a case; return its error, with the places that it came through."""
    try:
        if kind == "score":
            score(given["folder"], device)
        elif kind == "wrong":
            leave_on_the_cpu(device, **given)
        else:
            recipe = import_module(f"recipes.{kind}")
            with on_the_device(device):
                dry_run.rehearse(recipe.main, recipe.Config(**given))
    except Exception as error:  # whatever a recipe raises is the result of its case
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        return f"{type(error).__name__}: {error}"[:400] + f" at {places[-14:]}"
    return None


def main(cases: Path) -> None:
    device = register()
    wrong = [[f"left on the CPU, {numbers}", "wrong", {"has_numbers": numbers}] for numbers in (True, False)]
    for name, kind, given in [*json.loads(cases.read_text()), *wrong]:
        sys.stdout.write(json.dumps([name, error_of(kind, given, device)]) + "\n")
        sys.stdout.flush()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
