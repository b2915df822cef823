"""The DRaFT recipe end to end on a tiny random pipeline: training, equal results, resuming, export."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recipes import draft
from rlhf_t2i.config import parse_config
from rlhf_t2i.losses import reward_loss, weight_distance
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.seeds import generator_for
from rlhf_t2i.training.evaluation import Evaluation
from rlhf_t2i.training.run import Run
from rlhf_t2i.training.trainer import Trainer
from tests import plain_diffusers
from tests.launch import ROOT
from tests.runs import (
    REDNESS,
    as_for_toy_models,
    assert_same,
    lora_weights,
    redness,
    rows,
    state,
    unet_weights,
    weights,
)

DARKNESS = "tests.test_draft:darkness"
METHODS: list[dict[str, Any]] = [
    {"method": "draft"},
    {"method": "draft", "backprop_steps": 1},
    {"method": "draft_lv", "num_renoisings": 2},
    {"method": "alignprop"},
    {"method": "refl"},
]


def darkness(images: Tensor, prompts: list[str]) -> Tensor:
    return -images.mean(dim=(1, 2, 3))


def rounded(images: Tensor, prompts: list[str]) -> Tensor:
    return (images > 0.5).float().mean(dim=(1, 2, 3))


def steep(images: Tensor, prompts: list[str]) -> Tensor:
    """Redness with a gradient that is not finite."""
    return redness(images, prompts) + 0 * (images - images.detach()).abs().sum(dim=(1, 2, 3)).sqrt()


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> draft.Config:
    """Three steps that use every part of the recipe."""
    return draft.Config(
        **as_for_toy_models(
            model=str(tiny_sd),
            method="draft",
            prompts_per_step=6,
            num_denoising_steps=4,
            eta=0.5,
            microbatch_size=8,
            learning_rate=1e-3,
            warmup_steps=0,
            adam_epsilon=1e-3,  # or Adam amplifies gradients that are rounding errors
            ema_decay=0.5,
            kl_weight=0.1,
            l2_sp_weight=0.1,
            rewards=f"{REDNESS},{DARKNESS}=0.5",
            evaluation_rewards=f"{REDNESS},{DARKNESS}",
            num_steps=3,
            evaluate_every=0,
            num_evaluation_images=4,
            checkpoint_every=1,
            run_folder=str(tmp_path / "run"),
            num_cpu_threads=1,
        )
    )


def train(config: draft.Config) -> Path:
    """Run the recipe in this process; returns the run folder."""
    return draft.main(config)


# --- the losses -------------------------------------------------------------------------------------


def test_the_reward_loss_by_hand() -> None:
    rewards = torch.tensor([0.5, -1.0, 3.0], requires_grad=True)
    assert reward_loss(rewards, margin=None).item() == pytest.approx(-2.5 / 3)
    hinged = reward_loss(rewards, margin=2.0)
    assert hinged.item() == pytest.approx((1.5 + 3.0 + 0.0) / 3)
    hinged.backward()
    assert rewards.grad is not None
    assert_close(rewards.grad, torch.tensor([-1 / 3, -1 / 3, 0.0]))


def test_the_gradient_of_the_weight_distance_is_the_difference() -> None:
    weights = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor([[3.0]], requires_grad=True)}
    distance = weight_distance(weights, {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([[2.5]])})
    assert distance.item() == pytest.approx(0.5 * (1 + 4 + 0.25))
    gradients = torch.autograd.grad(distance, list(weights.values()))
    assert_close(list(gradients), [torch.tensor([1.0, -2.0]), torch.tensor([[0.5]])])


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", METHODS)
def test_the_reward_rises(config: draft.Config, changes: dict[str, Any]) -> None:
    """On evaluation prompts and seeds, by every method."""
    folder = train(
        replace(
            config, **changes, num_steps=12, learning_rate=3e-3, adam_epsilon=1e-8, kl_weight=0.0, l2_sp_weight=0.0,
            rewards=REDNESS, checkpoint_every=0,
        )
    )  # fmt: skip
    before, after = rows(folder, "evaluation")
    assert after[REDNESS] > before[REDNESS] + 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "changes"),
    [
        ("llava_reward", {"learning_rate": 3e-4, "num_steps": 20}),
        (REDNESS, {"learning_rate": 1e-2, "lora_rank": 16, "num_steps": 6}),
    ],
)
def test_the_toy_model_learns_one_prompt(tmp_path: Path, reward: str, changes: dict[str, Any]) -> None:
    """By all of its weights and by a LoRA."""
    (tmp_path / "prompts.txt").write_text("a red circle on a blue background\n")
    prompts = str(tmp_path / "prompts.txt")
    folder = train(
        draft.Config(
            prompts=prompts, evaluation_prompts=prompts, rewards=reward, evaluation_rewards=reward, warmup_steps=0,
            ema_decay=0.0, evaluate_every=0, num_evaluation_images=68, run_folder=str(tmp_path / "run"),
            num_cpu_threads=1, prompts_per_step=32, **{"num_steps": 10, **changes},
        )
    )  # fmt: skip
    before, after = rows(folder, "evaluation")
    assert after[reward] > before[reward] + 3 * before[f"{reward}/standard_error"]


@pytest.mark.slow
def test_kl_and_l2_sp_keep_the_weights_near_their_initial_values(config: draft.Config, tmp_path: Path) -> None:
    start = load_policy(config.model, device=torch.device("cpu"))
    start.set_trainable(None, keep_reference=False, seed=0)
    free = replace(config, kl_weight=0.0, l2_sp_weight=0.0, weight_decay=0.0, learning_rate=3e-3, adam_epsilon=1e-8)

    def distance(name: str, **changes: Any) -> float:
        after = weights(train(replace(free, **changes, num_steps=6, run_folder=str(tmp_path / name))), 6)
        return sum((after[n] - p).square().sum().item() for n, p in start.trainable.items())

    without = distance("free")
    assert distance("kl", kl_weight=1e4) < 0.7 * without
    assert distance("l2_sp", l2_sp_weight=1e4) < 0.7 * without


def test_a_reward_above_the_margin_has_no_gradient(config: draft.Config) -> None:
    folder = train(replace(config, reward_margin=-9.0, kl_weight=0.0, l2_sp_weight=0.0, num_steps=1))
    (row,) = rows(folder, "train")
    assert row["loss"] == 0
    assert row["gradient_norm"] == 0


def test_the_loss_is_the_weighted_hinge_plus_the_penalties(config: draft.Config) -> None:
    """In the first step the weights are the initial ones, so both penalties are 0; every reward is below the margin."""
    folder = train(replace(config, reward_margin=5.0, reward_weight=0.1, num_steps=2))
    first, second = rows(folder, "train")
    assert first["loss"] == pytest.approx(0.1 * (5 - first["reward"]), rel=1e-5)
    assert first["reference_gap"] == 0
    assert second["reference_gap"] > 0
    assert second["loss"] > 0.1 * (5 - second["reward"]) + 0.1 * second["reference_gap"]


def test_a_step_logs_its_images_calls_rewards_and_times(config: draft.Config) -> None:
    (row,) = rows(train(replace(config, num_steps=1)), "train")
    assert row["images"] == 6
    assert row["denoiser_calls"] == 24
    assert row["reward"] == pytest.approx(row[f"rewards/{REDNESS}"] + 0.5 * row[f"rewards/{DARKNESS}"], rel=1e-4)
    assert 0 <= row["saturated_share"] < 1
    assert {"reward_std", "gradient_norm", "seconds/rollout", "seconds/reward", "seconds/update"} <= row.keys()


# --- gradient windows -------------------------------------------------------------------------------


def drawn(config: draft.Config, count: int = 400) -> list[int]:
    return draft.gradient_window(config, [generator_for(0, i) for i in range(count)]).first.tolist()


def test_each_method_has_its_gradient_window(config: draft.Config) -> None:
    eight = replace(config, num_denoising_steps=8)
    assert set(drawn(eight)) == {0}
    assert set(drawn(replace(eight, backprop_steps=3))) == {5}
    assert set(drawn(replace(eight, method="draft_lv"))) == {7}
    assert draft.gradient_window(replace(eight, method="draft_lv"), [generator_for(0)]).num_renoisings == 2
    alignprop = drawn(replace(eight, method="alignprop"))
    assert set(alignprop) == set(range(8))
    assert all(30 < alignprop.count(first) < 75 for first in range(8)), "uniform"
    assert set(drawn(replace(eight, method="alignprop", backprop_steps=2))) == {6, 7}
    assert set(drawn(replace(eight, method="refl", window_start=0.75))) == {6, 7}
    assert draft.gradient_window(replace(eight, method="refl"), [generator_for(0)]).jumps


# --- equal results ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", METHODS)
def test_the_microbatch_size_changes_no_result(config: draft.Config, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(config, **changes, microbatch_size=64, num_steps=2)
    one = train(config)
    other = train(replace(config, microbatch_size=4, run_folder=str(tmp_path / "other")))
    assert_same(weights(one, 2), weights(other, 2), atol=1e-5)
    first, *_ = zip(rows(one, "train"), rows(other, "train"), strict=True)
    for name in ("reward", "loss", "gradient_norm", "saturated_share"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-3, abs=1e-6), name
    assert first[0]["denoiser_calls"] == first[1]["denoiser_calls"]


@pytest.mark.slow
def test_checkpointing_changes_no_result(config: draft.Config, tmp_path: Path) -> None:
    """Neither that of activations nor that of denoising steps."""
    config = replace(config, num_steps=2)
    plain = weights(train(config), 2)
    for name in ("gradient_checkpointing", "checkpoint_denoising_steps"):
        saved = train(replace(config, **{name: True}, run_folder=str(tmp_path / name)))
        assert_same(
            {f"{name} {key}": tensor for key, tensor in plain.items()},
            {f"{name} {key}": tensor for key, tensor in weights(saved, 2).items()},
            atol=1e-5,
        )


@pytest.mark.slow
def test_bfloat16_networks_learn_and_export_float32(config: draft.Config) -> None:
    folder = train(replace(config, mixed_precision="bf16", lora_rank=2, checkpoint_denoising_steps=True))
    assert rows(folder, "train")[-1]["gradient_norm"] > 0
    assert {tensor.dtype for tensor in lora_weights(folder).values()} == {torch.float32}


# --- checkpoints and early stopping -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"method": "alignprop"}, {"method": "draft_lv", "lora_rank": 2}])
def test_a_resumed_run_equals_an_uninterrupted_one(
    config: draft.Config, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Equal bits of weights, optimiser state and EMA, with a penalty on the distance from the initial weights."""
    config = replace(config, **changes, evaluate_every=1, early_stop_reward=DARKNESS, patience=9)
    uninterrupted = train(config)
    stopped = replace(config, run_folder=str(tmp_path / "stopped"))
    train(replace(stopped, num_steps=1))
    folder = train(replace(stopped, resume=True))
    assert_same(weights(uninterrupted), weights(folder))
    (tensors, rest), (expected, expected_rest) = state(folder), state(uninterrupted)
    assert {key.partition("/")[0] for key in tensors} >= {"ema", "best"}
    assert_same(tensors, expected)
    assert rest == expected_rest
    names = ("step", "reward", "loss", "reference_gap", "gradient_norm")
    one, two = ([[row[name] for name in names] for row in rows(f, "train")] for f in (uninterrupted, folder))
    assert one == two


@pytest.fixture
def falling(config: draft.Config) -> draft.Config:
    """A run whose held-out reward rises for a few steps and then falls."""
    return replace(
        config, rewards=REDNESS, early_stop_reward="tests.test_draft:peaked", patience=2,
        evaluation_rewards=f"{REDNESS},tests.test_draft:peaked", evaluate_every=1, num_steps=12, ema_decay=0.0,
        kl_weight=0.0, l2_sp_weight=0.0, learning_rate=3e-3, adam_epsilon=1e-8,
    )  # fmt: skip


def peaked(images: Tensor, prompts: list[str]) -> Tensor:
    """Highest slightly above the redness before training, so that it rises for a few steps and then falls."""
    return -(redness(images, prompts) + 0.03).abs()


@pytest.mark.slow
def test_an_early_stop_exports_the_best_weights(falling: draft.Config, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(falling)
    evaluations = rows(folder, "evaluation")
    done = rows(folder, "train")[-1]["step"]
    assert done < 12
    values = [row["tests.test_draft:peaked"] for row in evaluations]
    best = max(range(len(values)), key=values.__getitem__)
    assert 0 < best == done - 2
    assert values[best + 1 :] == sorted(values[best + 1 :], reverse=True)
    assert f"was best after {best} of {done} steps" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder, "export")] == [best]
    assert_same(
        unet_weights(folder), weights(train(replace(falling, num_steps=best, run_folder=f"{folder}-short")), best)
    )


@pytest.mark.slow
def test_an_early_stop_survives_a_resume(falling: draft.Config, tmp_path: Path) -> None:
    """Interrupted before, shortly after and long after the best evaluation."""
    uninterrupted = train(falling)
    done = rows(uninterrupted, "train")[-1]["step"]
    for stop in (1, done - 1, done):
        short = replace(falling, run_folder=str(tmp_path / f"stop{stop}"))
        train(replace(short, num_steps=stop))
        folder = train(replace(short, resume=True))
        assert rows(folder, "train")[-1]["step"] == done
        assert_same(unet_weights(uninterrupted), unet_weights(folder))


# --- export -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plain_diffusers_samples_the_images_of_the_last_evaluation(
    config: draft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported weights, with lora_scale; tests/test_ddpo.py has those without it, in a process of their own."""
    evaluations: list[Evaluation] = []
    record = Trainer.record
    monkeypatch.setattr(
        Trainer, "record", lambda trainer, evaluation: (evaluations.append(evaluation), record(trainer, evaluation))
    )
    fast = replace(config, num_steps=6, ema_decay=0.0, kl_weight=0.0, l2_sp_weight=0.0, adam_epsilon=1e-8)
    folder = train(replace(fast, lora_rank=2, lora_scale=0.5, learning_rate=0.3))
    first, last = evaluations
    images = plain_diffusers.sample(config.model, str(folder / "lora"), last.prompts)
    assert (images - last.images).abs().max() < 1e-3
    assert (last.images - first.images).abs().max() > 0.01, "the run must have changed the images"


@pytest.mark.slow
def test_lora_scale_applies_to_export_and_evaluation_but_not_to_training(config: draft.Config, tmp_path: Path) -> None:
    plain = replace(config, lora_rank=2, ema_decay=0.0)
    one, half = train(plain), train(replace(plain, lora_scale=0.5, run_folder=str(tmp_path / "half")))
    assert_same(weights(one), weights(half))
    for name, tensor in lora_weights(one).items():
        assert_close(lora_weights(half)[name], tensor * (0.5 if "lora_B" in name else 1.0), rtol=0, atol=0)
    first, second = (rows(f, "evaluation")[-1][REDNESS] for f in (one, half))
    assert first != second


YAML = ROOT / "recipes" / "configs" / "draft_sd15.yaml"


def test_the_published_settings_for_sd15_run(tiny_sd: Path, tmp_path: Path) -> None:
    small = {
        "num_steps": 1, "prompts_per_step": 2, "num_denoising_steps": 5, "num_evaluation_images": 2, "model": tiny_sd,
        "rewards": REDNESS, "evaluation_rewards": REDNESS, "run_folder": tmp_path / "run", "num_cpu_threads": 1,
    }  # fmt: skip
    flags = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    (row,) = rows(train(parse_config(draft.Config, description="", arguments=["--config", str(YAML), *flags])), "train")
    assert row["gradient_norm"] > 0


@pytest.mark.parametrize(("name", "method"), [("DRaFT-LV", "draft_lv"), ("AlignProp", "alignprop"), ("ReFL", "refl")])
def test_the_flags_that_the_config_gives_for_the_other_methods_are_read(name: str, method: str) -> None:
    _, _, after = YAML.read_text().partition(f"#   {name} ")
    flags = re.findall(r"--\w+ \S+", re.split(r"\n(?:#   [A-Z]|\n)", after)[0])
    assert flags
    arguments = ["--config", str(YAML), *(part for flag in flags for part in flag.split())]
    assert parse_config(draft.Config, description="", arguments=arguments).method == method


# --- invalid settings and inputs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backprop_steps": 5}, r"backprop_steps is 5; it must be at most num_denoising_steps \(4\)"),
        ({"backprop_steps": 0}, "backprop_steps is 0; it must be at least 1 or null"),
        (
            {"method": "refl", "backprop_steps": 2},
            "backprop_steps is 2; it must be null or 1, because refl differentiates",
        ),
        ({"method": "draft_lv", "backprop_steps": 3}, "because draft_lv differentiates one step"),
        ({"num_renoisings": 0}, "num_renoisings is 0; it must be at least 1"),
        (
            {"window_start": 0.9, "window_end": 0.9},
            "window_end is 0.9; it must be at least one denoising step after window_start",
        ),
        ({"window_end": 1.5}, r"window_end is 1\.5; it must be in \[0, 1\]"),
        ({"window_start": -0.5}, r"window_start is -0\.5; it must be in \[0, 1\]"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0; it must be at least 1"),
        ({"eta": 1.5}, r"eta is 1\.5; it must be in \[0, 1\]"),
        ({"reward_weight": 0.0}, r"reward_weight is 0\.0; it must be positive"),
        ({"kl_weight": -1.0}, r"kl_weight is -1\.0; it must be at least 0"),
        ({"l2_sp_weight": -1.0}, r"l2_sp_weight is -1\.0; it must be at least 0"),
        ({"early_stop_reward": "oracle"}, "early_stop_reward is oracle; it must be one of evaluation_rewards"),
        ({"early_stop_reward": REDNESS}, "evaluate_every is 0; it must be at least 1 with early_stop_reward"),
        ({"patience": 0}, "patience is 0; it must be at least 1"),
        ({"lora_rank": 2, "lora_scale": 0.0}, r"lora_scale is 0\.0; it must be positive"),
        ({"lora_scale": 0.5}, "lora_scale is 0.5; it must be 1 without a LoRA"),
    ],
)
def test_impossible_settings_are_refused(config: draft.Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize("reward", ["jpeg_compressibility", "oracle", "tests.test_draft:rounded"])
def test_a_reward_without_a_gradient_is_refused_before_anything_is_loaded(config: draft.Config, reward: str) -> None:
    with pytest.raises(ValueError, match=rf"'{reward}' has no gradient .* recipes/ddpo\.py"):
        train(replace(config, model="no/such/model", rewards=f"{REDNESS},{reward}"))
    assert not Path(str(config.run_folder)).exists()


def test_a_gradient_that_is_not_finite_stops_the_run_and_the_reward_is_named(
    config: draft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "require_gradient", lambda reward, prompt: None)
    with pytest.raises(
        ValueError, match=r"gradient of the reward 'tests.test_draft:steep' is not finite for the prompt"
    ):
        train(replace(config, rewards="tests.test_draft:steep"))


def test_prompts_that_cannot_be_shared_equally_are_refused(
    config: draft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "num_processes", 4)
    with pytest.raises(ValueError, match=r"prompts_per_step \(6\) must be a multiple of the number of processes \(4\)"):
        train(config)
