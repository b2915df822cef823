"""Recipes in processes of their own, alone or by `accelerate launch`; forked unless a test wants a real start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_t2i.settings.ddpo import Config as DdpoConfig
from rlhf_t2i.settings.groups import TrainerConfig
from tests import processes
from tests.runs import REDNESS, as_for_toy_models

ROOT = Path(__file__).parent.parent


def small_ddpo(model: Path, run_folder: Path) -> DdpoConfig:
    """Three steps of a tiny model with a LoRA, a KL penalty and an EMA, in batches that two processes share."""
    return DdpoConfig(
        **as_for_toy_models(
            model=str(model), prompts_per_step=4, images_per_prompt=4, microbatch_size=8, num_minibatches=2,
            num_denoising_steps=3, rewards=REDNESS, evaluation_rewards=REDNESS, lora_rank=4, kl_weight=0.1,
            learning_rate=1e-3, ema_decay=0.5, num_steps=3, checkpoint_every=1, keep_checkpoints=3,
            num_evaluation_images=8, evaluate_every=0, num_cpu_threads=1, run_folder=str(run_folder),
            adam_epsilon=1e-3,  # or Adam amplifies gradients that are rounding errors
        )
    )  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def recipe_of(config: TrainerConfig) -> str:
    """The name of the recipe whose settings these are."""
    return type(config).__module__.rpartition(".")[2]


def command_line(config: TrainerConfig) -> list[str]:
    """All settings as options."""
    return [part for name, value in asdict(config).items() for part in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def start(config: TrainerConfig, *launcher: str) -> Any:
    """Start a recipe in a process of its own; with `launcher`, arguments of Python before it, without forking."""
    return (subprocess.Popen if launcher else processes.start)(
        [sys.executable, *launcher, f"recipes/{recipe_of(config)}.py", *command_line(config)],
        cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def launcher(accelerate_config: str, *options: str) -> list[str]:
    """The start of a command: `accelerate launch` with one of accelerate_configs/."""
    module = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{accelerate_config}"]
    return [sys.executable, *module, *options]


def launch_command(config: TrainerConfig, accelerate_config: str, *options: str) -> list[str]:
    """The `accelerate launch` of a recipe; `options` are those of the launcher."""
    return [*launcher(accelerate_config, *options), f"recipes/{recipe_of(config)}.py", *command_line(config)]


def launch(config: TrainerConfig, accelerate_config: str = "single.yaml", *options: str) -> Path:
    """Run a recipe by `accelerate launch` to its end; returns the run folder."""
    result = processes.run(launch_command(config, accelerate_config, *options))
    assert result.returncode == 0, result.stdout + result.stderr
    return Path(str(config.run_folder))


def launch_in_turn(configs: Sequence[TrainerConfig], accelerate_config: str, folder: Path) -> None:
    """Run recipes one after the other by one `accelerate launch`."""
    path = folder / "configs.json"
    path.write_text(json.dumps([[recipe_of(config), asdict(config)] for config in configs]))
    result = processes.run([*launcher(accelerate_config), "tests/recipes_in_turn.py", str(path)])
    assert result.returncode == 0, result.stdout + result.stderr


def num_train_rows(folder: Path) -> int:
    """Training steps logged so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def wait_for_steps(process: Any, folder: Path, *, more_than: int) -> None:
    """Wait until more than so many training steps are logged, for two minutes at most."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        if num_train_rows(folder) > more_than:
            return
        time.sleep(0.05)
    raise AssertionError("The run made no progress.")
