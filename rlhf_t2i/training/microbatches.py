"""Halve microbatches when memory runs out, so that a run goes on with what fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from tqdm import tqdm

from rlhf_t2i.distributed.replicated import Replicated
from rlhf_t2i.distributed.types import Engine
from rlhf_t2i.output.run_folder import read_run_info, update_run_info
from rlhf_t2i.training.run import Run

ResultT = TypeVar("ResultT")
_KEY = "microbatch_size"
_NUM_TRIALS = 2
"""Optimiser steps of several processes before which a microbatch is tried: the moments exist from the second on."""


class Microbatches:
    """Most images in one forward pass of this process: `size`, which is halved whenever memory runs out.

    Work is done again from its start with the halved size, so that it must draw from new generators in each attempt.
    The size that was found is kept in run.json, for a resumed run with the same microbatch_size. Sharded networks
    (FSDP2, ZeRO) exchange weights or gradients within a forward and backward pass, so nothing is halved there.
    """

    def __init__(self, size: int, *, run: Run, engine: Engine) -> None:
        """Take the size that was found earlier, if the run resumes with the same microbatch_size."""
        found = read_run_info(run.folder).get(_KEY, {})
        self.size = found["found"] if found.get("given") == size else size
        self.is_trial = False
        """True while the first microbatch of an optimiser step is tried, without an exchange of gradients."""
        self._given, self._run, self._engine = size, run, engine
        self._is_alone = run.accelerator.num_processes == 1
        self._can_halve = isinstance(engine, Replicated)
        self._trials_left = 0 if self._is_alone or not self._can_halve else _NUM_TRIALS

    def fitting(self, work: Callable[[int], ResultT], *, most: int, is_local: bool = True) -> ResultT:
        """Return `work(size)` with a size that fits: `size`, or half of it, and so on. It uses `most` at the most.

        Work that is not local has collective calls, so that several processes cannot repeat it. Raises RuntimeError if
        one image does not fit, or if nothing can be halved.
        """
        while True:
            try:
                return work(self.size)
            except torch.OutOfMemoryError as error:
                self._require_smaller(error, may_halve=self._can_halve and (is_local or self._is_alone))
            self._halve(most)  # here, where the error no longer holds what the attempt had allocated

    def accumulated(self, work: Callable[[int], ResultT], *, most: int) -> ResultT:
        """Return `work(size)`, which accumulates the gradients of one optimiser step, with a size that fits.

        Collective. Several processes try the first microbatch before their first steps, and agree on what fits all.
        """
        while self._trials_left:
            self.size = int(self._run.gather(torch.tensor([self.size], device=self._run.device)).min())
            if self._fits_all(work):
                self._trials_left -= 1
                break
            self._halve(most)

        def from_zero(size: int) -> ResultT:
            try:
                return work(size)
            except torch.OutOfMemoryError:
                self._clear_gradients()
                raise

        return self.fitting(from_zero, most=most, is_local=False)

    def _fits_all(self, work: Callable[[int], object]) -> bool:
        """Return True if the first microbatch fits on every process; raise as `fitting` does. Collective."""
        problem, self.is_trial = None, True
        try:
            work(self.size)
        except torch.OutOfMemoryError as error:
            problem = str(error)
        self.is_trial = False
        self._clear_gradients()
        failed = self._run.gather(torch.tensor([problem is not None], device=self._run.device))
        if bool(failed.any()):
            self._require_smaller(problem or "on another process", may_halve=True)
        return not bool(failed.any())

    def _clear_gradients(self) -> None:
        if isinstance(self._engine, Replicated):
            self._engine.clear_gradients()

    def _require_smaller(self, problem: object, *, may_halve: bool) -> None:
        if self.size > 1 and may_halve:
            return
        if self.size > 1:
            raise RuntimeError(
                f"Out of memory with {self.size} images in one forward pass, which {self._run.num_processes} processes "
                f"cannot halve together. Set microbatch_size to {self.size // 2} and continue with --resume "
                f"--run_folder {self._run.folder}. ({problem})"
            ) from _cause(problem)
        raise RuntimeError(
            f"Out of memory with one image in a forward pass. Set gradient_checkpointing to true, train a LoRA "
            f"(lora_rank), or quantise the model; --dry_run says what each of them saves. ({problem})"
        ) from _cause(problem)

    def _halve(self, most: int) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before = min(self.size, most)
        self.size = max(1, before // 2)
        where = "" if self._is_alone else f" on process {self._run.rank}"
        tqdm.write(
            f"WARNING: out of memory with {before} images in one forward pass{where}; continuing with {self.size}, "
            f"which changes results by rounding only."
        )
        if self._run.is_main:
            update_run_info(self._run.folder, {_KEY: {"given": self._given, "found": self.size}})


def _cause(problem: object) -> BaseException | None:
    return problem if isinstance(problem, BaseException) else None
