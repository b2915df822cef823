"""Train from Python: a recipe's `main` with a pipeline, prompts and a reward in place of names of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from accelerate.utils import extract_model_from_parallel

from rlhf_t2i.given import standing_for
from rlhf_t2i.output.run_folder import REPORT
from rlhf_t2i.rewards.load import WeightedSum, as_checked
from rlhf_t2i.rewards.table import reward_names
from rlhf_t2i.rewards.terms import join_terms
from rlhf_t2i.settings.groups import TrainerConfig
from rlhf_t2i.shapes.names import TOY_MODELS
from rlhf_t2i.training.metrics import Row, by_step, read_metrics, trained_rewards
from rlhf_t2i.types import Reward

ConfigT = TypeVar("ConfigT", bound=TrainerConfig, contravariant=True)
PROMPTS = "prompts given in Python"
"""Value of the option `prompts` of a run that was started from Python."""


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """A finished training: the tuned pipeline and what was measured."""

    folder: Path
    """Run folder, with the exported weights and report.html."""
    pipeline: Any
    """The diffusers pipeline with the exported weights; after LoRA training with the adapters in place."""
    metrics: list[Row]
    """One row for each training step, in order: reward, loss, seconds and others by name."""
    evaluations: list[Row]
    """One row for each evaluation, the first before training: the mean of each reward by its name, and others."""

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.folder / REPORT

    def __repr__(self) -> str:
        names = trained_rewards(self.metrics)
        first, last = self.evaluations[0], self.evaluations[-1]
        changes = [f"{name} {first[name]:.3g} -> {last[name]:.3g}" for name in names if name in first]
        kind = type(self.pipeline).__name__
        return f"TrainingResult({', '.join([f'{len(self.metrics)} steps', *changes, kind, str(self.folder)])})"


@runtime_checkable
class Train(Protocol[ConfigT]):
    """The function `train` of a recipe; see `from_python`."""

    def __call__(
        self,
        config: ConfigT,
        *,
        pipeline: Any = None,
        prompts: Sequence[str] | None = None,
        reward: Reward | WeightedSum | str | None = None,
    ) -> TrainingResult: ...


def from_python(main: Callable[[ConfigT], Path]) -> Train[ConfigT]:
    """Return the `train` of a recipe, which calls its `main` with the objects that a caller in Python has."""

    def train(
        config: ConfigT,
        *,
        pipeline: Any = None,
        prompts: Sequence[str] | None = None,
        reward: Reward | WeightedSum | str | None = None,
    ) -> TrainingResult:
        """Train a diffusion model in this process; return its metrics and the tuned pipeline.

        `pipeline` is a loaded diffusers pipeline, whose denoiser is trained in place; without it `config.model` is
        loaded. `prompts` are texts to train on, of which a part is held back for evaluation unless the config (or a
        built-in model) has evaluation_prompts. `reward` is a function of images and prompts, a sum that `load_rewards`
        returned, or names. They precede the options model, prompts and rewards of `config`, and options that were not
        given get the defaults of the pipeline's family. Raises ValueError for what cannot work, before anything is
        sampled.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("train() is for one process; for several start the recipe by accelerate launch.")
        config, objects = _named(config, pipeline=pipeline, prompts=prompts, reward=reward)
        if pipeline is None:
            from rlhf_t2i.models.load import load_stock_pipeline  # takes seconds

            pipeline = load_stock_pipeline(config.model)
        with standing_for({**objects, config.model: pipeline}):
            folder = main(config)
        _release(pipeline)
        rows = read_metrics(folder)
        return TrainingResult(folder, pipeline, by_step(rows, "train"), by_step(rows, "evaluation"))

    train.__module__ = main.__module__
    train.__qualname__ = "train"
    return train


def _named(
    config: ConfigT, *, pipeline: Any, prompts: Sequence[str] | None, reward: Reward | WeightedSum | str | None
) -> tuple[ConfigT, dict[str, Any]]:
    """Return the config with names for the objects, and the objects by these names."""
    names: dict[str, str] = {}
    objects: dict[str, Any] = {}
    if pipeline is not None:
        names["model"] = _model_name(pipeline)
    if prompts is not None:
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts) or not prompts:
            raise ValueError(f"prompts is {prompts!r}; it must be a list of texts, such as ['a fox'].")
        names["prompts"], objects[PROMPTS] = PROMPTS, list(prompts)
    if isinstance(reward, str):
        names["rewards"] = reward
    elif isinstance(reward, WeightedSum):
        names["rewards"] = ",".join(f"{join_terms([term.name])}={weight!r}" for term, weight in reward.terms)
        objects |= {term.name: term for term in reward.rewards}
    elif reward is not None:
        name = _reward_name(reward)
        names["rewards"], objects[name] = join_terms([name]), reward
    return config.with_options(**names), objects


def _model_name(pipeline: Any) -> str:
    """Return where a pipeline was loaded from, or its class if it was not loaded."""
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    if getattr(getattr(pipeline, component, None), "peft_config", None):
        raise ValueError(
            "The pipeline has a LoRA already; keep it by pipeline.fuse_lora() and then pipeline.unload_lora_weights()."
        )
    source = str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
    toys = (name for name, folder in TOY_MODELS.items() if Path(source).resolve() == folder.resolve())
    return next(toys, source)


def _reward_name(reward: Reward) -> str:
    """Return `module:function` for a function that can be imported, so that others can resume the run, or its name."""
    module, function = getattr(reward, "__module__", None), getattr(reward, "__qualname__", "")
    if module not in (None, "__main__") and getattr(sys.modules.get(str(module)), function, None) is reward:
        return f"{module}:{function}"
    name = as_checked(reward).name
    return f"python:{name}" if name in reward_names() else name


def _release(pipeline: Any) -> None:
    """Undo what training does to the denoiser besides changing its weights."""
    for name in ("unet", "transformer"):
        if (network := getattr(pipeline, name, None)) is not None:
            extract_model_from_parallel(network, keep_fp32_wrapper=False)
            network.requires_grad_(False).eval()
