"""Rollouts keep little more memory than their result, and are replayed with equally many rows."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recipes import ddpo, flow_grpo
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.distributed.memory import peak_bytes
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.sampling.rollout import encode_distinct, noise_of_rollout, rollout
from rlhf_t2i.training.policy_gradient import UpdateWarnings
from rlhf_t2i.types import Conditioning, Level, Prediction, Sampler, Trajectory
from tests.runs import REDNESS, as_for_toy_models, rows
from tests.toys import GaussianModel, seeded

PROMPTS = ["a fox"] * 6 + ["a cat"] * 6


class LargeLatents(GaussianModel):
    """Latents of 4 x 16 x 16, images of 3 x 32 x 32 and a conditioning of 60 x 64 for each prompt."""

    def initial_noise(self, generators: Any, *, copies: int) -> Tensor:
        return super().initial_noise(generators, copies=copies).repeat(1, 4, 16, 16)

    def encode(self, prompts: Any) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 60, 64))

    def predict(
        self, latents: Tensor, level: Level, conditioning: Conditioning, *, guidance_scale: float
    ) -> Prediction:
        return Prediction(latents, latents)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat(1, 1, 2, 2)


def test_the_peak_of_a_rollout_is_at_most_1_15_times_what_it_keeps() -> None:
    model = LargeLatents()
    sampler = Sampler(schedule := model.schedule(10), stochastic(schedule, eta=1.0))
    kept: list[Any] = []
    for on_images in (None, lambda images, prompts: None):
        peak = peak_bytes(nn.Module(), lambda on_images=on_images: kept.append(rollout(
            model, PROMPTS, sampler=sampler, generators=seeded(1, 2), microbatch_size=1, on_images=on_images
        )))  # fmt: skip
        images, trajectory = kept.pop()
        encoded = trajectory.conditioning.distinct
        assert len(encoded) == 2
        size = sum(each.nbytes for each in (images, trajectory.latents, trajectory.log_probs, encoded.states))
        assert size < peak <= 1.15 * size
    known = nn.Module()
    known.register_buffer("latents", trajectory.latents)
    peak = peak_bytes(known, lambda: kept.append(noise_of_rollout(model, trajectory, generators=seeded(1, 2))))
    assert peak <= 1.15 * kept[0].nbytes + model.initial_noise(seeded(1), copies=12).nbytes


@pytest.mark.parametrize(("microbatch_size", "expected"), [(12, 12), (8, 6), (5, 4), (1, 1), (99, 12)])
def test_microbatches_are_as_equal_as_they_can_be_and_the_last_one_is_filled_up(
    microbatch_size: int, expected: int
) -> None:
    model = GaussianModel()
    sampler = Sampler(schedule := model.schedule(3), stochastic(schedule, eta=1.0))
    for on_images in (None, lambda images, prompts: None):
        model.rows.clear()
        _, trajectory = rollout(
            model, PROMPTS, sampler=sampler, generators=seeded(1, 2, 3), microbatch_size=microbatch_size,
            on_images=on_images,
        )  # fmt: skip
        assert set(model.rows) == {trajectory.num_rows}
        assert on_images is not None or trajectory.num_rows == expected
        assert trajectory.num_rows <= microbatch_size


def test_a_prompt_is_encoded_once_whatever_the_number_of_its_images() -> None:
    encoded = encode_distinct(LargeLatents(), PROMPTS)
    encoded.distinct.states[1] = 1.0
    assert (len(encoded), len(encoded.distinct)) == (12, 2)
    assert_close(encoded[torch.tensor([0, 11])].states[:, 0, 0], torch.tensor([0.0, 1.0]))
    assert_close(encoded[5:7].states[:, 0, 0], torch.tensor([0.0, 1.0]))


OPTIONS = as_for_toy_models(
    prompts_per_step=2, images_per_prompt=5, num_denoising_steps=3, window_end=1.0, num_inner_epochs=1,
    num_minibatches=1, microbatch_size=4, kl_weight=0.1, rewards=REDNESS, evaluation_rewards=REDNESS, num_steps=2,
    evaluate_every=0, num_evaluation_images=2, num_cpu_threads=1,
)  # fmt: skip


@pytest.mark.parametrize(("recipe", "model"), [(ddpo, "tiny_sd"), (flow_grpo, "tiny_sd3")])
def test_an_update_replays_with_as_many_rows_as_were_sampled_and_then_frees_the_rollout(
    recipe: Any, model: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten images in microbatches of at most four: three of four, the last of them filled up."""
    num_rows: list[int] = []
    earlier: list[weakref.ref[torch.UntypedStorage]] = []
    predict, sample, update = DiffusionPolicy.predict, recipe.rollout, recipe.update

    def counted(policy: DiffusionPolicy, latents: Tensor, *arguments: Any, **named: Any) -> Prediction:
        num_rows.append(len(latents))
        return predict(policy, latents, *arguments, **named)

    def sampled(*arguments: Any, **named: Any) -> tuple[Tensor, Trajectory]:
        assert all(storage() is None for storage in earlier), "the rollout before is still in memory"
        num_rows.clear()
        images, trajectory = sample(*arguments, **named)
        assert set(num_rows) == {trajectory.num_rows} == {4}
        earlier[:] = [weakref.ref(each.untyped_storage()) for each in (images, trajectory.latents)]
        return images, trajectory

    def updated(*arguments: Any, **named: Any) -> dict[str, float]:
        assert earlier[0]() is None, "the images are still in memory"
        num_rows.clear()
        metrics = update(*arguments, **named)
        assert set(num_rows) == {4}
        return metrics

    for owner, name, replacement in (
        (DiffusionPolicy, "predict", counted), (recipe, "rollout", sampled), (recipe, "update", updated)
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, replacement)
    folder = recipe.main(
        recipe.Config(
            **as_for_toy_models(
                model=str(request.getfixturevalue(model)), lora_rank=2, prompts_per_step=2, images_per_prompt=5,
                num_denoising_steps=3, window_end=1.0, num_minibatches=1, microbatch_size=4, kl_weight=0.1,
                rewards=REDNESS, evaluation_rewards=REDNESS, num_steps=2, evaluate_every=0, num_evaluation_images=2,
                num_cpu_threads=1, mixed_precision="bf16", run_folder=str(tmp_path / "run"),
            )
        )
    )  # fmt: skip
    assert len(earlier) == 2
    assert [row["replay_error"] for row in rows(folder, "train")] == [0, 0]


def test_a_replay_error_is_told_in_clip_ranges_and_again_only_when_it_grows_tenfold() -> None:
    told: list[str] = []
    warn = UpdateWarnings(told.append)
    for step, error in enumerate((0.0, 9e-6, 7e-4, 7e-4, 6e-3, 8e-3, float("nan"))):
        warn(step, {"replay_error": error, "ratio_std": 1e-4, "clip_range": 1e-4})
    assert [line.split(" replaying")[0] for line in told] == [f"WARNING: in step {n}" for n in (3, 6, 7)]
    assert "by 7.0e-04, 7 times the clip_range (1.0e-04)" in told[0]
