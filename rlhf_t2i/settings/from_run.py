"""Settings of the run that trained the weights which an evaluation or a search uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_t2i.output.run_folder import EVALUATION_PROMPTS, read_config, run_of
from rlhf_t2i.settings.by_model import ByModel

BASE = "base"
"""Name of the model itself among weights."""


def sampling_of_runs(weights: Sequence[str], model: str | ByModel) -> Mapping[str, Any]:
    """Return the model, resolution, steps, guidance and evaluation of the runs that `weights` are from; {} without one.

    `weights` are folders of runs, or of what they wrote. Raises ValueError if they are from runs of two models, or
    `model` was given and is another one.
    """
    runs = [run for run in (run_of(Path(name)) for name in weights if name != BASE) if run is not None]
    found = {run: config for run in runs if "model" in (config := read_config(run))}
    bases = {str(run): str(config["model"]) for run, config in found.items()}
    if isinstance(model, str):
        bases["--model"] = model
    if len({_identity(name) for name in bases.values()}) > 1:
        named = ", ".join(f"{where} is {name}" for where, name in bases.items())
        raise ValueError(f"weights of different models cannot be used together: {named}.")
    return _sampling(*next(iter(found.items()))) if found else {}


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
