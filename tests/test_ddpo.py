"""The DDPO recipe end to end, on a tiny random pipeline: what moves, what is the same, what survives."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from recipes import ddpo
from rlhf_t2i.distributed.state import stored_weights
from rlhf_t2i.training.evaluation import Evaluation
from rlhf_t2i.training.run import Run
from rlhf_t2i.training.trainer import Trainer, TrainerConfig
from tests.runs import state

ROOT = Path(__file__).parent.parent


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward that any model can learn, in a name that a command line can give."""
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> ddpo.Config:
    """A run of three steps that uses every part of the recipe."""
    return ddpo.Config(
        model=str(tiny_sd),
        prompts_per_step=2,
        images_per_prompt=4,
        num_denoising_steps=4,
        num_inner_epochs=2,
        num_minibatches=2,
        microbatch_size=8,
        learning_rate=1e-3,
        adam_epsilon=1e-3,  # or Adam makes whole steps of gradients that are nothing but rounding
        ema_decay=0.5,
        kl_weight=0.1,
        history_size=8,
        history_min_count=4,
        rewards="tests.test_ddpo:redness",
        evaluation_rewards="tests.test_ddpo:redness",
        num_steps=3,
        evaluate_every=0,
        num_evaluation_images=4,
        checkpoint_every=1,
        run_folder=str(tmp_path / "run"),
        num_cpu_threads=1,
    )


def train(config: ddpo.Config) -> Path:
    """Run the recipe in this process; returns the run folder."""
    return ddpo.main(config)


def weights(folder: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return stored_weights(folder / "checkpoints" / f"step_{step:06d}")


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_close(tensor, other[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# --- learning ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 16])
def test_the_reward_rises(tmp_path: Path, lora_rank: int | None) -> None:
    """The built-in model learns to paint red; the evaluation, with prompts and seeds of its own, sees it too."""
    folder = train(
        ddpo.Config(
            rewards="tests.test_ddpo:redness", evaluation_rewards="tests.test_ddpo:redness",
            prompts_per_step=8, images_per_prompt=8, num_denoising_steps=4, num_steps=8,
            lora_rank=lora_rank, learning_rate=1e-2 if lora_rank else 3e-4, advantages="whole_batch",
            num_evaluation_images=34, evaluate_every=0, run_folder=str(tmp_path / "run"),
        )
    )  # fmt: skip
    before, after = rows(folder, "evaluation")
    assert after["tests.test_ddpo:redness"] > before["tests.test_ddpo:redness"] + 0.02


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_what_is_trainable_moves_and_what_is_frozen_does_not(
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
    before.set_trainable(lora_rank, lora_alpha=None, keep_reference=False, seed=0)
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
    still = [name for name, p in after.trainable.items() if torch.equal(p, before.trainable[name])]
    assert not still
    learning = "lora_A", "lora_B"
    expected = [
        n for n, _ in after.network.named_parameters() if lora_rank is None or any(kind in n for kind in learning)
    ]
    assert list(after.trainable) == expected


# --- the same numbers -------------------------------------------------------------------------------


def test_the_first_replay_has_ratio_one_and_later_ones_move(config: ddpo.Config) -> None:
    for row in rows(train(config), "train"):
        assert row["replay_error"] == 0
        assert row["ratio_std"] > 0


def test_the_microbatch_size_changes_no_result(config: ddpo.Config, tmp_path: Path) -> None:
    whole = train(config)
    parts = train(replace(config, microbatch_size=3, run_folder=str(tmp_path / "parts")))
    assert_same(weights(whole), weights(parts), atol=1e-4)
    assert rows(whole, "train")[0]["reward"] == pytest.approx(rows(parts, "train")[0]["reward"], abs=1e-6)


def test_judging_while_painting_changes_no_result(config: ddpo.Config, tmp_path: Path) -> None:
    """Nine parts of eight images, each judged while the next is painted: the same advantages, so the same weights."""
    config = replace(config, prompts_per_step=9, images_per_prompt=8, num_steps=2)
    (at_once, rest) = state(train(config), 2)
    overlapped, same = state(train(replace(config, async_reward=True, run_folder=str(tmp_path / "overlapped"))), 2)
    assert_same(overlapped, at_once)
    assert same == rest


def test_gradient_checkpointing_changes_no_result(config: ddpo.Config, tmp_path: Path) -> None:
    plain = train(config)
    saved = train(replace(config, gradient_checkpointing=True, run_folder=str(tmp_path / "saved")))
    assert_same(weights(plain), weights(saved), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_two_processes_give_the_update_of_one(config: ddpo.Config, tmp_path: Path, lora_rank: int | None) -> None:
    """ddp.yaml on the CPU: the same prompts, images, advantages and weights, whoever paints them."""
    config = replace(config, lora_rank=lora_rank, max_gradient_norm=0.1)
    one = train(replace(config, run_folder=str(tmp_path / "one")))
    two = launch(replace(config, run_folder=str(tmp_path / "two")), "ddp.yaml")
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    first, *_ = zip(rows(one, "train"), rows(two, "train"), strict=True)
    for name in ("reward", "reward_std", "loss", "ratio_std", "kl", "gradient_norm"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-3, abs=1e-7), name
    assert_same(weights(one), weights(two), atol=5e-5)
    assert rows(one, "evaluation")[-1]["tests.test_ddpo:redness"] == pytest.approx(
        rows(two, "evaluation")[-1]["tests.test_ddpo:redness"], abs=1e-5
    )


def test_bfloat16_networks_replay_exactly_and_export_float32(config: ddpo.Config) -> None:
    folder = train(replace(config, mixed_precision="bf16", lora_rank=2))
    assert all(row["replay_error"] == 0 for row in rows(folder, "train"))
    exported = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


# --- surviving --------------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_that_was_never_stopped(config: ddpo.Config, tmp_path: Path) -> None:
    """Weights, optimiser, average and prompt history to the bit; metrics without a gap or a repetition."""
    uninterrupted = train(config)
    stopped = replace(config, run_folder=str(tmp_path / "stopped"))
    train(replace(stopped, num_steps=1))
    folder = train(replace(stopped, resume=True))
    assert_same(weights(uninterrupted), weights(folder))
    (tensors, rest), (expected, expected_rest) = state(folder), state(uninterrupted)
    assert {key.partition("/")[0] for key in tensors} == {"weight", "exp_avg", "exp_avg_sq", "step", "ema"}
    assert_same(tensors, expected)
    assert rest == expected_rest
    kept = ("step", "reward", "loss", "ratio_std", "kl")
    one, two = ([[row[name] for name in kept] for row in rows(f, "train")] for f in (uninterrupted, folder))
    assert one == two


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(config: ddpo.Config, tmp_path: Path) -> None:
    """Killed three times without warning and resumed each time, the run ends with the very same weights."""
    config = replace(config, num_steps=12)
    whole = launch(replace(config, run_folder=str(tmp_path / "whole")))
    folder = tmp_path / "killed"
    chance = random.Random(0)
    for attempt in range(3):
        before = num_rows(folder)
        process = start(replace(config, run_folder=str(folder), resume=attempt > 0))
        wait_for_progress(process, folder, more_than=before)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    launch(replace(config, run_folder=str(folder), resume=True))
    assert_same(weights(whole, 12), weights(folder, 12))
    assert [row["step"] for row in rows(folder, "train")] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_writes_a_checkpoint_and_exits_cleanly(config: ddpo.Config, sent: signal.Signals) -> None:
    folder = Path(str(config.run_folder))
    process = start(replace(config, num_steps=1000, checkpoint_every=0))
    wait_for_progress(process, folder, more_than=1)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    done = rows(folder, "train")[-1]["step"]
    assert weights(folder, done)
    assert f"Stopped after {done} of 1000 steps. " in output
    again = ["--config", str(folder / "config.yaml"), "--resume", "--run_folder", str(folder)]
    assert f"Continue with: {' '.join(again)}" in output
    result = subprocess.run(
        [sys.executable, "recipes/ddpo.py", *again, "--num_steps", str(done + 1)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert rows(folder, "train")[-1]["step"] == done + 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell a process that its parent has died")
def test_terminating_accelerate_launch_stops_the_run_politely_too(config: ddpo.Config) -> None:
    """accelerate itself would die and leave the recipe running."""
    folder = Path(str(config.run_folder))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/single.yaml"]
    process = start(replace(config, num_steps=1000, checkpoint_every=0), *launcher)
    wait_for_progress(process, folder, more_than=1)
    process.terminate()
    output, _ = process.communicate(timeout=60)  # until the recipe, too, has closed the pipe
    done = rows(folder, "train")[-1]["step"]
    assert f"Stopped after {done} of 1000 steps" in output
    assert weights(folder, done)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    config: ddpo.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = train(replace(config, run_folder=str(tmp_path / "whole")))
    folder = train(config)
    path = folder / "checkpoints" / "step_000003" / "weights-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    train(replace(config, resume=True))
    assert "step_000003: weights-00001-of-00001.safetensors does not match its checksum" in capsys.readouterr().out
    assert_same(weights(uninterrupted), weights(folder))


def test_no_space_while_saving_leaves_the_old_checkpoint_whole(
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


# --- what leaves it ---------------------------------------------------------------------------------

SAMPLE = """
import sys, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
model, weights, out, prompts = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
pipe = StableDiffusionPipeline.from_pretrained(model)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
if weights.endswith("lora"):
    pipe.load_lora_weights(weights)
else:
    pipe.unet = UNet2DConditionModel.from_pretrained(weights)
generators = [torch.Generator().manual_seed(1_000_000 + i) for i in range(len(prompts))]
images = pipe(prompts, num_inference_steps=4, guidance_scale=1.0, generator=generators, output_type="pt").images
torch.save(images, out)
assert not any(name.startswith("rlhf_t2i") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_plain_diffusers_paints_the_images_of_the_last_evaluation(
    config: ddpo.Config, tmp_path: Path, lora_rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported weights, loaded by a script that imports only diffusers."""
    seen: list[Evaluation] = []
    record = Trainer.record
    monkeypatch.setattr(
        Trainer, "record", lambda trainer, evaluation: (seen.append(evaluation), record(trainer, evaluation))
    )
    folder = train(replace(config, lora_rank=lora_rank, learning_rate=3e-2 if lora_rank else 3e-3, clip_range=1.0))
    name, out = "lora" if lora_rank else "unet", tmp_path / "images.pt"
    (tmp_path / "paint.py").write_text(SAMPLE)
    command = [sys.executable, "paint.py", config.model, str(folder / name), str(out), *seen[-1].prompts]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=True, capture_output=True)
    painted = torch.load(out, weights_only=True)
    assert (painted - seen[-1].images).abs().max() < 1e-3
    assert (seen[-1].images - seen[0].images).abs().max() > 0.01, "the run must have changed the images"


def test_the_run_folder_tells_what_happened(config: ddpo.Config) -> None:
    folder = train(replace(config, trackers="tensorboard"))
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "run.json", "metrics.jsonl", "report.html", "images", "checkpoints", "unet",
    }  # fmt: skip
    assert {p.name for p in (folder / "images").iterdir()} == {
        "captions.json", "step_000000.png", "step_000000.json", "step_000003.png", "step_000003.json",
        "extremes.json", "extremes_000003.png",
    }  # fmt: skip
    facts = json.loads((folder / "run.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step_000002", "step_000003"}


# --- bad input --------------------------------------------------------------------------------------


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
def test_impossible_geometry_is_refused(config: ddpo.Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_run_folder_with_a_run_in_it_is_not_overwritten(config: ddpo.Config) -> None:
    train(replace(config, num_steps=1))
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(config)


def test_a_run_folder_with_another_config_is_refused(config: ddpo.Config) -> None:
    train(replace(config, num_steps=1))
    with pytest.raises(ValueError, match=r"another config: learning_rate was 0\.001 and is now 0\.5"):
        train(replace(config, resume=True, learning_rate=0.5))


def test_resuming_what_is_not_there_is_refused(config: ddpo.Config) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run to resume in .*/run: it has no config\.yaml"):
        train(replace(config, resume=True))


def test_prompts_that_processes_cannot_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_the_first_update_warns_of_a_ratio_that_hardly_or_wildly_moves(
    config: ddpo.Config, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str | None
) -> None:
    folder = train(replace(config, num_steps=1, **changes))
    output = capsys.readouterr().out
    assert message in output if message else "WARNING" not in output
    assert rows(folder, "train")[0]["clip_range"] == pytest.approx(5e-4 * (512 / 256) ** 0.5)  # 4 x 8 x 8 numbers


def broken(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.full((len(images),), float("nan"))


def test_a_reward_that_is_no_number_stops_the_run_with_its_name(config: ddpo.Config) -> None:
    with pytest.raises(ValueError, match=r"'tests.test_ddpo:broken' returned nan for the prompt 'a "):
        train(replace(config, rewards="tests.test_ddpo:broken"))


# --- processes --------------------------------------------------------------------------------------


def command_line(config: TrainerConfig) -> list[str]:
    given = {name: value for name, value in vars(config).items() if value is not None}
    return [
        part
        for name, value in given.items()
        for part in (f"--{name}", str(value).lower() if value is True or value is False else str(value))
    ]


def start(config: ddpo.Config, *launcher: str) -> subprocess.Popen[str]:
    """The recipe in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, "recipes/ddpo.py", *command_line(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch_command(config: TrainerConfig, accelerate_config: str, *options: str) -> list[str]:
    """`accelerate launch` of the recipe whose config this is."""
    recipe = type(config).__module__.replace(".", "/")
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{accelerate_config}",
        *options, f"{recipe}.py", *command_line(config),
    ]  # fmt: skip


def launch(config: TrainerConfig, accelerate_config: str = "single.yaml", *options: str) -> Path:
    """The recipe by `accelerate launch`, to its end."""
    command, environment = launch_command(config, accelerate_config, *options), {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Path(str(config.run_folder))


def num_rows(folder: Path) -> int:
    """Training steps written down so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def wait_for_progress(process: subprocess.Popen[str], folder: Path, *, more_than: int) -> None:
    """Until more than so many steps are written down."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        if num_rows(folder) > more_than:
            return
        time.sleep(0.05)
    raise AssertionError("The run made no progress.")
