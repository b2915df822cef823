"""A run: its processes, its folder and its metrics. Trainer, search and evaluation are built on it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from rlhf_t2i.distributed.processes import DTYPES, Mode, end_processes, start_processes
from rlhf_t2i.distributed.watch import Watch
from rlhf_t2i.output.run_folder import CHECKPOINTS, update_run_info
from rlhf_t2i.settings.from_run import other_bases
from rlhf_t2i.settings.lists import names
from rlhf_t2i.training.checkpoint_files import checkpoint_step, newest_complete, owes_evaluation
from rlhf_t2i.training.claim import claim_folder, keep_folder, release_folder
from rlhf_t2i.training.environment import prepare_torch, restarted, stop_with_launcher
from rlhf_t2i.training.metrics import MetricsFile
from rlhf_t2i.training.trackers import Trackers

FREE_TO_CHANGE = frozenset({
    "num_steps", "learning_rate", "warmup_steps", "max_skipped_updates", "evaluate_every", "patience",
    "checkpoint_every", "keep_checkpoints", "max_image_grids", "stall_timeout", "trackers", "num_cpu_threads",
    "microbatch_size", "searches_per_batch", "async_reward", "no_imports", "attention", "gradient_checkpointing",
    "offload_text_encoders", "cache_embeddings", "gather_for_sampling", "compile", "channels_last", "dry_run",
    "host", "port", "require_token", "guideline", "acquisition", "questions_per_step", "max_question_age",
    "first_votes",
})  # fmt: skip
"""Settings that may differ when a run is resumed; docs/resume.md lists them."""


@dataclass
class Run:
    """Processes, folder and metrics of one run; a `ProcessGroup`."""

    accelerator: Accelerator
    mode: Mode
    """How the processes share the trained network."""
    folder: Path
    metrics: MetricsFile | None
    """None on all but the main process."""
    trackers: Trackers
    resumed_from: Path | None
    """Checkpoint from which the run resumes."""
    watch: Watch | None = None
    """Ends the job if one of its processes stands still."""
    started: float = field(default_factory=time.monotonic)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def dtype(self) -> torch.dtype:
        """Precision of forward passes."""
        return DTYPES[self.accelerator.mixed_precision]

    @property
    def elapsed(self) -> float:
        """Seconds since the start, those before a resume included."""
        earlier = self.metrics.elapsed if self.metrics else 0.0
        return earlier + time.monotonic() - self.started

    def print(self, message: str) -> None:
        """Print on the main process only, without breaking the progress bar."""
        if self.is_main:
            tqdm.write(message)

    def shard(self, count: int, *, name: str) -> range:
        """Return the indices of `count` items that this process works on.

        Raises ValueError, naming the option, if the number of processes does not divide them.
        """
        if count % self.num_processes:
            raise ValueError(
                f"{name} ({count}) must be a multiple of the number of processes ({self.num_processes}), so that each "
                f"has the same work."
            )
        share = count // self.num_processes
        return range(share * self.rank, share * (self.rank + 1))

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks. Collective."""
        self.tick()
        return cast(Tensor, self.accelerator.gather(tensor))

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return each number averaged over processes. Collective."""
        self.tick()
        numbers = torch.tensor(list(values.values()), device=self.device)
        means = cast(Tensor, self.accelerator.reduce(numbers, reduction="mean"))
        return dict(zip(values, means.tolist(), strict=True))

    def tick(self) -> None:
        """Tell the other processes that this one works."""
        if self.watch is not None:
            self.watch.tick()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row, with its kind and step, to metrics.jsonl and send it to the trackers."""
        self.keep_folder()
        if self.metrics is not None:
            self.metrics.write({**row, "elapsed": round(self.elapsed, 3)})
        self.trackers.log({**row, "elapsed": round(self.elapsed, 3)})

    def log_export(self, step: int) -> None:
        """Append to metrics.jsonl that the weights after `step`, earlier than the last, are exported."""
        if self.metrics is not None:
            self.metrics.write({"kind": "export", "step": step, "elapsed": round(self.elapsed, 3)})

    def keep_folder(self) -> None:
        """Keep the run folder from now on, which is removed if the start fails."""
        keep_folder(self.folder)

    def close(self) -> None:
        """Close trackers and processes, and let others write to the run folder; nothing may follow."""
        if self.watch is not None:
            self.watch.stop()
        end_processes(self.accelerator)
        release_folder(self.folder)


def start_run(
    config: Mapping[str, Any], *, recipe: str, checkpoints: bool = True, collective_timeout: float = 0.0
) -> Run:
    """Start the processes, claim the run folder, and find the checkpoint to resume from.

    `config` is written to the run folder; of its fields this reads run_folder, resume, mixed_precision, attention,
    trackers and num_cpu_threads. `checkpoints=False` is for runs that write none, `collective_timeout` that of
    `start_processes`. Raises ValueError for a run folder
    that holds another config, and FileExistsError for one that holds a run if `resume` is false.
    """
    resume = config["resume"] or restarted()
    stop_with_launcher()
    accelerator, mode = start_processes(config["mixed_precision"], timeout=collective_timeout)
    config = {**config, "mixed_precision": accelerator.mixed_precision}
    prepare_torch(attention=config["attention"], num_cpu_threads=config["num_cpu_threads"])
    folder = claim_folder(config, recipe=recipe, free_to_change=FREE_TO_CHANGE, checkpoints=checkpoints)
    resumed_from = None
    if resume and checkpoints:
        resumed_from = newest_complete(folder / CHECKPOINTS, report=accelerator.print)
        [resumed_from] = broadcast_object_list([resumed_from])
        if resumed_from is None:
            accelerator.print(f"There is no complete checkpoint in {folder}; starting from the beginning.")
    step = checkpoint_step(resumed_from) if resumed_from else 0
    metrics = None
    if accelerator.is_main_process:
        metrics = MetricsFile(
            folder, resumed_step=step, owes_evaluation=owes_evaluation(resumed_from), report=accelerator.print
        )
    accelerator.wait_for_everyone()  # or a process that fails at once would remove the folder too early
    trackers = Trackers(accelerator, names(config["trackers"]), folder=folder, config=config, resumed_step=step)
    return Run(accelerator, mode, folder, metrics, trackers, resumed_from)


def record_other_bases(run: Run, weights: Sequence[str], model: str) -> None:
    """Say which of `weights` are LoRAs of another base than `model`, and record their bases in run.json."""
    found = other_bases(weights, model)
    for name, base in found.items():
        run.print(f"sibling   {name} was trained on {base}; its LoRA is loaded into another base, {model}")
    if run.is_main:
        update_run_info(run.folder, {"other_bases": found})
