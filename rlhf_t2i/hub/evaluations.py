"""Evaluations of a run by recipes/evaluate_policy.py, also in other base models, for its model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_t2i.output.run_folder import (
    CONFIG,
    EVALUATION_TABLE,
    IMAGES,
    read_captions,
    read_config,
    read_evaluation_table,
    run_of,
)
from rlhf_t2i.settings.ranges import BASE
from rlhf_t2i.training.changes import fixed_with_error
from rlhf_t2i.training.finished_run import FinishedRun
from rlhf_t2i.training.metrics import ERROR, number


def with_evaluations(run: FinishedRun, folders: Sequence[str]) -> FinishedRun:
    """Return a run whose info has, under "evaluations", what folders of evaluations say of its weights.

    Raises FileNotFoundError for a folder that is no evaluation, and ValueError for one without weights of the run.
    """
    if not folders:
        return run
    if run.kind == "reward_model":
        raise ValueError(f"evaluations is {','.join(folders)}; it must be null for a reward model, {run.folder}.")
    return replace(run, info={**run.info, "evaluations": [_evaluation(run, Path(folder)) for folder in folders]})


def _evaluation(run: FinishedRun, folder: Path) -> dict[str, Any]:
    """Return the model that the weights were loaded into, how images were sampled, and a row for each reward."""
    if not (folder / EVALUATION_TABLE).is_file() or not (folder / CONFIG).is_file() or not (folder / IMAGES).is_dir():
        raise FileNotFoundError(f"{folder} is no finished run of recipes/evaluate_policy.py.")
    config, table = read_config(folder), read_evaluation_table(folder)
    own = next((name for name in table if name != BASE and _is_of(Path(name), run)), None)
    if own is None:
        raise ValueError(
            f"{folder} evaluates {', '.join(table)}, as seen from {Path.cwd()}, and none of them is of {run.folder}. "
            f"Name an evaluation with --weights {run.folder}."
        )
    rewards = [key.removesuffix(ERROR) for key in table[own] if key.endswith(ERROR)]
    return {
        "trained_on": run.config["model"],
        "model": config["model"],
        "num_images": len(read_captions(folder)["prompts"]),
        "num_steps": config["num_evaluation_steps"],
        "guidance_scale": config["guidance_scale"],
        "rows": [
            {"reward": reward, "without": _cell(table.get(BASE), reward), "with": _cell(table[own], reward)}
            for reward in rewards
        ],
    }


def _is_of(path: Path, run: FinishedRun) -> bool:
    return (run_of(path) or path).resolve() == run.folder.resolve()


def _cell(row: dict[str, Any] | None, reward: str) -> str:
    return "-" if row is None else fixed_with_error(number(row, reward), number(row, reward + ERROR))
