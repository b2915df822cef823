"""Training when memory runs out: microbatches are halved, and the run gives what it would have given with those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes import ddpo, diffusion_dpo, diffusion_nft, draft, flow_grpo
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.output.run_folder import read_run_info
from rlhf_t2i.settings.groups import TrainerConfig
from tests.launch import recipe_of
from tests.runs import REDNESS, as_for_toy_models, assert_same, rows, weights


@contextmanager
def scarce(*, fitting: int = 1000, at_call: int | None = None, in_sampling: bool = False) -> Iterator[list[int]]:
    """Let memory run out in forward passes of more than `fitting` images, or in one call; yields sizes of passes.

    It runs out in the update, or with `in_sampling` also without gradient.
    """
    original, sizes = DiffusionPolicy.predict, list[int]()

    def predict(policy: DiffusionPolicy, latents: Tensor, *arguments: Any, **options: Any) -> Any:
        if in_sampling or torch.is_grad_enabled():
            sizes.append(len(latents))
            if len(latents) > fitting or len(sizes) == at_call:
                raise torch.OutOfMemoryError("there is no room")
        return original(policy, latents, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DiffusionPolicy, "predict", predict)
        yield sizes


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Two steps on eight images, in one microbatch."""
    return {
        **as_for_toy_models(), "num_denoising_steps": 2, "microbatch_size": 8, "learning_rate": 1e-3,
        "adam_epsilon": 1e-3, "rewards": REDNESS, "evaluation_rewards": REDNESS, "num_steps": 2, "evaluate_every": 0,
        "num_evaluation_images": 2, "checkpoint_every": 1, "run_folder": str(tmp_path / "run"), "num_cpu_threads": 1,
        "prompts_per_step": 2,
    }  # fmt: skip


@pytest.fixture
def config(options: dict[str, Any], tiny_sd: Path) -> ddpo.Config:
    """DDPO, two optimiser steps on each rollout."""
    return ddpo.Config(**options, model=str(tiny_sd), images_per_prompt=4, num_minibatches=2, window_end=1.0)


def run(config: TrainerConfig) -> Path:
    return import_module(f"recipes.{recipe_of(config)}").main(config)


_OTHERS = ("diffusion_dpo", "draft", "flow_grpo", "diffusion_nft")


@pytest.mark.parametrize("recipe", ["ddpo", *(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS)])
def test_a_run_that_halves_its_microbatches_equals_one_that_began_with_them(
    recipe: str, config: ddpo.Config, options: dict[str, Any], tiny_sd: Path, tiny_sd3_lean: Path, tmp_path: Path
) -> None:
    sd, sd3 = {**options, "model": str(tiny_sd)}, {**options, "model": str(tiny_sd3_lean), "lora_rank": 2}
    configs: dict[str, Any] = {
        "ddpo": lambda: config,
        "diffusion_dpo": lambda: diffusion_dpo.Config(**sd, images_per_prompt=8, pair_selection="all"),
        "draft": lambda: draft.Config(**{**sd, "prompts_per_step": 8}),
        "flow_grpo": lambda: flow_grpo.Config(**sd3, images_per_prompt=4, kl_weight=0.01),
        "diffusion_nft": lambda: diffusion_nft.Config(**sd3, images_per_prompt=4),
    }
    halved = configs[recipe]()
    expected = run(replace(halved, microbatch_size=2, run_folder=str(tmp_path / "expected")))
    with scarce(fitting=2) as sizes:
        folder = run(halved)
    assert max(sizes) > 2
    assert_same(weights(folder, 2), weights(expected, 2), atol=1e-6)
    assert read_run_info(folder)["microbatch_size"] == {"given": 8, "found": 2}
    own, other = rows(folder, "train"), rows(expected, "train")
    assert [row["loss"] for row in own] == pytest.approx([row["loss"] for row in other], rel=1e-3, abs=1e-6)


def test_after_halving_in_the_update_ratios_are_those_of_as_many_rows(config: ddpo.Config) -> None:
    """The old log-probabilities are computed anew in the update's own forward passes."""
    config = replace(config, mixed_precision="bf16", lora_rank=2, num_steps=1)
    with scarce(fitting=2):
        folder = run(config)
    assert rows(folder, "train")[0]["replay_error"] == 0


def test_gradients_of_an_attempt_that_ran_out_of_memory_are_forgotten(config: ddpo.Config, tmp_path: Path) -> None:
    """In the second microbatch of an optimiser step, and in the second step, whose rollout had more rows."""
    config = replace(config, microbatch_size=4, num_steps=1)
    expected = run(replace(config, run_folder=str(tmp_path / "expected")))
    for at_call in (2, 4):
        with scarce(at_call=at_call) as sizes:
            folder = run(replace(config, run_folder=str(tmp_path / str(at_call))))
        assert sizes[at_call - 2 : at_call + 1] == [4, 4, 2]
        assert_same(weights(folder, 1), weights(expected, 1), atol=1e-6)


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sampling_that_runs_out_of_memory_starts_again_with_half_the_images(
    config: ddpo.Config, tmp_path: Path, asynchronous: bool
) -> None:
    """From the same noise; what an attempt handed to an asynchronous reward is not scored twice."""
    config = replace(config, async_reward=asynchronous, num_steps=1)
    expected = run(replace(config, run_folder=str(tmp_path / "expected")))
    with scarce(fitting=4, in_sampling=True):
        folder = run(config)
    assert_same(weights(folder, 1), weights(expected, 1), atol=1e-5)


def test_a_resumed_run_begins_with_the_size_that_was_found_unless_another_is_given(config: ddpo.Config) -> None:
    with scarce(fitting=2):
        run(replace(config, num_steps=1))
    with scarce() as sizes:
        run(replace(config, resume=True))
    assert set(sizes) == {2}
    with scarce() as sizes:
        run(replace(config, resume=True, num_steps=3, microbatch_size=4))
    assert set(sizes) == {4}


def test_what_does_not_fit_with_one_image_ends_with_the_remedies(config: ddpo.Config) -> None:
    with scarce(fitting=0), pytest.raises(RuntimeError, match=r"with one image.*gradient_checkpointing"):
        run(config)


def test_sharded_networks_name_the_size_to_continue_with(config: ddpo.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving would need weights that other processes no longer send."""
    monkeypatch.setattr("rlhf_t2i.training.microbatches.Replicated", type("Other", (), {}))
    with scarce(fitting=2), pytest.raises(RuntimeError, match="Set microbatch_size to 4 and continue with --resume"):
        run(config)
