"""The Diffusion-DPO recipe end to end on a tiny random pipeline: training, equal results, resuming, sampled pairs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

from recipes import diffusion_dpo
from reward_model.datasets import BadRecordError
from reward_model.images import to_tensor
from rlhf_t2i.config import parse_config
from rlhf_t2i.data.augmentation import Augmentation
from rlhf_t2i.data.image_pairs import PairBatch
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.seeds import generator_for
from rlhf_t2i.types import Policy
from tests.launch import ROOT
from tests.preference_files import red_and_blue_pairs
from tests.runs import FLAT, REDNESS, as_for_toy_models, assert_same, rows, unet_weights, weights


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> diffusion_dpo.Config:
    """Three steps on sampled pairs that use every part of the recipe."""
    return diffusion_dpo.Config(
        **as_for_toy_models(
            model=str(tiny_sd),
            prompts_per_step=4,
            images_per_prompt=3,
            num_denoising_steps=4,
            num_inner_epochs=2,
            microbatch_size=8,
            learning_rate=1e-3,
            adam_epsilon=1e-3,  # or Adam amplifies gradients that are rounding errors
            ema_decay=0.5,
            beta=500.0,
            dpop_weight=0.5,
            timesteps="0-999",
            rewards=REDNESS,
            evaluation_rewards=REDNESS,
            num_steps=3,
            evaluate_every=0,
            num_evaluation_images=4,
            checkpoint_every=1,
            run_folder=str(tmp_path / "run"),
            num_cpu_threads=1,
        )
    )


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    return red_and_blue_pairs(tmp_path)


def train(config: diffusion_dpo.Config) -> Path:
    """Run the recipe in this process; returns the run folder."""
    return diffusion_dpo.main(config)


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 16])
def test_sampled_pairs_raise_the_reward(tmp_path: Path, lora_rank: int | None) -> None:
    """On evaluation prompts and seeds, for the toy model."""
    folder = train(
        diffusion_dpo.Config(
            rewards=REDNESS, evaluation_rewards=REDNESS, prompts_per_step=8, images_per_prompt=8,
            num_denoising_steps=4, num_steps=6, num_evaluation_images=34, evaluate_every=0,
            lora_rank=lora_rank, learning_rate=1e-2 if lora_rank else 3e-4,
            run_folder=str(tmp_path / "run"), num_cpu_threads=1,
        )
    )  # fmt: skip
    before, after = rows(folder, "evaluation")
    assert after[REDNESS] > before[REDNESS] + 0.02


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_the_policy_equals_its_reference_in_the_first_step(
    config: diffusion_dpo.Config, preferences: Path, lora_rank: int | None
) -> None:
    """The reference is a frozen copy, or the policy without its LoRA: equal bits."""
    config = replace(config, pairs=str(preferences), lora_rank=lora_rank, num_inner_epochs=1, num_steps=2)
    first, second = rows(train(config), "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["accuracy"] == 0.5
    assert first["winner_error"] == first["loser_error"] == 0
    assert second["winner_error"] != 0
    assert second["loss"] != first["loss"]


def test_pairs_of_a_file_are_learnt_in_buckets_of_two_sizes(
    config: diffusion_dpo.Config, preferences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        config, pairs=str(preferences), pairs_per_step=6, learning_rate=1e-2, dpop_weight=0.0, aspect_bucket_step=2
    )
    later = rows(train(replace(config, num_inner_epochs=1, num_steps=12)), "train")[-4:]
    loss, accuracy, winner_error, loser_error = (
        sum(row[name] for row in later) / 4 for name in ("loss", "accuracy", "winner_error", "loser_error")
    )
    assert loss < 0.6
    assert accuracy > 0.75
    assert winner_error < loser_error
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bucket")]
    assert len(printed) == 1
    assert printed[0].startswith("buckets   16 x 16, ")
    assert "18 x 14" in printed[0]


@pytest.mark.slow
def test_sft_lowers_the_winners_error(config: diffusion_dpo.Config, preferences: Path) -> None:
    config = replace(config, pairs=str(preferences), pairs_per_step=6, loss="sft", learning_rate=1e-2, num_steps=12)
    folder = train(config)
    losses = [row["loss"] for row in rows(folder, "train")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert not {"accuracy", "winner_error", "loser_error"} & rows(folder, "train")[0].keys()


# --- the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_winner_and_loser_get_equal_noise_and_each_pair_its_own_generator(
    model: str, config: diffusion_dpo.Config, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str(request.getfixturevalue(model)), device=torch.device("cpu"))
    policy.set_trainable(None, keep_reference=True, seed=0)
    winner, loser = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = PairBatch(winner, loser, policy.encode(["a fox", "a cat", "a dog"]))
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    predict = policy.predict

    def remember(latents: torch.Tensor, level: Any, *rest: Any, **named: Any) -> Any:
        noise = (latents - level.alpha[:, None, None, None] * torch.cat([winner, loser])) / level.sigma[
            :, None, None, None
        ]
        inputs.append((noise, level.model_time))
        return predict(latents, level, *rest, **named)

    monkeypatch.setattr(policy, "predict", remember)
    times = torch.arange(100, 1000)
    generators = [generator_for(0, 2, 0, 0, row) for row in range(3)]
    diffusion_dpo.loss_of_pairs(policy, pairs, timesteps=times, generators=generators, config=config)

    (noise, time), (reference_noise, reference_time) = inputs
    assert torch.equal(time[:3], time[3:])
    assert_close(noise[:3], noise[3:], rtol=0, atol=1e-4)
    assert torch.equal(time, reference_time)
    assert_close(noise, reference_noise, rtol=0, atol=1e-4)
    for row in range(3):
        generator = generator_for(0, 2, 0, 0, row)
        expected_time = times[torch.randint(len(times), (1,), generator=generator)]
        assert time[row] == expected_time
        assert_close(noise[row], torch.randn(1, 4, 8, 8, generator=generator)[0], rtol=0, atol=1e-4)
    assert len(set(time[:3].tolist())) == 3


def test_only_the_given_timesteps_are_trained(config: diffusion_dpo.Config, preferences: Path) -> None:
    """The loss at a timestep near the image is not that at one near noise."""
    near, far = (
        rows(train(replace(config, pairs=str(preferences), pairs_per_step=6, loss="sft", timesteps=times, num_steps=1,
                           run_folder=f"{config.run_folder}-{times}")), "train")[0]["loss"]
        for times in ("1", "999")
    )  # fmt: skip
    assert near != pytest.approx(far, rel=1e-3)


# --- equal results ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", ["sampled", "file", "buckets"])
def test_the_microbatch_size_changes_no_result(
    config: diffusion_dpo.Config, preferences: Path, tmp_path: Path, source: str
) -> None:
    config = replace(config, num_steps=2)
    if source != "sampled":
        step = 2 if source == "buckets" else None
        config = replace(config, pairs=str(preferences), pairs_per_step=5, aspect_bucket_step=step)
    one = train(config)
    other = train(replace(config, microbatch_size=3, run_folder=str(tmp_path / "other")))
    assert_same(weights(one, 2), weights(other, 2), atol=1e-4)
    for first, second in zip(rows(one, "train"), rows(other, "train"), strict=True):
        for name in ("loss", "winner_error", "loser_error", "gradient_norm"):
            assert first[name] == pytest.approx(second[name], rel=1e-2, abs=1e-5), name


@pytest.mark.slow
def test_a_cache_changes_no_result(config: diffusion_dpo.Config, preferences: Path, tmp_path: Path) -> None:
    config = replace(config, pairs=str(preferences), pairs_per_step=4)
    plain = train(config)
    for name in ("filling", "filled"):
        cached = train(replace(config, cache_folder=str(tmp_path / "cache"), run_folder=str(tmp_path / name)))
        assert_same(weights(plain), weights(cached), atol=1e-4)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_result(config: diffusion_dpo.Config, tmp_path: Path) -> None:
    plain = train(config)
    saved = train(replace(config, gradient_checkpointing=True, run_folder=str(tmp_path / "saved")))
    assert_same(weights(plain), weights(saved), atol=1e-5)


# --- resuming ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", ["sampled", "file"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    config: diffusion_dpo.Config, preferences: Path, tmp_path: Path, source: str
) -> None:
    if source == "file":
        config = replace(config, pairs=str(preferences), pairs_per_step=5, random_flip="image", aspect_bucket_step=2)
    config = replace(config, proportion_empty_prompts=0.5)
    uninterrupted = train(config)
    stopped = replace(config, run_folder=str(tmp_path / "stopped"))
    train(replace(stopped, num_steps=1))
    folder = train(replace(stopped, resume=True))
    assert_same(weights(uninterrupted), weights(folder))
    names = ("step", "loss", "winner_error", "loser_error", "accuracy", "gradient_norm")
    one, two = ([[row[name] for name in names] for row in rows(f, "train")] for f in (uninterrupted, folder))
    assert one == two
    if source == "sampled":
        assert saved_pairs(uninterrupted) == saved_pairs(folder)


def saved_pairs(folder: Path) -> dict[str, bytes]:
    """Names and contents of all files of the pairs that a run saved."""
    root = folder / "pairs"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- sampled pairs and report -----------------------------------------------------------------------


@pytest.mark.slow
def test_the_saved_pairs_of_a_run_train_another(config: diffusion_dpo.Config, tmp_path: Path) -> None:
    """From one file or the folder; the saved images are those that were scored."""
    first = train(config)
    files = sorted((first / "pairs").glob("*.jsonl"))
    assert [path.name for path in files] == [f"step_00000{i}.jsonl" for i in (1, 2, 3)]
    pairs = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(pairs) == sum(row["pairs"] for row in rows(first, "train"))
    for pair in pairs:
        redness = []
        for side in ("winner", "loser"):
            with Image.open(first / "pairs" / pair[side]) as image:
                red, green, blue = to_tensor(image).mean(dim=(1, 2)).tolist()
            redness.append(red - (green + blue) / 2)
        assert redness[0] - redness[1] == pytest.approx(pair["rating_gap"], abs=0.01)
    for source in (files[1], first / "pairs"):
        again = replace(config, pairs=str(source), pairs_per_step=3, run_folder=str(tmp_path / source.stem))
        assert math.isfinite(rows(train(again), "train")[-1]["loss"])


def test_sampled_pairs_are_trained_without_their_prompt(
    config: diffusion_dpo.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    loss_of_pairs = diffusion_dpo.loss_of_pairs

    def remember(policy: Policy, pairs: PairBatch, **named: Any) -> Any:
        seen.append(pairs.conditioning.states == policy.encode([""]).states)
        return loss_of_pairs(policy, pairs, **named)

    monkeypatch.setattr(diffusion_dpo, "loss_of_pairs", remember)
    train(replace(config, proportion_empty_prompts=0.5, num_steps=1))
    empty = torch.cat(seen).flatten(1).all(dim=1).tolist()
    changes = [Augmentation("none", 0.5, config.seed).changes(0, row) for row in range(4)]
    assert empty == 2 * [change.empty_prompt for change in changes]
    assert len(set(empty)) == 2


def test_no_pairs_are_saved_without_save_pairs(config: diffusion_dpo.Config) -> None:
    assert not (train(replace(config, save_pairs=False, num_steps=1)) / "pairs").exists()


def test_equal_rewards_give_no_pairs_a_warning_and_no_update(
    config: diffusion_dpo.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(replace(config, rewards=FLAT, num_steps=2))
    assert "in step 2 all images of each prompt have the same reward" in capsys.readouterr().out
    assert [row["pairs"] for row in rows(folder, "train")] == [0, 0]
    before = unet_weights(Path(config.model))
    assert_same(unet_weights(folder), before)


def test_the_report_shows_accuracy_and_both_errors(config: diffusion_dpo.Config) -> None:
    page = (train(config) / "report.html").read_text()
    for title in ("implicit accuracy", "winner&#39;s error", "loser&#39;s error"):
        assert title in page


# --- invalid settings and inputs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, r"beta is 0\.0; it must be positive"),
        ({"beta": -1.0}, r"beta is -1\.0; it must be positive"),
        ({"dpop_weight": -1.0}, r"dpop_weight is -1\.0; it must be at least 0"),
        ({"images_per_prompt": 1}, "images_per_prompt is 1; it must be at least 2"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0; it must be at least 1"),
        ({"pairs_per_step": 0}, "pairs_per_step is 0; it must be at least 1"),
        ({"eta": 1.5}, r"eta is 1\.5; it must be in \[0, 1\]"),
        ({"timesteps": "999-0"}, "timesteps is 999-0; it must be a range such as 0-999 or a list"),
        ({"timesteps": "often"}, "timesteps is often; it must be a range"),
        ({"random_flip": "pair"}, "random_flip is pair; it must be none with --pairs sampled"),
        ({"aspect_bucket_step": 8}, "aspect_bucket_step is 8; it must be null with --pairs sampled"),
        ({"proportion_empty_prompts": 1.2}, r"proportion_empty_prompts is 1\.2; it must be in \[0, 1\]"),
        ({"num_inner_epochs": 0}, "num_inner_epochs is 0; it must be at least 1"),
        ({"microbatch_size": 1}, "microbatch_size is 1; it must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(config: diffusion_dpo.Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_timesteps_that_the_model_does_not_have_are_refused_before_sampling(config: diffusion_dpo.Config) -> None:
    with pytest.raises(ValueError, match="times range from 500 to 1000; the model was trained at 0 to 999"):
        train(replace(config, timesteps="500-1000"))
    assert not rows(Path(str(config.run_folder)), "evaluation")


def test_a_bad_record_stops_the_run_or_is_logged(config: diffusion_dpo.Config, preferences: Path) -> None:
    lines = preferences.read_text().splitlines()
    lines[2] = json.dumps({"winner_prompt": "a fox", "loser_prompt": "a cat", "image": "winner_0.png"})
    preferences.write_text("\n".join(lines))
    config = replace(config, pairs=str(preferences), pairs_per_step=2, num_steps=1)
    with pytest.raises(BadRecordError, match=r"preferences\.jsonl:3: the two sides have different prompts"):
        train(config)
    folder = train(replace(config, on_bad_record="skip", run_folder=f"{config.run_folder}-skip"))
    (skipped,) = (folder / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["where"].endswith("preferences.jsonl:3")


def test_a_bucket_step_that_the_model_cannot_cut_is_refused(config: diffusion_dpo.Config, preferences: Path) -> None:
    with pytest.raises(ValueError, match="aspect_bucket_step is 3; for this model it must be a multiple of 2"):
        train(replace(config, pairs=str(preferences), aspect_bucket_step=3))


def test_a_missing_preference_file_is_named(config: diffusion_dpo.Config) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file nowhere\.jsonl"):
        train(replace(config, pairs="nowhere.jsonl"))


def test_a_cache_of_another_autoencoder_stops_the_run(
    config: diffusion_dpo.Config, preferences: Path, tmp_path: Path, tiny_sd_v: Path
) -> None:
    config = replace(
        config, pairs=str(preferences), pairs_per_step=2, num_steps=1, cache_folder=str(tmp_path / "cache")
    )  # fmt: skip
    train(config)
    other = shutil.copytree(tiny_sd_v, tmp_path / "other")
    settings = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.5}))
    with pytest.raises(ValueError, match="was made with another autoencoder"):
        train(replace(config, model=str(other), run_folder=str(tmp_path / "again")))


# --- published settings -----------------------------------------------------------------------------


def test_the_published_settings_are_read_and_their_numbers_of_passes_are_right() -> None:
    path = ROOT / "recipes" / "configs" / "diffusion_dpo_sd15.yaml"
    config = parse_config(diffusion_dpo.Config, description="", arguments=["--config", str(path)])
    assert (config.pairs_per_step, config.beta, config.timesteps) == (2048, 2000.0, "0-999")
    assert (config.random_flip, config.proportion_empty_prompts) == ("image", 0.2)
    assert config.learning_rate == pytest.approx(1e-8 * config.pairs_per_step)
    header = path.read_text()
    for gpus in (1, 4, 8):
        passes = config.pairs_per_step // gpus // (config.microbatch_size // 2)
        assert any(line.split()[1:3] == [str(gpus), "GPU" + "s" * (gpus > 1)] and str(passes) in line.split()
                   for line in header.splitlines() if line.startswith("#  ")), gpus  # fmt: skip
    assert yaml.safe_load(header).keys() <= {*vars(config)}
