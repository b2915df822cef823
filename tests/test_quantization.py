"""Frozen weights in 8 and 4 bits: the rounding, every family of models, and training on them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.testing import assert_close

from recipes import ddpo
from reward_model.quantization import Quantization, num_elements, quantize
from rlhf_t2i.distributed.memory import num_bytes
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.models.lora import LoraConfiguration
from rlhf_t2i.output.run_folder import read_run_info
from rlhf_t2i.shapes.names import TOY_MODEL
from tests.policies import LATEST, PROMPTS, images_of, perturb, pipeline_of, policy_of, stock_images
from tests.runs import REDNESS, as_for_toy_models, assert_same, rows, state
from tests.toys import CPU, seeded

KINDS: list[Quantization] = ["int8", "nf4"]


def quantized(weight: Tensor, kind: Quantization) -> nn.Module:
    network = nn.Sequential(nn.Linear(*reversed(weight.shape)), nn.Conv2d(1, 1, 3)).requires_grad_(False)
    network[0].weight.data, network[0].bias.data = weight.clone(), torch.zeros(len(weight))
    quantize(network, kind, device=CPU, dtype=torch.float32)
    return network


# --- rounding ---------------------------------------------------------------------------------------


def test_8_bits_round_each_row_to_steps_of_its_largest_weight() -> None:
    """The row's largest weight is 127.5 steps: round(0.25 / (2 / 127.5)) = 16, round(-1 / (2 / 127.5)) = -64."""
    row = torch.zeros(2, 64)
    row[0, :3], row[1, :2] = torch.tensor([2.0, 0.25, -1.0]), torch.tensor([-0.001, 0.0005])
    layer = quantized(row, "int8")[0]
    step = torch.tensor([[2 / 127.5], [0.001 / 127.5]])
    found = layer(torch.eye(64)).T / step
    assert_close(found[0, :3], torch.tensor([127.0, 16.0, -64.0]), rtol=0, atol=1e-3)
    assert_close(found[1, :2], torch.tensor([-128.0, 64.0]), rtol=0, atol=1e-3)


def test_4_bits_round_blocks_of_64_to_quantiles_of_a_normal_distribution() -> None:
    """Values of QLoRA's table (arXiv:2305.14314, appendix E) times a block's largest weight are exact."""
    table = torch.tensor([-1.0, -0.6961928, -0.28444138, 0.0, 0.07958029, 0.33791524, 0.72295684, 1.0])
    weight = torch.zeros(2, 64)
    weight[0, :8], weight[1, :8], weight[1, 8] = 3 * table, 0.5 * table, 0.5 * 0.09
    found = quantized(weight, "nf4")[0](torch.eye(64)).T
    assert_close(found[0, :8], 3 * table)
    assert_close(found[1, :9], 0.5 * torch.cat([table, torch.tensor([0.07958029])]))


def test_the_bytes_of_quantised_weights_are_counted() -> None:
    weight = torch.randn(32, 128)
    scales = {"int8": 32 * (4 + 1), "nf4": 32 * 128 / 64 * 4}  # int8 rows also have a zero point of one byte
    for kind, expected in (("int8", 32 * 128 + scales["int8"]), ("nf4", 32 * 128 / 2 + scales["nf4"])):
        parameter = quantized(weight, kind)[0].weight
        assert (num_elements(parameter), num_bytes(parameter)) == (32 * 128, expected)
    assert type(quantized(weight, "int8")[1].weight) is nn.Parameter  # a convolution


def test_predictions_change_by_thousandths_in_8_bits_and_by_hundredths_in_4() -> None:
    """The norm of the difference over that of the prediction, of the built-in U-Net with random inputs.

    On one processor they were three to seven times those on another, so that the bounds are wide.
    """
    found = {}
    for kind in (None, *KINDS):
        policy = load_policy(TOY_MODEL, device=CPU, quantization=kind)
        level = policy.schedule(8).at(torch.full((4,), 3))
        noise = policy.initial_noise(seeded(0, 1), copies=2)
        with torch.no_grad():
            found[kind] = policy.predict(noise, level, policy.encode(PROMPTS * 2), guidance_scale=1.0).noise
    in_8_bits, in_4 = (float((found[kind] - found[None]).norm() / found[None].norm()) for kind in KINDS)
    assert 3e-4 < in_8_bits < 4e-3 < in_4 < 0.1


# --- models -----------------------------------------------------------------------------------------


TOLERANCE = {"int8": 0.05, "nf4": 0.5}
"""Of images of random networks, relative to the standard deviation of their pixels."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    list(zip(["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_zimage", *LATEST], KINDS * 4, strict=True)),
)
def test_a_lora_on_quantised_weights_is_an_ordinary_one(
    name: str, kind: Quantization, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It loads into quantised weights exactly, and into plain ones up to their rounding."""
    model = request.getfixturevalue(name)
    policy = policy_of(model, quantization=kind)
    assert num_bytes_of(policy.network) < num_bytes_of(policy_of(model).network)
    assert any(num_bytes(p) != 4 * num_elements(p) for e in policy.text_encoders for p in e.model.parameters())
    base = images_of(policy)
    policy.set_trainable(LoraConfiguration(2), keep_reference=True, seed=0)
    perturb(policy)
    expected = images_of(policy)
    assert (expected - base).abs().max() > 1e-3
    with policy.as_reference():
        assert_close(images_of(policy), base, rtol=0, atol=0)
    folder = policy.export(tmp_path, policy.trainable)
    assert_close(images_of(policy_of(model, weights=folder, quantization=kind)), expected, rtol=0, atol=1e-6)
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(folder)
    difference = stock_images(pipeline) - expected
    assert difference.square().mean().sqrt() < TOLERANCE[kind] * expected.std()


def num_bytes_of(network: nn.Module) -> int:
    return sum(map(num_bytes, network.parameters()))


# --- runs -------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> ddpo.Config:
    return ddpo.Config(
        **as_for_toy_models(
            model=str(tiny_sd), prompts_per_step=2, images_per_prompt=4, num_denoising_steps=3, num_minibatches=2,
            learning_rate=1e-2, rewards=REDNESS, evaluation_rewards=REDNESS, num_steps=2, lora_rank=4, kl_weight=0.1,
            evaluate_every=0, num_evaluation_images=2, checkpoint_every=1, keep_checkpoints=3, num_cpu_threads=1,
            microbatch_size=3, run_folder=str(tmp_path / "run"),
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("int8", "bf16"), ("nf4", "no")])
def test_ratios_are_one_at_replay_and_a_resume_is_exact(
    config: ddpo.Config, kind: Quantization, precision: str, tmp_path: Path
) -> None:
    config = replace(config, quantization=kind, mixed_precision=precision)
    whole = ddpo.main(config)
    assert [row["replay_error"] for row in rows(whole, "train")] == [0, 0]
    assert rows(whole, "train")[1]["kl"] > 0
    stopped = replace(config, run_folder=str(tmp_path / "stopped"))
    ddpo.main(replace(stopped, num_steps=1))
    resumed = ddpo.main(replace(stopped, resume=True))
    assert_same(state(resumed, 2)[0], state(whole, 2)[0])
    plain = ddpo.main(replace(config, quantization=None, run_folder=str(tmp_path / "plain"), num_steps=1))
    found, expected = (read_run_info(folder)["placement"] for folder in (whole, plain))
    assert found["frozen_parameters"] == expected["frozen_parameters"]
    assert found["bytes_per_process"]["weights"] < expected["bytes_per_process"]["weights"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": None}, "quantization is int8; it must be null without a LoRA"),
        ({"use_dora": True}, "quantization is int8; it must be null with use_dora"),
        ({"init_weights": "runs/all"}, "quantization is int8; it must be null with init_weights"),
    ],
)
def test_what_cannot_be_trained_on_quantised_weights_is_refused(
    config: ddpo.Config, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, quantization="int8", **changes)


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    config: ddpo.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torchao.quantization", "bitsandbytes", "bitsandbytes.optim.adamw"):
        monkeypatch.setitem(sys.modules, module, None)
    for changes in ({"quantization": "int8"}, {"quantization": "nf4"}, {"optimizer": "adamw_8bit"}):
        with pytest.raises(ModuleNotFoundError, match=r"needs: pip install 'rlhf-t2i\[quant\]'"):
            ddpo.main(replace(config, **changes))


def test_a_strategy_that_exchanges_plain_weights_is_refused(
    config: ddpo.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_t2i.training.run.start_processes", lambda *_, **__: (Accelerator(), "zero3"))
    with pytest.raises(ValueError, match="quantization is int8; with zero3, which exchanges plain weights"):
        ddpo.main(replace(config, quantization="int8"))


def test_a_pipeline_of_the_caller_is_not_quantised(config: ddpo.Config, tiny_sd: Path) -> None:
    with pytest.raises(ValueError, match="quantization is int8; it must be null for a pipeline of the caller"):
        ddpo.train(replace(config, quantization="int8"), pipeline=pipeline_of(tiny_sd))
