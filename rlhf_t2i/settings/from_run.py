"""Settings of the run that trained the weights which an evaluation or a search uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_t2i.models.table import same_model
from rlhf_t2i.output.run_folder import CONFIG, EVALUATION_PROMPTS, paths_start, read_config, run_of
from rlhf_t2i.rewards.terms import reward_names_of
from rlhf_t2i.settings.by_model import ByModel, as_text
from rlhf_t2i.settings.image_size import SIZE_OPTIONS
from rlhf_t2i.settings.paths import Rewards, resolve_paths
from rlhf_t2i.settings.ranges import BASE

_OF_THE_MODEL = ("num_denoising_steps", "num_evaluation_steps", "guidance_scale")
"""Options of sampling that a distilled model and its base have different values of."""


def sampling_of_runs(weights: Sequence[str], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model, image size, steps, guidance and evaluation of the runs that `weights` are from; {} without one.

    `weights` are folders of runs, or of what they wrote; `options` are those of the command, with a `ByModel` for each
    that was not given. One option of the image size replaces the whole size of the runs. Raises ValueError for weights
    of different models, and if the runs differ in an option that was not given. The command's model may be another one
    than that of the runs, a sibling, if the options that depend on it are given too.
    """
    runs = [run for run in (run_of(Path(name)) for name in weights if name != BASE) if run is not None]
    found = {str(run): _sampling(run, config) for run in runs if "model" in (config := read_config(run))}
    models = {run: str(sampling["model"]) for run, sampling in found.items()}
    if not all(same_model(model, other) for model, other in pairwise(models.values())):
        named = ", ".join(f"{where} is {name}" for where, name in models.items())
        raise ValueError(f"weights of different models cannot be used together: {named}.")
    if isinstance(model := options["model"], str):
        _check_sibling(model, models, options)
    if not all(isinstance(options[name], ByModel) for name in SIZE_OPTIONS):
        found = {run: {n: v for n, v in sampling.items() if n not in SIZE_OPTIONS} for run, sampling in found.items()}
    first = next(iter(found.values()), {})
    for name in first:
        values = {run: sampling[name] for run, sampling in found.items()}
        is_open = name != "model" and isinstance(options.get(name), ByModel)
        if is_open and len({_content(name, value) for value in values.values()}) > 1:
            named = ", ".join(f"{run} has {as_text(value)}" for run, value in values.items())
            raise ValueError(f"the runs of the weights differ in {name}: {named}. Give --{name} for all of them.")
    return first


def _check_sibling(model: str, models: Mapping[str, str], options: Mapping[str, Any]) -> None:
    """Raise ValueError if steps or guidance are not given for another model than that of the runs."""
    named = ", ".join(f"{run} is {trained}" for run, trained in models.items() if not same_model(trained, model))
    lacking = [f"--{name}" for name in _OF_THE_MODEL if isinstance(options.get(name), ByModel)]
    if named and lacking:
        raise ValueError(
            f"--model is {model}, and weights of different models are used with it: {named}. A LoRA of a sibling may "
            f"be, with steps and guidance of the model: give {' and '.join(lacking)} too."
        )


def other_bases(weights: Sequence[str], model: str) -> dict[str, str]:
    """Return the model that each of `weights` was trained on, of those whose run trained another one than `model`."""
    runs = {name: run for name in weights if name != BASE and (run := run_of(Path(name))) is not None}
    trained = {name: read_config(run).get("model") for name, run in runs.items()}
    return {name: str(base) for name, base in trained.items() if base is not None and not same_model(base, model)}


def _content(name: str, value: Any) -> Any:
    """Return what is equal for equal settings: the content of a file of prompts, rewards in any order, or the value."""
    if name == "evaluation_prompts" and Path(value).is_file():
        return Path(value).read_bytes()
    return frozenset(reward_names_of(value)) if name == "evaluation_rewards" else value


def _sampling(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    steps = config.get("num_evaluation_steps") or config["num_denoising_steps"]
    prompts = config.get("evaluation_prompts") or str(run / EVALUATION_PROMPTS)
    return {
        **{name: config[name] for name in ("model", "guidance_scale")},
        **{name: config.get(name) for name in SIZE_OPTIONS},
        "complex_human_instruction": config.get("complex_human_instruction", True),  # older runs have no such option
        "num_denoising_steps": steps,
        "num_evaluation_steps": steps,
        "evaluation_prompts": prompts,
        "evaluation_rewards": resolve_paths(config["evaluation_rewards"], Rewards(), folder=paths_start(run / CONFIG)),
    }
