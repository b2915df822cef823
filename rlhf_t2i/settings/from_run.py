"""Settings of the run that trained the weights which an evaluation or a search uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_t2i.output.run_folder import CONFIG, EVALUATION_PROMPTS, paths_start, read_config, run_of
from rlhf_t2i.settings.by_model import ByModel
from rlhf_t2i.settings.paths import Inputs, Rewards, resolve_paths
from rlhf_t2i.settings.ranges import BASE
from rlhf_t2i.shapes.names import TOY_MODELS, TOY_PROMPTS

_PATHS = {
    "model": Inputs(names=tuple(TOY_MODELS)),
    "evaluation_prompts": Inputs(names=(TOY_PROMPTS,)),
    "evaluation_rewards": Rewards(),
}
"""Settings with paths that are read from runs, and the kinds of text they are."""


def sampling_of_runs(weights: Sequence[str], model: str | ByModel) -> Mapping[str, Any]:
    """Return the model, resolution, steps, guidance and evaluation of the runs that `weights` are from; {} without one.

    `weights` are folders of runs, or of what they wrote. Raises ValueError if they are from runs of two models, or
    `model` was given and is another one.
    """
    runs = [run for run in (run_of(Path(name)) for name in weights if name != BASE) if run is not None]
    found = {run: config for run in runs if "model" in (config := _settings_of(run))}
    bases = {str(run): str(config["model"]) for run, config in found.items()}
    if isinstance(model, str):
        bases["--model"] = model
    if len({_identity(name) for name in bases.values()}) > 1:
        named = ", ".join(f"{where} is {name}" for where, name in bases.items())
        raise ValueError(f"weights of different models cannot be used together: {named}.")
    return _sampling(*next(iter(found.items()))) if found else {}


def _settings_of(run: Path) -> dict[str, Any]:
    """The settings of a run, with its relative paths as the working directory needs them."""
    config, folder = read_config(run), paths_start(run / CONFIG)
    given = {name: kind for name, kind in _PATHS.items() if config.get(name)}
    return config | {name: resolve_paths(config[name], kind, folder=folder) for name, kind in given.items()}


def _identity(model: str) -> str:
    """The absolute path of a folder, so that it may be given in several ways."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _sampling(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    steps = config.get("num_evaluation_steps") or config["num_denoising_steps"]
    prompts = config.get("evaluation_prompts") or str(run / EVALUATION_PROMPTS)
    return {
        **{name: config[name] for name in ("model", "resolution", "guidance_scale")},
        "num_denoising_steps": steps,
        "num_evaluation_steps": steps,
        "evaluation_prompts": prompts,
        "evaluation_rewards": config["evaluation_rewards"],
    }
