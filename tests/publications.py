"""Finished runs to publish, and helpers around their publications."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.hub import TOKEN, FakeHub, running_hub

if TYPE_CHECKING:  # conftest.py imports this module for every test, so all that takes time is imported where it is used
    from rlhf_t2i.training.finished_run import FinishedRun

ROOT = Path(__file__).parent.parent
BASE = "some/base"
"""Hub id of the tiny Stable Diffusion in these tests."""


def reset_processes() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def finished_run(folder: Path, recipe: Any, **settings: Any) -> Path:
    """Train for one step with a learning rate that changes the images visibly."""
    from tests.runs import as_for_toy_models

    tiny: dict[str, Any] = {
        "num_steps": 1, "prompts_per_step": 2, "images_per_prompt": 4, "num_denoising_steps": 4, "learning_rate": 0.1,
        "num_evaluation_images": 4, "evaluate_every": 0, "rewards": "oracle", "num_cpu_threads": 1,
        "evaluation_rewards": "oracle,jpeg_compressibility",
    }  # fmt: skip
    recipe.main(recipe.Config(**as_for_toy_models(**{**tiny, **settings}), run_folder=str(folder)))
    reset_processes()
    return folder


def shard_weights(folder: Path) -> None:
    """Save a denoiser again in several files with an index, as diffusers saves a large one."""
    from diffusers import AutoModel

    network = AutoModel.from_pretrained(str(folder))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="20KB")


@pytest.fixture(scope="session")
def lora_run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from recipes import ddpo

    return finished_run(tmp_path_factory.mktemp("runs") / "lora", ddpo, model=str(tiny_sd), lora_rank=2)


@pytest.fixture(scope="session")
def unet_run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from recipes import ddpo

    return finished_run(tmp_path_factory.mktemp("runs") / "unet", ddpo, model=str(tiny_sd))


@pytest.fixture(scope="session")
def reward_model_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a reward model on a backbone in a folder that also holds pickled weights."""
    import torch
    from PIL import Image

    from recipes import train_reward_model
    from tests.reward_models import backbone_folder

    data, backbone = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("models") / "llava"
    shutil.copytree(backbone_folder("llava"), backbone)
    torch.save({}, backbone / "pytorch_model.bin")
    rows: list[str] = []
    for i in range(4):
        for name, colour in (("good", "white"), ("bad", "black")):
            Image.new("RGB", (28, 28), colour).save(data / f"{name}{i}.png")
        rows.append(json.dumps({"prompt": f"a fox {i}", "winner": f"good{i}.png", "loser": f"bad{i}.png"}))
    (data / "pairs.jsonl").write_text("\n".join(rows))
    config = train_reward_model.Config(
        backbone=str(backbone), train_data=str(data / "pairs.jsonl"), validation_data=str(data / "pairs.jsonl"),
        lora_rank=2, num_steps=2, evaluate_every=1, microbatch_size=2, num_cpu_threads=1, learning_rate=1e-2,
        run_folder=str(data / "run"),
    )  # fmt: skip
    train_reward_model.main(config)
    reset_processes()
    return data / "run"


@pytest.fixture(scope="session")
def publication(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The publication of `lora_run`."""
    from recipes import publish

    target = tmp_path_factory.mktemp("published") / "lora"
    return publish.main(publish.Config(run=str(lora_run), folder=str(target), base=BASE, license="openrail"))


@contextmanager
def only_hub(login: Path) -> Iterator[FakeHub]:
    """Replace the Hub by a fake one; HF_TOKEN is its token, and the token of a login is in the file `login`."""
    from huggingface_hub import constants

    with running_hub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(login))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with only_hub(tmp_path / "login") as hub:
        yield hub


def file_contents(folder: Path) -> dict[str, bytes]:
    from rlhf_t2i.hub.publication import list_files

    return {name: (folder / name).read_bytes() for name in list_files(folder)}


def code_blocks(publication: Path) -> list[str]:
    """Python code of a model card."""
    return re.findall(r"```python\n(.*?)\n```", (publication / "README.md").read_text(), flags=re.DOTALL)


def run_elsewhere(lines: list[str], *, hub: FakeHub, cwd: Path) -> str:
    """Run Python code in a fresh process that has no token and an empty cache of the fake Hub; returns its output."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cwd / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=cwd, env={**environment, **settings, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def two_evaluations(*, trained: float, held_out: float | None) -> FinishedRun:
    """A run whose rewards change by `trained` and `held_out`, each with a standard error of 0.05.

    The evaluations have 100 images and errors of 0.03 and 0.04.
    """
    from rlhf_t2i.training.finished_run import FinishedRun

    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "rewards/llava_reward": 0.5, "elapsed": 1.0, "images": 8}
    ]
    for step, error in ((0, 0.03), (1, 0.04)):
        scores: dict[str, float] = {"llava_reward": 0.5 + step * trained, "llava_reward/standard_error": error}
        if held_out is not None:
            scores |= {"oracle": 0.5 + step * held_out, "oracle/standard_error": error}
        rows.append({"kind": "evaluation", "step": step, "num_images": 100, **scores, "diversity": 0.3, "elapsed": 1.0})
    return FinishedRun(Path(), "lora", {}, {}, rows, {}, [])
