"""The training loop's object: a policy, and everything around its updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.distributed.state import gather_weights
from rlhf_t2i.distributed.types import Engine
from rlhf_t2i.output.run_folder import CONFIG, IMAGES, image_grid
from rlhf_t2i.output.secondary import report_or_warning
from rlhf_t2i.output.terminal import has_colours
from rlhf_t2i.rewards.load import WeightedSum
from rlhf_t2i.settings.groups import TrainerConfig
from rlhf_t2i.training.changes import before_after
from rlhf_t2i.training.checkpoint import Checkpoints
from rlhf_t2i.training.checkpoint_files import owes_evaluation
from rlhf_t2i.training.early_stop import EarlyStop
from rlhf_t2i.training.ema import MovingAverage, copy_weights, exchanged, lora_at_scale
from rlhf_t2i.training.environment import StopRequests
from rlhf_t2i.training.evaluation import Evaluation, EvaluationTable, evaluate, prune_image_grids, save_evaluation
from rlhf_t2i.training.learning_rate import learning_rates
from rlhf_t2i.training.metrics import rate_text, read_metrics
from rlhf_t2i.training.microbatches import Microbatches
from rlhf_t2i.training.run import Run
from rlhf_t2i.training.updates import Updates
from rlhf_t2i.types import Policy, Sampler

Batch = TypeVar("Batch")


@dataclass
class Trainer:
    """A policy in training, and everything around its updates: a recipe calls nothing else of a run.

    It is a `ProcessGroup`. Methods marked collective must be called by every process.
    """

    config: TrainerConfig
    run: Run
    policy: Policy
    engine: Engine
    """The trained network and its optimiser, as the processes share them."""
    averages: dict[str, MovingAverage]
    """Moving averages of the trained weights: "ema" is evaluated and exported; a recipe may add others."""
    initial_weights: Mapping[str, Tensor]
    """Trained weights before training; empty unless `keep_initial_weights`."""
    checkpoints: Checkpoints
    evaluation_rewards: WeightedSum
    evaluation_set: tuple[list[str], list[int]]
    """Prompt and seed of each evaluation image."""
    evaluation_title: str
    """Name of the evaluation prompts: "held-out prompts" only if none of them is trained on."""
    early_stop: EarlyStop | None
    report: Callable[[Path], Path]
    """Writes a page about the run folder; called after each evaluation and at the end."""
    step: int
    """Training steps finished."""
    _seconds: dict[str, float] = field(default_factory=dict)
    _table: EvaluationTable = field(default_factory=EvaluationTable)
    _is_stopping: bool = False  # agreed among all processes

    def __post_init__(self) -> None:
        """Count signals in the loop, and updates that are skipped."""
        self._learning_rate = learning_rates(self.config)
        self.stop_requests = StopRequests(print=self.print)
        self.microbatches = Microbatches(self.config.microbatch_size, run=self.run, engine=self.engine)
        self._updates = Updates(
            self.engine, max_skipped=self.config.max_skipped_updates, has_scaler=self.run.dtype == torch.float16,
            gather=self.gather, print=self.print,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.run.device

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def rank(self) -> int:
        return self.run.rank

    @property
    def num_processes(self) -> int:
        return self.run.num_processes

    @property
    def is_sharded(self) -> bool:
        """True if each process holds only a shard of the trained weights (ZeRO-3, FSDP2)."""
        return self.engine.is_sharded

    def print(self, message: str) -> None:
        """Print on the main process only."""
        self.run.print(message)

    def shard(self, count: int, *, name: str) -> range:
        """Return the indices of `count` items that this process works on; ValueError, naming the option, if unequal."""
        return self.run.shard(count, name=name)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks. Collective."""
        return self.run.gather(tensor)

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return each number averaged over processes. Collective."""
        return self.run.mean(values)

    def wait_for_everyone(self) -> None:
        """Wait until every process is here. Collective."""
        self.run.accelerator.wait_for_everyone()

    def steps(self) -> Iterator[int]:
        """Yield the index of each remaining training step, with a progress bar.

        Evaluates before the first, and first of all if the last step's evaluation is owed. Ends early, after a complete
        step, on SIGTERM, Ctrl-C or an early stop.
        """
        if self.step == 0 or owes_evaluation(self.run.resumed_from):
            self.evaluate()
        remaining = tqdm(
            range(self.step, self.config.num_steps), initial=self.step, total=self.config.num_steps,
            desc="training", disable=not self.run.is_main, dynamic_ncols=True,
        )  # fmt: skip
        with self.stop_requests.handled(), remaining as self._progress:
            for step in self._progress:
                if self.stopped_early:
                    break
                yield step
                if self._is_stopping:
                    break

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Context whose seconds are added to `seconds/PART` in this step's metrics."""
        self.run.tick()
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.monotonic() - start

    def finish_step(self, step: int, **metrics: float | int) -> None:
        """Update the averages and log a step's metrics; evaluate and save if it is time. Collective.

        A run that is to stop saves at once; its checkpoint owes the evaluation to the process that resumes it.
        `metrics` must have "images", the number of images trained on.
        """
        for average in self.averages.values():
            average.update(self.engine.weights)
        self.step = step + 1
        self._is_stopping = bool(self.gather(torch.tensor([self.stop_requests.count], device=self.device)).any())
        seconds = {f"seconds/{part}": round(self._seconds.pop(part), 3) for part in list(self._seconds)}
        rate = {"learning_rate": self._learning_rate(step)}
        self.run.log({"kind": "train", "step": self.step, **rate, **metrics, **seconds})
        shown = [f"{name} {metrics[name]:z.3f}" for name in ("reward", "accuracy", "loss") if name in metrics][:1]
        shown += rate_text(int(metrics["images"]), math.fsum(seconds.values()))
        self._progress.set_postfix_str(", ".join(shown))
        is_last = self.step == self.config.num_steps
        is_evaluated = is_last or self._is_due(self.config.evaluate_every)
        is_owed = is_evaluated and not is_last and self._is_stopping
        if is_evaluated and not is_owed:
            self.evaluate()
        if is_last or self.stopped_early or self._is_due(self.config.checkpoint_every) or self._is_stopping:
            self.checkpoints.save(self.step, owes_evaluation=is_owed)

    def rollout_metrics(self, rewards: Float[Tensor, "P K"], scores: Mapping[str, Tensor]) -> dict[str, float]:
        """Return metrics of a rollout: `rewards` of all processes, unweighted `scores` of this one. Collective."""
        num_images, guidance_scale = rewards.numel(), self.config.guidance_scale
        return {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "images": num_images,
            "denoiser_calls": num_images * self.config.num_denoising_steps * self.policy.num_calls(guidance_scale),
            **self.mean({f"rewards/{name}": values.mean().item() for name, values in scores.items()}),
        }

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def stopped_early(self) -> bool:
        """True if the early-stopping reward has not risen for `patience` evaluations."""
        return self.early_stop is not None and self.early_stop.is_due

    def sampler(self, *, eta: float, num_steps: int | None = None) -> Sampler:
        """Return a sampler with noise `eta`, in [0, 1], over `num_steps` (num_denoising_steps) denoising steps."""
        schedule = self.policy.schedule(num_steps or self.config.num_denoising_steps)
        return Sampler(schedule, stochastic(schedule, eta=eta), self.config.guidance_scale)

    @contextmanager
    def sampling(self, *, average: str | None = None) -> Iterator[None]:
        """Context for forward passes without gradient, as many as this process needs.

        `average` names a moving average to sample with instead of the trained weights. Entering and leaving are
        collective. If gather_for_sampling is false, every process must run the same number of forward passes.
        """
        with ExitStack() as stack:
            if average is not None:
                stack.enter_context(self.averages[average].applied(self.engine.weights))
            if self.config.gather_for_sampling:
                self.policy.denoiser = stack.enter_context(self.engine.gathered_network())
                stack.callback(setattr, self.policy, "denoiser", self.engine.network)
            yield

    def accumulate(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield each batch of one optimiser step; gradients accumulate, and are exchanged after the last one.

        Work given to `microbatches.accumulated` calls this; in a trial of it, only the first batch is computed.
        """
        is_trial = self.microbatches.is_trial
        for index, batch in enumerate(batches[:1] if is_trial else batches):
            self.run.tick()
            with self.engine.accumulating(last=index == len(batches) - 1 and not is_trial):
                yield batch

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those of this optimiser step."""
        self.engine.backward(loss)

    def optimizer_step(self) -> dict[str, float]:
        """Take one optimiser step; return its metrics, and raise, as `Updates.take` does. Collective."""
        return self._updates.take(self._learning_rate(self.step), step=self.step)

    def evaluate(self) -> None:
        """Evaluate the averaged weights on the evaluation prompts, and record that. Collective."""
        with self.averages["ema"].applied(self.engine.weights):
            with lora_at_scale(self.engine.weights, self.config.lora_scale), self.sampling():
                sampler = self.sampler(eta=self.config.evaluation_eta, num_steps=self.config.num_evaluation_steps)
                evaluation = self.microbatches.fitting(
                    lambda size: evaluate(
                        self.policy, *self.evaluation_set, self.evaluation_rewards.rewards, sampler=sampler,
                        microbatch_size=size, processes=self,
                    ),
                    most=len(self.evaluation_set[0]), is_local=False,
                )  # fmt: skip
            self.record(evaluation)
            if self.early_stop is not None:
                value = evaluation.scores[self.early_stop.reward].mean().item()
                self.early_stop.update(self.step, value, self.engine.weights)

    def record(self, evaluation: Evaluation) -> None:
        """Log an evaluation, write its images and scores, and bring the report up to date."""
        self._seconds.clear()
        self.run.log(evaluation.row(self.step))
        if self.run.is_main:
            save_evaluation(evaluation, self.folder, step=self.step)
            kept = [self.early_stop.best_step] if self.early_stop else []
            prune_image_grids(self.folder, most=self.config.max_image_grids, kept=kept)
            self.run.trackers.log_image("evaluation/images", image_grid(self.folder, self.step), step=self.step)
            self._write_report()
            self.print(self._table.line(self.step, evaluation, title=self.evaluation_title))

    def _write_report(self) -> Path | None:
        """Bring the report up to date; a damaged file of an earlier evaluation is said, and ends no training."""
        return report_or_warning(self.report, self.folder, say=self.print)

    def finish(self) -> Path:
        """Export the weights and write the last report, or say how to resume; return the run folder. Collective.

        Exported are the averaged weights, or with early_stop_reward those of the best evaluation. Nothing may follow.
        """
        num_steps, best = self.config.num_steps, self.early_stop
        is_complete = self.stopped_early or self.step == num_steps
        exported = self.averages["ema"].average if best is None or not is_complete else best.weights
        with exchanged(self.engine.weights, exported):
            if is_complete and best is not None and best.best_step != self.step:
                self.print(
                    f"{best.reward} was best after {best.best_step} of {self.step} steps ({best.best:z.3f}); those "
                    f"weights are exported."
                )
                self.run.log_export(best.best_step)
            with lora_at_scale(self.engine.weights, self.config.lora_scale):
                weights = gather_weights(self.engine, keep=self.run.is_main)
        if self.run.is_main and not self.is_sharded:  # for a caller in Python who goes on with the pipeline
            copy_weights(weights, into=self.engine.weights)
        if self.run.is_main and is_complete:
            export = self.policy.export(self.folder, weights, kohya=self.config.export_format == "both")
            self.print(before_after(read_metrics(self.folder), colours=has_colours()))
            report = self._write_report() or "not written"
            self.print(f"report    {report}\nimages    {self.folder / IMAGES}\nweights   {export}")
        elif self.run.is_main:
            self.print(
                f"Stopped after {self.step} of {num_steps} steps. Continue with: "
                f"--config {self.folder / CONFIG} --resume --run_folder {self.folder}"
            )
        self.run.close()
        return self.folder
