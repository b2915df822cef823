"""Count memory, floating-point operations and bytes of tensor operations, on real tensors or on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_SMALL = 4096
"""Random, empty or constant floats of fewer numbers stay real: indices, noise levels and scores decide what runs."""
_aten = torch.ops.aten
ResultT = TypeVar("ResultT")


@dataclass(slots=True)
class Counts:
    """What a phase of a training step costs one process."""

    flops: int | float = 0
    bytes: int | float = 0
    """Bytes of the inputs and outputs of all operations; an upper bound of the traffic to memory."""
    peak: int | float = 0
    """Most bytes of tensors alive at once."""
    denoiser_calls: int | float = 0
    """Images that pass through the denoiser."""

    def add(self, other: Counts, *, times: int | float) -> None:
        """Add the costs of work that runs so many times; not its peak."""
        for name in ("flops", "bytes", "denoiser_calls"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


@dataclass
class Tracker(TorchDispatchMode):
    """Context in which operations are counted by phase; each storage counts from its first use until it is freed.

    With `fake`, large tensors have no data and cost neither memory nor time. A decision on one of their values is
    taken as for 1: finite, or true.
    """

    fake: FakeTensorMode | None
    phase: str = "start"
    weight: int | float = 1
    """How often the operations that run now stand for equal ones that are left out."""
    now: int = 0
    counts: dict[str, Counts] = field(default_factory=dict[str, Counts])
    all_fake: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}

    __hash__ = object.__hash__

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in inputs)
        if func is _aten._local_scalar_dense.default and is_fake:
            return {torch.bool: True}.get(inputs[0].dtype, 1.0 if inputs[0].is_floating_point() else 1)
        if self.fake is not None and is_fake and (shape := _shape_of_rows(func, args)) is not None:
            with self.fake:
                result = args[0].new_empty(shape)
        elif self.fake is not None and not is_fake and (self.all_fake or _makes_many(inputs, args, kwargs)):
            with self.fake:
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if outputs:
            self._count(func, args, kwargs, result, inputs, outputs)
        return result

    def empty(self, shape: Any, *, dtype: torch.dtype) -> Tensor:
        """Return a tensor without data, of zeros if tensors are real."""
        with self.fake or torch.no_grad():
            tensor = torch.zeros(shape, dtype=dtype)
        self._hold(tensor)
        return tensor

    @property
    def current(self) -> Counts:
        return self.counts.setdefault(self.phase, Counts())

    @contextmanager
    def during(self, phase: str, *, weight: int | float | None = None) -> Iterator[None]:
        """Context whose operations belong to `phase`, and stand for `weight` times as many."""
        before = self.phase, self.weight
        self.phase, self.weight = phase, self.weight if weight is None else weight
        self.current.peak = max(self.current.peak, self.now)
        try:
            yield
        finally:
            self.phase, self.weight = before

    @contextmanager
    def times(self, number: int | float) -> Iterator[None]:
        """Context whose operations stand for `number` times as many."""
        with self.during(self.phase, weight=number * self.weight):
            yield

    def measured(self, work: Callable[[], ResultT]) -> tuple[ResultT, Counts]:
        """Return the result of `work` and what it costs once; `peak` is the most bytes beyond those alive before it."""
        before, now = replace(self.current), self.now
        self.current.peak = now
        result = work()
        found = self.current
        cost = Counts(peak=found.peak - now)
        cost.add(found, times=1 / self.weight)
        cost.add(before, times=-1 / self.weight)
        found.peak = max(found.peak, before.peak)
        return result, cost

    def count_again(self, cost: Counts) -> None:
        """Count work that `measured` has measured."""
        self.current.add(cost, times=self.weight)
        self.current.peak = max(self.current.peak, self.now + cost.peak)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, inputs: Any, outputs: list[Tensor]) -> None:
        counts = self.current
        is_new = self._hold(*outputs)
        if is_new or func._schema.is_mutable:
            counts.bytes += self.weight * sum(tensor.nbytes for tensor in (*inputs, *outputs))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            counts.flops += self.weight * formula(*args, **kwargs, out_val=result)
        counts.peak = max(counts.peak, self.now)

    def _hold(self, *tensors: Tensor) -> bool:
        """Count the storages of tensors; return True if one of them is new."""
        is_new = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in self._alive:
                is_new = True
                self._alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        return is_new

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def _shape_of_rows(func: Any, args: Any) -> tuple[int, ...] | None:
    """Return the shape of the rows that one index or mask takes, for other operations None.

    Turning each index into a fake tensor takes longer than all else, and a mask of fake numbers is taken as all true.
    """
    if func is not _aten.index.Tensor or len(args[1]) != 1:
        return None
    index = args[1][0]
    if index.dtype == torch.bool and not isinstance(index, FakeTensor):
        return (int(index.sum()), *args[0].shape[index.dim() :])
    return (len(index), *args[0].shape[1:]) if index.dim() == 1 else None


def _makes_many(inputs: list[Tensor], args: Any, kwargs: Any) -> bool:
    """True for an operation that makes a large tensor of floats from none."""
    if inputs or not args or not isinstance(args[0], list | tuple | torch.Size):
        return False
    if len(args) > 1 and isinstance(args[1], int) and kwargs.get("dtype") is None:  # `torch.full` of integers
        return False
    if (kwargs.get("dtype") or torch.get_default_dtype()) not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    count = 1
    for size in args[0]:
        count *= size
    return count >= _SMALL
