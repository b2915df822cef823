"""The plumbing of a training run: processes, the run folder, checkpoints, stopping. The only accelerate import."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from rlhf_t2i.config import names
from rlhf_t2i.distributed.placement import learning_of, placement_config, placement_table
from rlhf_t2i.distributed.processes import DTYPES, Mode, end_processes, make_engine, start_processes
from rlhf_t2i.distributed.state import Copies, read_state, write_state
from rlhf_t2i.distributed.types import Engine
from rlhf_t2i.files import write_atomically
from rlhf_t2i.report import read_metrics, write_report
from rlhf_t2i.training import checkpoint
from rlhf_t2i.training.evaluation import Evaluation, save_evaluation
from rlhf_t2i.training.metrics import MetricsFile, before_after
from rlhf_t2i.training.run_folder import claim_folder, restarted

_FREE_TO_CHANGE = {
    "resume", "run_folder", "num_steps", "checkpoint_every", "keep_checkpoints", "trackers", "num_cpu_threads",
    "batch_size", "searches_per_batch",
}  # fmt: skip
"""Fields that may differ when a run is resumed; any other would make it another run."""


@dataclass
class Run:
    """One training run: its processes, its folder, and where it stands."""

    accelerator: Accelerator
    mode: Mode
    """How the processes share what learns."""
    folder: Path
    metrics: MetricsFile | None
    """None on all but the main process."""
    resumed_from: Path | None
    keep_checkpoints: int
    done: int = 0
    """Steps finished."""
    started: float = field(default_factory=time.monotonic)
    _seconds: dict[str, float] = field(default_factory=dict)
    _signals: int = 0
    _skipped: int = 0
    _stopping: bool = False

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
        """What the networks compute in."""
        return DTYPES[self.accelerator.mixed_precision]

    @property
    def elapsed(self) -> float:
        """Seconds of work, those before a resume included."""
        earlier = self.metrics.elapsed if self.metrics else 0.0
        return earlier + time.monotonic() - self.started

    def say(self, message: str) -> None:
        """Print a line, once, without breaking the progress bar."""
        if self.is_main:
            tqdm.write(message)

    def my_share(self, count: int, *, name: str) -> range:
        """Which of `count` things this process works on; ValueError, naming them, if they cannot be shared equally."""
        if count % self.num_processes:
            raise ValueError(
                f"{name} ({count}) must be a multiple of the number of processes ({self.num_processes}), so that each "
                f"has the same work."
            )
        share = count // self.num_processes
        return range(share * self.rank, share * (self.rank + 1))

    def gather(self, tensor: Tensor) -> Tensor:
        """Every process's rows, in the order of the processes."""
        return cast(Tensor, self.accelerator.gather(tensor))

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each number averaged over processes."""
        numbers = torch.tensor(list(values.values()), device=self.device)
        means = cast(Tensor, self.accelerator.reduce(numbers, reduction="mean"))
        return dict(zip(values, means.tolist(), strict=True))

    # --- the loop ---

    def steps(self, num_steps: int) -> Iterator[int]:
        """The steps still to do, with a progress bar; ends early, after a whole step, on SIGTERM or Ctrl-C."""
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        bar = tqdm(
            range(self.done, num_steps),
            initial=self.done,
            total=num_steps,
            desc="training",
            disable=not self.is_main,
            dynamic_ncols=True,
        )
        self._bar = bar
        try:
            for step in bar:
                yield step
                if self._stopping:
                    break
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signals += 1
        if self._signals > 1:
            raise KeyboardInterrupt
        self.say("Stopping after this step; a checkpoint will be written. Press Ctrl-C again to stop at once.")

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the seconds of a part of a step; they are written down with the step."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.monotonic() - start

    def finish_step(self, step: int, **row: float | int) -> None:
        """Write down a finished step, and agree with the other processes whether to stop."""
        self.done = step + 1
        self._stopping = bool(self.gather(torch.tensor([self._signals], device=self.device)).any())
        seconds = {f"seconds/{part}": round(value, 3) for part, value in self._seconds.items()}
        self._seconds.clear()
        self.log({"kind": "train", "step": self.done, **row, **seconds})
        rate = row["images"] / max(sum(seconds.values()), 1e-9)
        shown = [f"{name} {row[name]:.3f}" for name in ("reward", "accuracy", "loss") if name in row]
        self._bar.set_postfix_str(f"{shown[0]}, {rate:.0f} images/s")

    def record(self, evaluation: Evaluation) -> None:
        """Write down an evaluation: its row, its images with their scores, and the report as it stands."""
        summary = evaluation.summary()
        self._seconds.clear()
        self.log({"kind": "evaluation", "step": self.done, "num_images": len(evaluation.images), **summary})
        if self.is_main:
            save_evaluation(evaluation, self.folder / "images", step=self.done)
            write_report(self.folder)
            verdict = ", ".join(
                f"{name} {summary[name]:.3f} ± {summary[f'{name}/standard_error']:.3f}" for name in evaluation.scores
            )
            self.say(f"after {self.done} steps, {len(evaluation.images)} held-out images: {verdict}")

    def count_skipped(self, skipped: bool, *, most: int) -> None:
        """Take note of whether an update was left out; RuntimeError if `most` in a row were."""
        self._skipped = self._skipped + 1 if skipped else 0
        if skipped:
            self.say(f"WARNING: the gradient of step {self.done + 1} is not finite; the update was left out.")
        if self._skipped >= most:
            raise RuntimeError(
                f"The last {most} updates, up to step {self.done + 1}, had gradients that are not finite. Try a lower "
                f"learning_rate, or mixed_precision: no."
            )

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is to be done now."""
        return every > 0 and self.done % every == 0

    @property
    def stopping(self) -> bool:
        """Whether all processes agreed to stop after this step."""
        return self._stopping

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl, and send it to the trackers that were asked for."""
        if self.metrics is not None:
            self.metrics.write({**row, "elapsed": round(self.elapsed, 3)})
        numbers = {f"{row['kind']}/{k}": v for k, v in row.items() if k not in ("kind", "step")}
        self.accelerator.log(numbers, step=row["step"])

    # --- checkpoints ---

    def prepare(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_gradient_norm: float,
        microbatch_size: int,
        num_averages: int = 0,
        reference: bool = False,
    ) -> Engine:
        """Spread what learns over the processes; ValueError if DeepSpeed's settings are not those of the recipe.

        Says first who will hold what, and writes it into run.json: also averages of what learns and a frozen
        `reference`, where there will be these.
        """
        learning = learning_of(
            network, self.mode, processes=self.num_processes, num_averages=num_averages, reference=reference
        )
        precision = self.accelerator.mixed_precision
        self.say(placement_table(learning, precision=precision, microbatch_size=microbatch_size))
        if self.is_main:
            path = self.folder / "run.json"
            placement = placement_config(learning, precision=precision, microbatch_size=microbatch_size)
            counts = {"trainable_parameters": learning.trainable, "placement": placement}
            facts = {**json.loads(path.read_text()), **counts}
            write_atomically(path, json.dumps(facts, indent=1))
        self.engine = make_engine(
            self.accelerator, self.mode, network, optimizer,
            max_gradient_norm=max_gradient_norm, microbatch_size=microbatch_size, say=self.say,
        )  # fmt: skip
        return self.engine

    def restore(self, copies: Copies, *, extra: Sequence[Any]) -> None:
        """Take up the checkpoint that this run resumes from, if there is one.

        Checkpoints hold the weights, what the optimiser remembers, further `copies` of the weights, and each of
        `extra`, which have a small state_dict that is the same on all processes. Raises ValueError for a checkpoint of
        another model.
        """
        scaler = self.accelerator.scaler
        self.copies, self.extra = copies, [*extra, *([scaler] if scaler is not None else [])]
        if self.resumed_from is not None:
            read_state(self.engine, copies, self.resumed_from)
            states = torch.load(self.resumed_from / "extra.pt", weights_only=True)
            for thing, state in zip(self.extra, states, strict=True):
                thing.load_state_dict(state)
            self.done = checkpoint.checkpoint_step(self.resumed_from)
            self.say(f"Resumed after step {self.done} from {self.resumed_from}")

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, each process its share. Every process must call it."""
        folder = self.folder / "checkpoints"
        part = folder / (checkpoint.checkpoint_name(self.done) + ".part")
        with self._all_or_none():
            if self.is_main:
                checkpoint.begin(folder, self.done)
        with self._all_or_none():
            write_state(self.engine, self.copies, part, rank=self.rank, num_processes=self.num_processes)
            if self.is_main:
                torch.save([thing.state_dict() for thing in self.extra], part / "extra.pt")
        with self._all_or_none():
            if self.is_main:
                checkpoint.commit(part, keep=self.keep_checkpoints)

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Wait for all processes; if one of them could not write, all say so, and none waits for it."""
        problem = None
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk comes as any of them
            problem = error
        problems = [found for found in gather_object([problem]) if found is not None]
        if problems:
            raise OSError(
                f"The checkpoint after step {self.done} could not be written ({problems[0]}); the ones before are "
                f"whole. Make room and go on with --resume --run_folder {self.folder}"
            ) from problem

    def close(self) -> None:
        """Close trackers and processes; the last thing that each does."""
        end_processes(self.accelerator)

    def finish(self, *, export: Callable[[Path], Path], num_steps: int) -> None:
        """Write the weights for others and the last report, say where all is, and close trackers and processes."""
        if self.is_main:
            if self.done < num_steps:
                self.say(
                    f"Stopped after {self.done} of {num_steps} steps. Go on with: "
                    f"--config {self.folder / 'config.yaml'} --resume --run_folder {self.folder}"
                )
            else:
                weights, report = export(self.folder), write_report(self.folder)
                self.say(before_after(read_metrics(self.folder)))
                self.say(f"report    {report}\nimages  {self.folder / 'images'}\nweights   {weights}")
        self.close()


# --- starting -------------------------------------------------------------------------------------


def start_run(config: Mapping[str, Any], *, recipe: str, checkpoints: bool = True) -> Run:
    """Set up the processes and the run folder; find the checkpoint to resume from, if it is a run that writes some.

    `config` is written down as it is; of its fields this reads run_folder, resume, mixed_precision, trackers,
    num_cpu_threads and keep_checkpoints. Raises ValueError for a run folder that holds another config, and
    FileExistsError for one that holds a run that was not asked to be resumed.
    """
    resume, trackers = config["resume"] or restarted(), names(config["trackers"])
    stop_with_the_launcher()
    keep_trackers_quiet(trackers)
    accelerator, mode = start_processes(config["mixed_precision"])
    config = {**config, "mixed_precision": accelerator.mixed_precision}
    if accelerator.device.type == "cpu":
        share_cores(config["num_cpu_threads"])
    folder = claim_folder(config, recipe=recipe, free_to_change=_FREE_TO_CHANGE)
    resumed_from = None
    if resume and checkpoints:
        resumed_from = checkpoint.newest_whole(folder / "checkpoints", report=accelerator.print)
        [resumed_from] = broadcast_object_list([resumed_from])
        if resumed_from is None:
            accelerator.print(f"There is no whole checkpoint in {folder}; starting from the beginning.")
    step = checkpoint.checkpoint_step(resumed_from) if resumed_from else 0
    metrics = None
    if accelerator.is_main_process:
        metrics = MetricsFile(folder, resumed_step=step)
    if trackers:
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = filter_trackers(list[Any](trackers), str(folder))
        flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
        accelerator.init_trackers("rlhf-t2i", config=flat, init_kwargs={"wandb": {"dir": str(folder)}})
    return Run(accelerator, mode, folder, metrics, resumed_from, config["keep_checkpoints"])


def share_cores(num_cpu_threads: int) -> None:
    """On a CPU: as many threads as asked for, or (0) this process's share of the cores."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which accelerate imports, remarks on it
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(num_cpu_threads or max(1, _num_cores() // local))


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_with_the_launcher() -> None:
    """Have Linux send SIGTERM when `accelerate launch` is terminated, which would leave this process to train on."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def keep_trackers_quiet(trackers: Sequence[str]) -> None:
    """Check that each tracker is installed; wandb without a key writes to disk and never asks for a login."""
    for tracker in trackers:
        if tracker not in ("wandb", "tensorboard"):
            raise ValueError(f"There is no tracker {tracker!r}; choose from wandb, tensorboard.")
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"The tracker {tracker} is not installed: pip install 'rlhf-t2i[{tracker}]'.")
    if "wandb" in trackers and "WANDB_API_KEY" not in os.environ:
        netrc = Path.home() / ".netrc"
        if not (netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")):
            os.environ.setdefault("WANDB_MODE", "offline")
