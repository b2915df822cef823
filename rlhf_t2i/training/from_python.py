"""Train from Python: a recipe's `main` with a pipeline, prompts and a reward in place of names of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import extract_model_from_parallel
from torch import nn

from rlhf_t2i.models.table import same_model
from rlhf_t2i.output.run_folder import REPORT
from rlhf_t2i.passed import PassedObjects, passing
from rlhf_t2i.prompt_rows import as_prompts
from rlhf_t2i.rewards.load import WeightedSum, as_checked
from rlhf_t2i.rewards.table import reward_names
from rlhf_t2i.rewards.terms import join_terms
from rlhf_t2i.settings.groups import TrainerConfig
from rlhf_t2i.shapes.names import TOY_MODELS
from rlhf_t2i.training.claim import remove_failed_starts
from rlhf_t2i.training.metrics import Row, by_step, evaluations_to_export, read_metrics, trained_rewards
from rlhf_t2i.types import MetadataReward, Reward

ConfigT = TypeVar("ConfigT", bound=TrainerConfig, contravariant=True)
PROMPTS = "prompts given in Python"
"""Value of the option `prompts` of a run that was started from Python."""


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """A training that has ended: the tuned pipeline and what was measured."""

    folder: Path
    """Run folder, with report.html and, if training is complete, the exported weights."""
    pipeline: Any
    """The diffusers pipeline with the weights that are exported (averaged, with ema_decay), in the precision in which
    it was given; after LoRA training with the adapters in place."""
    metrics: list[Row]
    """One row for each training step, in order: reward, loss, seconds and others by name."""
    evaluations: list[Row]
    """One row for each evaluation, the first before training: the mean of each reward by its name, and others."""
    exported: Row
    """The row of the evaluation of the exported weights: the last one, or with early_stop_reward the best."""

    @property
    def is_complete(self) -> bool:
        """False if Ctrl-C stopped training, before the evaluation that ends it.

        The run goes on by `train(config.with_options(resume=True, run_folder=str(result.folder)), ...)`.
        """
        return self.evaluations[-1]["step"] == self.metrics[-1]["step"]

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.folder / REPORT

    def __repr__(self) -> str:
        names = trained_rewards(self.metrics)
        first, last = self.evaluations[0], self.exported
        changes = [f"{name} {first[name]:.3g} -> {last[name]:.3g}" for name in names if name in first]
        count = len(self.metrics)
        steps = f"{'' if self.is_complete else 'stopped after '}{count} step{'s' * (count != 1)}"
        return f"TrainingResult({', '.join([steps, *changes, type(self.pipeline).__name__, str(self.folder)])})"


@runtime_checkable
class Train(Protocol[ConfigT]):
    """The function `train` of a recipe; see `from_python`."""

    def __call__(
        self,
        config: ConfigT,
        *,
        pipeline: Any = None,
        prompts: Sequence[str | Mapping[str, Any]] | None = None,
        reward: Reward | MetadataReward | WeightedSum | str | None = None,
    ) -> TrainingResult: ...


def from_python(main: Callable[[ConfigT], Path]) -> Train[ConfigT]:
    """Return the `train` of a recipe, which calls its `main` with the objects that a caller in Python has."""

    def train(
        config: ConfigT,
        *,
        pipeline: Any = None,
        prompts: Sequence[str | Mapping[str, Any]] | None = None,
        reward: Reward | MetadataReward | WeightedSum | str | None = None,
    ) -> TrainingResult:
        """Train a diffusion model in this process; return its metrics and the tuned pipeline.

        `pipeline` is a loaded diffusers pipeline, whose denoiser is trained in place, or the folder or Hub id of one;
        without it `config.model` is loaded. `prompts` are texts to train on, or rows with the text under "prompt", of
        which a part is held back for evaluation unless the config (or a built-in model) has evaluation_prompts.
        `reward` is a function of images and prompts, perhaps also of `metadata` (the rows), a sum that `load_rewards`
        returned, or names. They precede the options model, prompts and rewards of `config`, and options that were not
        given get the defaults of the pipeline's family. Raises ValueError for what cannot work, before anything is
        sampled.

        An error, or a second Ctrl-C, leaves the pipeline without a LoRA; all weights of a denoiser, if these are
        trained, are then those of the last step. The first Ctrl-C ends training after the current step.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("train() is for one process; for several start the recipe by accelerate launch.")
        names, objects = _named(pipeline, prompts, reward)
        with passing(objects):
            config = config.with_options(**names)
            if config.missing:
                raise ValueError(_missing_text(config))
            pipeline = objects.pipelines.get(config.model)
            if pipeline is None:
                from rlhf_t2i.models.load import load_stock_pipeline  # takes seconds

                pipeline = load_stock_pipeline(config.model)
            with passing(replace(objects, pipelines={config.model: pipeline})), _in_training(pipeline):
                folder = main(config)
        rows = read_metrics(folder)
        evaluations, exported = by_step(rows, "evaluation"), evaluations_to_export(rows)[-1]
        return TrainingResult(folder, pipeline, by_step(rows, "train"), evaluations, exported)

    train.__module__ = main.__module__
    train.__qualname__ = "train"
    return train


def _missing_text(config: TrainerConfig) -> str:
    """Return one line that asks for what a model other than a built-in one needs."""
    arguments = {"prompts": "prompts=['a fox', 'a pear']", "rewards": "reward=my_reward"}
    examples = ", ".join(arguments[name] for name in config.missing)
    return (
        f"the model {config.model} is not a built-in one, so {' and '.join(config.missing)} must be given to train, as "
        f"in train(config, {examples}), or in the config."
    )


def _named(
    pipeline: Any,
    prompts: Sequence[str | Mapping[str, Any]] | None,
    reward: Reward | MetadataReward | WeightedSum | str | None,
) -> tuple[dict[str, str], PassedObjects]:
    """Return values of the options model, prompts and rewards, and the objects that these name."""
    names: dict[str, str] = {}
    pipelines: dict[str, Any] = {}
    if isinstance(pipeline, str | Path):
        names["model"] = str(pipeline)
    elif pipeline is not None:
        names["model"] = _model_name(pipeline)
        pipelines[names["model"]] = pipeline
    texts: dict[str, Sequence[str]] = {}
    if prompts is not None:
        names["prompts"], texts[PROMPTS] = PROMPTS, as_prompts(prompts)
    rewards: dict[str, Reward | MetadataReward] = {}
    if isinstance(reward, str):
        names["rewards"] = reward
    elif isinstance(reward, WeightedSum):
        names["rewards"] = ",".join(f"{join_terms([term.name])}={weight!r}" for term, weight in reward.terms)
        rewards = {term.name: term for term in reward.rewards}
    elif reward is not None:
        name = _reward_name(reward)
        names["rewards"], rewards[name] = join_terms([name]), reward
    return names, PassedObjects(pipelines, texts, rewards)


def _model_name(pipeline: Any) -> str:
    """Return where a pipeline was loaded from, or its class if it was not loaded."""
    if not isinstance(getattr(pipeline, "components", None), dict):
        raise ValueError(
            f"pipeline is a {type(pipeline).__name__}; it must be a diffusers pipeline, or the folder or Hub id of one."
        )
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    if getattr(getattr(pipeline, component, None), "peft_config", None):
        raise ValueError(
            "The pipeline has a LoRA already; keep it by pipeline.fuse_lora() and then pipeline.unload_lora_weights()."
        )
    source = str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
    return next((name for name in TOY_MODELS if same_model(name, source)), source)


def _reward_name(reward: Reward | MetadataReward) -> str:
    """Return `module:function` for a function that can be imported, so that others can resume the run, or its name."""
    module, function = getattr(reward, "__module__", None), getattr(reward, "__qualname__", "")
    if module not in (None, "__main__") and getattr(sys.modules.get(str(module)), function, None) is reward:
        return f"{module}:{function}"
    name = as_checked(reward).name
    return f"python:{name}" if name in reward_names() else name


@contextmanager
def _in_training(pipeline: Any) -> Iterator[None]:
    """Context of a training in this process, after which the pipeline is one to sample with, and others may start."""
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    precisions = {parameter: parameter.dtype for part in modules for parameter in part.parameters()}
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    is_first = not is_initialized()
    try:
        yield
    except BaseException:
        denoiser.unload_lora()
        remove_failed_starts()
        raise
    finally:
        extract_model_from_parallel(denoiser, keep_fp32_wrapper=False)  # undoes what accelerate does to `forward`
        denoiser.requires_grad_(False).eval()
        for parameter, precision in precisions.items():
            parameter.data = parameter.data.to(precision)
        if is_first:  # or the next training could have no other mixed_precision
            AcceleratorState._reset_state()
            GradientState._reset_state()
