"""Optimisers and learning rates of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import ddpo, diffusion_dpo, draft
from rlhf_t2i.output.run_folder import read_run_info
from rlhf_t2i.settings.optimizer import OptimizerSettings
from rlhf_t2i.training.learning_rate import learning_rates
from tests.runs import REDNESS, assert_same, state

# --- learning rates -----------------------------------------------------------------------------------


def rates(**options: object) -> list[float]:
    config = OptimizerSettings(learning_rate=2.0, num_steps=4, **options)  # type: ignore[arg-type]
    return [learning_rates(config)(step) for step in range(config.num_steps)]


def test_a_warm_up_rises_linearly_and_its_last_step_has_the_full_rate() -> None:
    assert rates(warmup_steps=2) == [1.0, 2.0, 2.0, 2.0]
    assert rates(warmup_steps=1) == rates() == [2.0] * 4


def test_a_schedule_falls_from_the_full_rate_towards_zero_after_the_last_step() -> None:
    assert rates(lr_scheduler="linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(lr_scheduler="cosine") == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])
    assert rates(lr_scheduler="linear", warmup_steps=2) == pytest.approx([1.0, 2.0, 4 / 3, 2 / 3])


def test_schedules_are_those_of_transformers() -> None:
    from transformers.optimization import get_scheduler

    for name in ("cosine", "linear"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule, expected = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=4), list[float]()
        for _ in range(4):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates(lr_scheduler=name) == expected


# --- runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> ddpo.Config:
    return ddpo.Config(
        model=str(tiny_sd), prompts_per_step=2, images_per_prompt=4, num_denoising_steps=2, num_minibatches=2,
        window_end=1.0, learning_rate=1e-2, rewards=REDNESS, evaluation_rewards=REDNESS, num_steps=3, lora_rank=2,
        evaluate_every=0, num_evaluation_images=2, num_evaluation_steps=2, checkpoint_every=1, keep_checkpoints=3,
        num_cpu_threads=1, prompts="shapes", evaluation_prompts="shapes", microbatch_size=8, guidance_scale=1.0,
        resolution=16, run_folder=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        ("adamw", {"exp_avg", "exp_avg_sq", "step"}),
        ("adam", {"exp_avg", "exp_avg_sq", "step"}),
        ("sgd", {"momentum_buffer"}),
        ("adamw_8bit", {"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "step"}),
    ],
)
def test_a_run_with_any_optimiser_and_a_schedule_resumes_exactly(
    optimizer: str, keys: set[str], config: ddpo.Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, optimizer=optimizer, lr_scheduler="cosine", warmup_steps=1)
    if optimizer == "adamw_8bit":
        config = replace(config, lora_rank=512)  # smaller weights have a state of 32 bits
    whole = ddpo.main(config)
    assert "4 images in one optimiser step; their gradients accumulate" in capfd.readouterr().out
    stored = state(whole, 1)[0]
    assert {name.partition("/")[0] for name in stored} == {"weight", *keys}
    folder = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_t2i.training.trainer.Trainer.finish", lambda trainer: trainer.folder)
        patch.setattr("rlhf_t2i.training.trainer.Trainer.stopped_early", property(lambda trainer: trainer.step >= 1))
        ddpo.main(replace(config, run_folder=str(folder)))
    resumed = ddpo.main(replace(config, run_folder=str(folder), resume=True))
    assert_same(state(resumed, 3)[0], state(whole, 3)[0])


@pytest.mark.slow
def test_optimisers_differ_and_sgd_keeps_half_the_state(config: ddpo.Config, tmp_path: Path) -> None:
    sizes = {}
    for optimizer in ("adamw", "sgd"):
        folder = ddpo.main(replace(config, optimizer=optimizer, num_steps=1, run_folder=str(tmp_path / optimizer)))
        sizes[optimizer] = read_run_info(folder)["placement"]["bytes_per_process"]["optimizer"]
    assert sizes["adamw"] == 2 * sizes["sgd"]
    weights = [
        {name: tensor for name, tensor in state(tmp_path / optimizer, 1)[0].items() if name.startswith("weight/")}
        for optimizer in ("adamw", "sgd")
    ]
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_sgd_without_momentum_has_no_state_and_resumes(config: ddpo.Config) -> None:
    config = replace(config, optimizer="sgd", adam_beta1=0.0, num_steps=1)
    folder = ddpo.main(config)
    assert {name.partition("/")[0] for name in state(folder, 1)[0]} == {"weight"}
    ddpo.main(replace(config, num_steps=2, resume=True))


def test_the_images_of_an_optimiser_step_are_known() -> None:
    assert ddpo.Config(prompts_per_step=16, images_per_prompt=12, num_minibatches=2).images_per_optimizer_step == 96
    assert draft.Config(prompts_per_step=128).images_per_optimizer_step == 128
    assert diffusion_dpo.Config(pairs="pairs.jsonl", pairs_per_step=64).images_per_optimizer_step == 128
    assert diffusion_dpo.Config().images_per_optimizer_step is None
