"""Checkpoints of a training run: weights, optimiser state, averages, and whatever else a resumed run needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError

from rlhf_t2i.distributed.state import Copies, read_state, write_state
from rlhf_t2i.distributed.types import Engine
from rlhf_t2i.output.run_folder import CHECKPOINTS
from rlhf_t2i.training.checkpoint_files import OWED_EVALUATION, begin, checkpoint_name, checkpoint_step, commit
from rlhf_t2i.training.run import Run

_EXTRA = "extra.pt"


class Checkpoints:
    """Checkpoints of one run, in the `checkpoints` folder of its run folder.

    They hold the weights and optimiser state of `engine`, further `copies` of the weights such as averages, and the
    state_dict of each of `extra`, which must be small and equal on all processes. The `keep` newest are kept.
    """

    def __init__(self, run: Run, engine: Engine, *, copies: Copies, extra: Sequence[Any], keep: int) -> None:
        scaler = run.accelerator.scaler
        self.run, self.engine, self.copies, self.keep = run, engine, copies, keep
        self.extra = [*extra, *([scaler] if scaler is not None else [])]

    def restore(self) -> int:
        """Load the checkpoint from which the run resumes, if any; return how many steps were done. Collective.

        Raises ValueError for a checkpoint of another model.
        """
        source = self.run.resumed_from
        if source is None:
            return 0
        read_state(self.engine, self.copies, source)
        states = torch.load(source / _EXTRA, weights_only=True)
        for item, state in zip(self.extra, states, strict=True):
            item.load_state_dict(state)
        step = checkpoint_step(source)
        self.run.print(f"Resumed after step {step} from {source}")
        return step

    def save(self, step: int, *, owes_evaluation: bool = False) -> None:
        """Write the checkpoint after `step` steps, complete or not at all; each process writes its share. Collective.

        With `owes_evaluation` the run that resumes from it first makes the evaluation after that step.
        Raises OSError, on all processes, if one of them could not write.
        """
        folder = self.run.folder / CHECKPOINTS
        part = folder / (checkpoint_name(step) + ".part")
        with self._all_or_none(step):
            if self.run.is_main:
                begin(folder, step)
        with self._all_or_none(step):
            write_state(self.engine, self.copies, part, rank=self.run.rank, num_processes=self.run.num_processes)
            if self.run.is_main:
                torch.save([item.state_dict() for item in self.extra], part / _EXTRA)
                if owes_evaluation:
                    (part / OWED_EVALUATION).touch()
        with self._all_or_none(step):
            if self.run.is_main:
                commit(part, keep=self.keep)

    @contextlib.contextmanager
    def _all_or_none(self, step: int) -> Iterator[None]:
        """Wait for all processes; raise on all of them if one could not write, so that none waits for it."""
        problem = None
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises any of these
            problem = error
        problems = [found for found in gather_object([problem]) if found is not None]
        if problems:
            raise OSError(
                f"The checkpoint after step {step} could not be written ({problems[0]}); earlier checkpoints are "
                f"complete. Free some disk space and continue with --resume --run_folder {self.run.folder}"
            ) from problem
