"""What every recipe that tunes a painter has in common: settings, and the work around its updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_t2i.config import Rule, check, names
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.distributed.state import gather_weights
from rlhf_t2i.distributed.types import Engine
from rlhf_t2i.prompts import load_prompts
from rlhf_t2i.rewards.load import WeightedSum, load_rewards
from rlhf_t2i.training.early_stop import EarlyStop
from rlhf_t2i.training.ema import Decay, MovingAverage, decay_after_a_start, exchanged
from rlhf_t2i.training.evaluation import Evaluation, evaluate, evaluation_set
from rlhf_t2i.training.run import Run, start_run
from rlhf_t2i.types import Policy, Sampler


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings that all recipes share, in the order of the flow. A recipe adds its own."""

    prompts: str = "shapes"
    """A UTF-8 file with one prompt a line (or .jsonl), or the built-in world's training prompts."""
    evaluation_prompts: str = "shapes"
    """The same for evaluation; of the built-in world the held-out prompts."""

    model: str = "shapes"
    """A pipeline folder of diffusers, a Hub id, or a built-in model: shapes, or shapes-flow."""
    resolution: int | None = None
    """Height and width of images, in pixels; null is what the model was made for."""
    lora_rank: int | None = None
    """Rank of the trained adapters; null trains the whole denoiser."""
    lora_alpha: float | None = None
    """Adapters are scaled by alpha / rank; null stands for alpha = rank."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the networks; null takes what `accelerate launch` says. Densities are always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, about a third slower."""

    num_denoising_steps: int = 8
    guidance_scale: float = 1.0
    """Classifier-free guidance in rollout, update and evaluation; 1 is off and halves the cost."""
    microbatch_size: int = 64
    """Images in one forward pass. Changes memory and speed, never results."""

    offload_text_encoders: bool = False
    """Keep them in main memory; they are on the device only while they read prompts that are new."""
    gather_for_sampling: bool = True
    """Under ZeRO-3 and FSDP2: hold all weights while painting without gradient, which is fast; false gathers them layer
    by layer, each time, in less memory."""

    learning_rate: float = 3e-4
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_gradient_norm: float = 1.0
    max_skipped_updates: int = 10
    """An update whose gradient is not finite is left out; stop after so many in a row."""
    ema_decay: float = 0.0
    """Evaluate and export an exponential moving average of the weights; 0 is off."""

    num_steps: int = 40
    evaluate_every: int = 10
    """Steps between evaluations, which there always are before and after; 0 has no others."""
    num_evaluation_images: int = 408
    evaluation_rewards: str = "oracle,oracle_pass,llava_reward"
    """Comma-separated rewards. One that is not trained on shows how much of the gain is real; the report draws the
    gap."""
    num_evaluation_steps: int | None = None
    """Denoising steps in evaluation; null is num_denoising_steps."""
    evaluation_eta: float = 0.0
    evaluation_seed: int = 1_000_000
    lora_scale_at_sampling: float = 1.0
    """Adapters are so much weaker in evaluation and export than in training: below 1 is nearer to the base model."""
    early_stop_reward: str | None = None
    """One of evaluation_rewards, best one that is not trained on: export the weights with which it was highest ..."""
    patience: int = 3
    """... and stop once so many evaluations in a row were no better."""

    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    resume: bool = False
    """Go on with the newest whole checkpoint of run_folder, or of the newest run under runs/."""
    run_folder: str | None = None
    """Null is runs/RECIPE-DATE."""
    trackers: str = ""
    """Comma-separated, of wandb and tensorboard."""
    num_cpu_threads: int = 0
    """On a CPU; 0 shares all cores among the processes."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        check(self, self.rules())

    def rules(self) -> list[Rule]:
        """What the values must be; a recipe adds its own."""
        return [
            ("num_denoising_steps", self.num_denoising_steps >= 1, "at least 1"),
            ("guidance_scale", self.guidance_scale >= 1, "at least 1, which is off"),
            ("microbatch_size", self.microbatch_size >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("max_gradient_norm", self.max_gradient_norm > 0, "positive"),
            ("max_skipped_updates", self.max_skipped_updates >= 1, "at least 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
            ("num_steps", self.num_steps >= 1, "at least 1"),
            ("num_evaluation_images", self.num_evaluation_images >= 2, "at least 2"),
            ("resolution", self.resolution is None or self.resolution >= 1, "at least 1"),
            ("num_evaluation_steps", self.num_evaluation_steps is None or self.num_evaluation_steps >= 1, "at least 1"),
            ("evaluation_eta", 0 <= self.evaluation_eta <= 1, "in [0, 1]"),
            ("evaluation_seed", self.evaluation_seed >= 0, "at least 0"),
            ("lora_scale_at_sampling", self.lora_scale_at_sampling > 0, "positive"),
            (
                "lora_scale_at_sampling",
                self.lora_scale_at_sampling == 1 or self.lora_rank is not None,
                "1 where the whole denoiser is trained, which has no adapters to scale (lora_rank)",
            ),
            (
                "early_stop_reward",
                self.early_stop_reward in (None, *(part.split("=")[0] for part in names(self.evaluation_rewards))),
                f"one of evaluation_rewards ({self.evaluation_rewards})",
            ),
            (
                "evaluate_every",
                self.early_stop_reward is None or self.evaluate_every >= 1,
                "at least 1 for early_stop_reward to be looked at",
            ),
            ("patience", self.patience >= 1, "at least 1"),
            ("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ]

    def learning_rate_at(self, step: int) -> float:
        """Rises over the first warmup_steps, then stays."""
        return self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))


@dataclass(frozen=True)
class Trainer:
    """A policy that learns, and what is done around its updates: looking, saving, averaging, finishing."""

    config: TrainerConfig
    run: Run
    policy: Policy
    engine: Engine
    """What of the policy learns, as it is spread over the processes."""
    average: MovingAverage
    sampling_ema: MovingAverage
    """Weights that follow those that learn, for a recipe that paints with them."""
    judges: WeightedSum
    evaluation: tuple[list[str], list[int]]
    """Prompts and seeds of the images that are looked at."""
    early_stop: EarlyStop | None
    initial: Mapping[str, Tensor]
    """What the weights were before training, if that was to be kept."""

    def sampler(self, *, eta: float, num_steps: int | None = None) -> Sampler:
        """How this policy paints, with so much noise in each step; None is num_denoising_steps."""
        schedule = self.policy.schedule(num_steps or self.config.num_denoising_steps)
        return Sampler(schedule, stochastic(schedule, eta=eta), self.config.guidance_scale)

    def steps(self) -> Iterator[int]:
        """The steps still to do. Held-out prompts are looked at before the first."""
        if self.run.done == 0:
            self.look()
        for step in self.run.steps(self.config.num_steps):
            if self.stopped_early:
                break
            yield step

    @contextmanager
    def painting(self) -> Iterator[None]:
        """Within it this process paints without gradient, as often as it likes, whatever the others do."""
        if not self.config.gather_for_sampling:
            yield
            return
        with self.engine.gathered_network() as network:
            self.policy.denoiser = network
            try:
                yield
            finally:
                self.policy.denoiser = self.engine.network

    def optimizer_step(self) -> dict[str, float]:
        """One optimiser step along the gradients that have gathered.

        Returns their norm, and 1 if they were not finite: then all processes leave the step out. RuntimeError after
        max_skipped_updates of these in a row.
        """
        norm, skipped = self.engine.optimizer_step(self.config.learning_rate_at(self.run.done))
        self.run.count_skipped(skipped, most=self.config.max_skipped_updates)
        return {"gradient_norm": norm if math.isfinite(norm) else 0.0, "skipped_updates": float(skipped)}

    def finish_step(self, step: int, **row: float | int) -> None:
        """Average the weights and write the step down; look and save where it is time."""
        self.average.update(self.engine.weights)
        self.sampling_ema.update(self.engine.weights)
        self.run.finish_step(step, **row)
        finished = self.run.done == self.config.num_steps
        if finished or (self.run.due(self.config.evaluate_every) and not self.run.stopping):
            self.look()
        if finished or self.stopped_early or self.run.due(self.config.checkpoint_every) or self.run.stopping:
            self.run.save()

    @property
    def stopped_early(self) -> bool:
        """Whether the held-out reward has not risen for long enough."""
        return self.early_stop is not None and self.early_stop.is_due

    def look(self) -> None:
        """Paint the held-out prompts, with averaged weights, and let every judge speak."""
        with self.average.applied(self.engine.weights):
            seen = self._evaluate()
            self.run.record(seen)
            if self.early_stop is not None:
                value = seen.scores[self.early_stop.reward].mean().item()
                self.early_stop.see(self.run.done, value, self.engine.weights)

    def _evaluate(self) -> Evaluation:
        prompts, seeds = self.evaluation
        with self._as_sampled(), self.painting():
            return evaluate(
                self.policy, prompts, seeds, self.judges.rewards,
                sampler=self.sampler(eta=self.config.evaluation_eta, num_steps=self.config.num_evaluation_steps),
                batch_size=self.config.microbatch_size, run=self.run,
            )  # fmt: skip

    @contextmanager
    def _as_sampled(self) -> Iterator[None]:
        """Within it adapters are as strong as in evaluation and export."""
        from rlhf_t2i.models.lora import lora_scaled  # takes seconds

        weights, scale = self.engine.weights, self.config.lora_scale_at_sampling
        with exchanged(weights, lora_scaled(weights, scale) if scale != 1 else {}):
            yield

    def finish(self) -> Run:
        """Write the weights for others, the best if the run looked for them, and the last report."""
        num_steps, best = self.config.num_steps, self.early_stop
        whole = self.stopped_early or self.run.done == num_steps
        chosen = self.average.average if best is None or not whole else best.weights
        with exchanged(self.engine.weights, chosen):
            if whole and best is not None and best.best_step != self.run.done:
                self.run.say(
                    f"{best.reward} was best after {best.best_step} of {self.run.done} steps ({best.best:.3f}). Those "
                    f"weights are exported, and evaluated once more for the report."
                )
                self.run.record(self._evaluate())
            with self._as_sampled():
                weights = gather_weights(self.engine, keep=self.run.is_main)
        export = partial(self.policy.export, weights=weights)
        self.run.finish(export=export, num_steps=self.run.done if whole else num_steps)
        return self.run


def start_trainer(
    config: TrainerConfig,
    *,
    recipe: str,
    keep_reference: bool = False,
    keep_initial: bool = False,
    sampling_ema_decay: Decay | None = None,
    extra: Sequence[Any] = (),
) -> Trainer:
    """Load everything, wrap it for this machine, and take up the run that is to be resumed, if any.

    Checkpoints also hold each of `extra`, which have a state_dict. With `keep_reference` the policy can be asked what
    it predicted before training, with `keep_initial` the weights of that time are known; with `follow` there is a
    follower. Raises what `load_rewards`,
    `load_prompts`, `start_run` and the model's loader do.
    """
    from rlhf_t2i.models.load import load_policy  # takes seconds

    judges = load_rewards(config.evaluation_rewards)
    held_out = load_prompts(config.evaluation_prompts, held_out=True)
    evaluation = evaluation_set(held_out, num_images=config.num_evaluation_images, seed=config.evaluation_seed)
    run = start_run(asdict(config), recipe=recipe)
    policy = load_policy(config.model, device=run.device, dtype=run.dtype, resolution=config.resolution)
    policy.learn(config.lora_rank, lora_alpha=config.lora_alpha, keep_reference=keep_reference, seed=config.seed)
    if config.offload_text_encoders:
        policy.offload_text_encoders()
    if config.gradient_checkpointing:
        policy.checkpoint_gradients()
    optimizer = torch.optim.AdamW(
        policy.trainable.values(),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    engine = run.prepare(
        policy.denoiser, optimizer,
        max_gradient_norm=config.max_gradient_norm, microbatch_size=config.microbatch_size,
        num_averages=(config.ema_decay > 0) + (sampling_ema_decay is not None), reference=policy.reference is not None,
    )  # fmt: skip
    policy.denoiser = engine.network
    if policy.reference is not None:
        policy.reference = engine.spread(policy.reference)
    average = MovingAverage(engine.weights, decay=decay_after_a_start(config.ema_decay))
    sampling_ema = MovingAverage(engine.weights, decay=sampling_ema_decay)
    initial = {name: weight.detach().clone() for name, weight in engine.weights.items() if keep_initial}
    early_stop = EarlyStop(config.early_stop_reward, patience=config.patience) if config.early_stop_reward else None
    best = {"best": early_stop.weights} if early_stop else {}
    following = {"follower": sampling_ema.average} if sampling_ema_decay else {}
    run.restore(
        {"average": average.average, **following, **best},
        extra=[average, *([sampling_ema] if sampling_ema_decay else []), *extra, *([early_stop] if early_stop else [])],
    )
    return Trainer(config, run, policy, engine, average, sampling_ema, judges, evaluation, early_stop, initial)
