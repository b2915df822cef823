"""The DDPO recipe end to end on a tiny random pipeline: training, equal results, resuming, export."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import ddpo
from rlhf_t2i.models.lora import LoraConfiguration
from rlhf_t2i.training.evaluation import Evaluation
from rlhf_t2i.training.run import Run
from rlhf_t2i.training.trainer import Trainer
from tests import processes
from tests.launch import num_train_rows, start, wait_for_steps
from tests.runs import REDNESS, as_for_toy_models, assert_same, lora_weights, rows, sampled_by_diffusers, state, weights


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> ddpo.Config:
    """Three steps that use every part of the recipe."""
    return ddpo.Config(
        **as_for_toy_models(
            model=str(tiny_sd),
            prompts_per_step=2,
            images_per_prompt=4,
            num_denoising_steps=4,
            num_inner_epochs=2,
            num_minibatches=2,
            microbatch_size=8,
            learning_rate=1e-3,
            adam_epsilon=1e-3,  # or Adam amplifies gradients that are rounding errors
            ema_decay=0.5,
            kl_weight=0.1,
            history_size=8,
            history_min_count=4,
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


def train(config: ddpo.Config) -> Path:
    """Run the recipe in this process; returns the run folder."""
    return ddpo.main(config)


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 16])
def test_the_reward_rises(config: ddpo.Config, lora_rank: int | None) -> None:
    """On evaluation prompts and seeds."""
    folder = train(
        replace(
            config, prompts_per_step=8, images_per_prompt=8, num_inner_epochs=1, num_steps=12, lora_rank=lora_rank,
            learning_rate=3e-2 if lora_rank else 3e-3, adam_epsilon=1e-8, kl_weight=0.0, advantages="whole_batch",
            clip_range=1e-2, microbatch_size=64, num_evaluation_images=34, checkpoint_every=0,
        )
    )  # fmt: skip
    before, after = rows(folder, "evaluation")
    assert after[REDNESS] > before[REDNESS] + 0.005


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_trainable_weights_change_and_frozen_ones_do_not(
    config: ddpo.Config, lora_rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_t2i.models import load
    from rlhf_t2i.models.base import DiffusionPolicy

    loaded: list[DiffusionPolicy] = []
    original = load.load_policy

    def remember(*arguments: Any, **keywords: Any) -> DiffusionPolicy:
        loaded.append(original(*arguments, **keywords))
        return loaded[0]

    monkeypatch.setattr(load, "load_policy", remember)
    before = original(config.model, device=torch.device("cpu"))
    before.set_trainable(LoraConfiguration(lora_rank) if lora_rank else None, keep_reference=False, seed=0)
    frozen = {
        **{f"unet.{n}": p for n, p in before.network.named_parameters() if not p.requires_grad},
        **{f"vae.{n}": p for n, p in before.autoencoder.vae.named_parameters()},
        **{f"text.{n}": p for n, p in before.text_encoders[0].model.named_parameters()},
    }
    torch.manual_seed(0)
    train(replace(config, lora_rank=lora_rank, num_steps=2, weight_decay=0.0))
    after = loaded[0]
    now = {
        **{f"unet.{n}": p for n, p in after.network.named_parameters()},
        **{f"vae.{n}": p for n, p in after.autoencoder.vae.named_parameters()},
        **{f"text.{n}": p for n, p in after.text_encoders[0].model.named_parameters()},
    }
    for name, parameter in frozen.items():
        assert torch.equal(parameter, now[name]), name
    unchanged = [name for name, p in after.trainable.items() if torch.equal(p, before.trainable[name])]
    assert not unchanged
    adapters = "lora_A", "lora_B"
    expected = [
        n for n, _ in after.network.named_parameters() if lora_rank is None or any(kind in n for kind in adapters)
    ]
    assert list(after.trainable) == expected


# --- equal results ----------------------------------------------------------------------------------


def test_ratios_are_one_before_the_first_optimiser_step_and_change_after_it(config: ddpo.Config) -> None:
    for row in rows(train(config), "train"):
        assert row["replay_error"] == 0
        assert row["ratio_std"] > 0


def test_the_microbatch_size_changes_no_result(config: ddpo.Config, tmp_path: Path) -> None:
    one = train(config)
    other = train(replace(config, microbatch_size=3, run_folder=str(tmp_path / "other")))
    assert_same(weights(one), weights(other), atol=1e-4)
    assert rows(one, "train")[0]["reward"] == pytest.approx(rows(other, "train")[0]["reward"], abs=1e-6)


@pytest.mark.slow
def test_async_rewards_change_no_result(config: ddpo.Config, tmp_path: Path) -> None:
    """Nine batches of eight images, each scored while the next is sampled."""
    config = replace(config, prompts_per_step=9, images_per_prompt=8, num_inner_epochs=1, num_steps=2)
    expected, expected_rest = state(train(config), 2)
    tensors, rest = state(train(replace(config, async_reward=True, run_folder=str(tmp_path / "async"))), 2)
    assert_same(tensors, expected)
    assert rest == expected_rest


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_result(config: ddpo.Config, tmp_path: Path) -> None:
    plain = train(config)
    saved = train(replace(config, gradient_checkpointing=True, run_folder=str(tmp_path / "saved")))
    assert_same(weights(plain), weights(saved), atol=1e-5)


def test_bfloat16_networks_have_ratio_one_and_export_float32(config: ddpo.Config) -> None:
    folder = train(replace(config, mixed_precision="bf16", lora_rank=2))
    assert all(row["replay_error"] == 0 for row in rows(folder, "train"))
    assert {tensor.dtype for tensor in lora_weights(folder).values()} == {torch.float32}


# --- checkpoints and signals ------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(config: ddpo.Config, tmp_path: Path) -> None:
    """Equal bits of weights, optimiser state, EMA and reward history; metrics without gaps or repetitions."""
    uninterrupted = train(config)
    stopped = replace(config, run_folder=str(tmp_path / "stopped"))
    train(replace(stopped, num_steps=1))
    folder = train(replace(stopped, resume=True))
    assert_same(weights(uninterrupted), weights(folder))
    (tensors, rest), (expected, expected_rest) = state(folder), state(uninterrupted)
    assert {key.partition("/")[0] for key in tensors} == {"weight", "exp_avg", "exp_avg_sq", "step", "ema"}
    assert_same(tensors, expected)
    assert rest == expected_rest
    names = ("step", "reward", "loss", "ratio_std", "kl")
    one, two = ([[row[name] for name in names] for row in rows(f, "train")] for f in (uninterrupted, folder))
    assert one == two


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(config: ddpo.Config, tmp_path: Path) -> None:
    """Killed by SIGKILL three times and resumed each time."""
    config = replace(config, num_steps=12)
    uninterrupted = train(replace(config, run_folder=str(tmp_path / "uninterrupted")))
    folder = tmp_path / "killed"
    draw = random.Random(0)
    for attempt in range(3):
        before = num_train_rows(folder)
        process = start(replace(config, run_folder=str(folder), resume=attempt > 0))
        wait_for_steps(process, folder, more_than=before)
        time.sleep(draw.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    train(replace(config, run_folder=str(folder), resume=True))
    assert_same(weights(uninterrupted, 12), weights(folder, 12))
    assert [row["step"] for row in rows(folder, "train")] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_write_a_checkpoint_and_exit_with_status_zero(
    config: ddpo.Config, sent: signal.Signals
) -> None:
    folder = Path(str(config.run_folder))
    process = start(replace(config, num_steps=1000, checkpoint_every=0))
    wait_for_steps(process, folder, more_than=1)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    done = rows(folder, "train")[-1]["step"]
    assert weights(folder, done)
    assert f"Stopped after {done} of 1000 steps. " in output
    again = ["--config", str(folder / "config.yaml"), "--resume", "--run_folder", str(folder)]
    assert f"Continue with: {' '.join(again)}" in output
    result = processes.run([sys.executable, "recipes/ddpo.py", *again, "--num_steps", str(done + 1)])
    assert result.returncode == 0, result.stderr
    assert rows(folder, "train")[-1]["step"] == done + 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux only")
def test_terminating_accelerate_launch_writes_a_checkpoint_too(config: ddpo.Config) -> None:
    """accelerate itself would exit and leave the recipe running."""
    folder = Path(str(config.run_folder))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/single.yaml"]
    process = start(replace(config, num_steps=1000, checkpoint_every=0), *launcher)
    wait_for_steps(process, folder, more_than=1)
    process.terminate()
    output, _ = process.communicate(timeout=60)  # until the recipe, too, has closed the pipe
    done = rows(folder, "train")[-1]["step"]
    assert f"Stopped after {done} of 1000 steps" in output
    assert weights(folder, done)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    config: ddpo.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = train(replace(config, run_folder=str(tmp_path / "uninterrupted")))
    folder = train(config)
    path = folder / "checkpoints" / "step_000003" / "weights-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    train(replace(config, resume=True))
    assert "step_000003: weights-00001-of-00001.safetensors does not match its checksum" in capsys.readouterr().out
    assert_same(weights(uninterrupted), weights(folder))


def test_a_full_disk_while_saving_leaves_the_old_checkpoint_complete(
    config: ddpo.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(replace(config, num_steps=1))

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf_t2i.distributed.state.save_file", full_disk)
    with pytest.raises(OSError, match=r"after step 2 could not be written \(.*No space left on device\)"):
        train(replace(config, resume=True))
    monkeypatch.undo()
    again = train(replace(config, resume=True))
    assert [row["step"] for row in rows(again, "train")] == [1, 2, 3]
    assert not list((folder / "checkpoints").glob("*.part"))


# --- export and run folder --------------------------------------------------------------------------


@pytest.mark.slow
def test_plain_diffusers_samples_the_images_of_the_last_evaluation(
    config: ddpo.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported U-Net and the exported LoRA, loaded by a script that imports only diffusers."""
    evaluations: list[Evaluation] = []
    record = Trainer.record
    monkeypatch.setattr(
        Trainer, "record", lambda trainer, evaluation: (evaluations.append(evaluation), record(trainer, evaluation))
    )
    wide = replace(config, clip_range=1.0)
    exported = [
        train(replace(wide, lora_rank=None, learning_rate=3e-3)) / "unet",
        train(replace(wide, lora_rank=2, learning_rate=3e-2, run_folder=str(tmp_path / "with_lora"))) / "lora",
    ]
    (first, unet), (_, lora) = evaluations[:2], evaluations[2:]
    found = sampled_by_diffusers(config.model, exported, first.prompts, tmp_path)
    for images, last in zip(found, (unet, lora), strict=True):
        assert (images - last.images).abs().max() < 1e-3
        assert (last.images - first.images).abs().max() > 0.01, "the run must have changed the images"


def test_the_run_folder_has_all_files(config: ddpo.Config) -> None:
    folder = train(replace(config, trackers="tensorboard"))
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "run.json", "metrics.jsonl", "report.html", "images", "checkpoints", "unet",
    }  # fmt: skip
    assert {p.name for p in (folder / "images").iterdir()} == {
        "captions.json", "step_000000.png", "step_000000.json", "step_000003.png", "step_000003.json",
        "extremes.json", "extremes_000003.png",
    }  # fmt: skip
    info = json.loads((folder / "run.json").read_text())
    assert info["versions"]["torch"] == torch.__version__
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step_000002", "step_000003"}


# --- invalid settings and inputs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images_per_prompt": 4, "num_minibatches": 3},
            r"num_minibatches is 3; it must be a divisor of images_per_prompt \(4\)",
        ),
        ({"eta": 0.0}, "eta is 0.0"),
        ({"timestep_fraction": 0.0}, "timestep_fraction is 0.0"),
        ({"window_start": 0.5}, r"window_end is 0\.5; it must be at least one denoising step after"),
        ({"window_end": 1.5}, r"window_end is 1\.5; it must be in \[0, 1\]"),
        ({"evaluation_eta": 2.0}, r"evaluation_eta is 2\.0; it must be in \[0, 1\]"),
        ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5; it must be at least 1"),
        ({"clip_range": 0.0}, r"clip_range is 0\.0; it must be positive"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0; it must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(config: ddpo.Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_run_folder_with_a_run_in_it_is_not_overwritten(config: ddpo.Config) -> None:
    train(replace(config, num_steps=1))
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(config)


def test_a_run_folder_with_another_config_is_refused(config: ddpo.Config) -> None:
    train(replace(config, num_steps=1))
    with pytest.raises(ValueError, match=r"another config: eta was 1\.0 and is now 0\.5"):
        train(replace(config, resume=True, eta=0.5))


def test_a_resumed_run_may_go_on_with_another_learning_rate(
    config: ddpo.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    first = weights(train(replace(config, num_steps=1)), step=1)
    folder = train(replace(config, num_steps=2, resume=True, learning_rate=1e-12))
    assert "Changed on resuming: learning_rate 0.001 -> 1e-12\n" in capsys.readouterr().out
    assert_same(first, weights(folder, step=2), atol=1e-9)


def test_resuming_without_a_run_is_refused(config: ddpo.Config) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run to resume in .*/run: it has no config\.yaml"):
        train(replace(config, resume=True))


def test_prompts_that_cannot_be_shared_equally_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "num_processes", 2)
    run = object.__new__(Run)
    with pytest.raises(ValueError, match=r"prompts_per_step \(3\) must be a multiple of the number of processes \(2\)"):
        run.shard(3, name="prompts_per_step")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-9}, "training will be slow. Raise learning_rate."),
        ({"learning_rate": 1e-1}, "most denoising steps are clipped and have no gradient. Lower learning_rate"),
        ({"learning_rate": 1e-4, "num_inner_epochs": 1}, None),
    ],
)
def test_the_first_update_warns_of_a_ratio_that_changes_too_little_or_too_much(
    config: ddpo.Config, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str | None
) -> None:
    folder = train(replace(config, num_steps=1, **changes))
    output = capsys.readouterr().out
    assert message in output if message else "WARNING" not in output
    assert rows(folder, "train")[0]["clip_range"] == pytest.approx(
        5e-4 * (512 / 256) ** 0.5
    )  # 4 x 8 x 8 latent dimensions


def not_a_number(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.full((len(images),), float("nan"))


def test_a_reward_that_is_nan_stops_the_run_and_is_named(config: ddpo.Config) -> None:
    with pytest.raises(ValueError, match=r"'tests.test_ddpo:not_a_number' returned nan for the prompt 'a "):
        train(replace(config, rewards="tests.test_ddpo:not_a_number"))
