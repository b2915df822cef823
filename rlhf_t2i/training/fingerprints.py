"""What no option says, so that a run resumes with the prompts, rewards and processes that it began with."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rlhf_t2i.output.run_folder import read_run_info, update_run_info
from rlhf_t2i.passed import passed
from rlhf_t2i.prompt_rows import metadata_of
from rlhf_t2i.rewards.load import CheckedReward
from rlhf_t2i.training.prompt_sets import PromptSets
from rlhf_t2i.training.run import Run

_KEY = "fingerprints"
_DISTRIBUTION = "distribution"


def record_fingerprints(run: Run, prompts: PromptSets) -> None:
    """Write the fingerprints of prompts and passed rewards to run.json.

    Raises ValueError, naming what has changed, if a checkpoint is resumed and they are not those of its run.
    """
    found = {
        "prompts": _digest(json.dumps(metadata_of(prompts.training))),
        "evaluation_prompts": _digest(json.dumps(metadata_of(prompts.evaluation))),
        **{f"the reward {name}": reward_fingerprint(reward) for name, reward in passed().rewards.items()},
    }
    if run.resumed_from is not None:
        _check_equal(read_run_info(run.folder).get(_KEY, {}), found, run.folder)
    if run.is_main:
        update_run_info(run.folder, {_KEY: found})


def _check_equal(stored: Mapping[str, str], found: Mapping[str, str], folder: Path) -> None:
    changed = [name for name in found if stored.get(name, found[name]) != found[name]]
    if changed:
        raise ValueError(
            f"{folder} began with other content of {' and '.join(changed)}; resume it with the same, or start a new "
            f"run from its weights (init_lora, init_weights)."
        )


def record_distribution(folder: Path, strategy: str, *, is_resumed: bool) -> None:
    """Write strategy and number of processes to run.json, for training whose checkpoints fit no others.

    Raises ValueError, naming both, if a checkpoint is resumed and they are not those of its run.
    """
    state = PartialState()
    found = f"{strategy} on {state.num_processes} process{'es' * (state.num_processes != 1)}"
    began = read_run_info(folder).get(_DISTRIBUTION, found) if is_resumed else found
    if began != found:
        raise ValueError(
            f"{folder} began with {began} and would go on with {found}; its checkpoints fit the first only. Resume it "
            f"with the same processes, or start a new run."
        )
    if state.is_main_process:
        update_run_info(folder, {_DISTRIBUTION: found})


def reward_fingerprint(reward: Any) -> str:
    """Return the qualified name of a function or of an object's class, with a hash of its source where there is one."""
    while isinstance(reward, CheckedReward | partial):
        reward = reward.function if isinstance(reward, CheckedReward) else reward.func
    code = reward if hasattr(reward, "__qualname__") else type(reward)
    name = f"{code.__module__}.{code.__qualname__}"
    try:
        return f"{name} {_digest(inspect.getsource(code))}"
    except (OSError, TypeError):  # such as a function of a C library
        return name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
