"""Computed memory: by hand, in the limits, and against tensors that are really saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from rlhf_t2i.distributed.memory import BUCKET, Layout, gathered_by_fsdp, memory_of, peak_bytes, saved_bytes
from rlhf_t2i.distributed.placement import layout_of, placement_config, placement_table
from rlhf_t2i.distributed.processes import Mode

MODES: tuple[Mode, ...] = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
TEN = Layout(mode="single", processes=2, trainable=10, frozen=4, frozen_width=2, bucket=6, block=3)


@pytest.mark.parametrize(
    ("mode", "persistent", "backward", "optimizer_step"),
    [
        # 40 bytes of trained weights, 8 of frozen ones, 80 of moments, 40 of gradients
        ("single", 48 + 80, 128 + 40, 128 + 80),
        ("ddp", 48 + 80 + 40, 168 + 40, 168 + 80),
        ("zero1", 48 + 20 + 40, 108 + 40 + 24, 108 + 60),
        ("zero2", 48 + 20 + 40, 108 + 20 + 24 + 24, 108 + 60),
        # all 14 weights are gathered; bucket and gradients are never freed
        ("zero3", 24 + 20 + 40 + 24 + 20, 128 + 24 + 48, 128 + 20),
        ("fsdp2", 24 + 40, 64 + 40 + 3 * (3 * 48 / 14), 64 + 40),
    ],
)
def test_bytes_by_hand(mode: Mode, persistent: float, backward: float, optimizer_step: float) -> None:
    memory = memory_of(replace(TEN, mode=mode))
    assert memory.persistent == pytest.approx(persistent)
    assert memory.backward == pytest.approx(backward)
    assert memory.optimizer_step == pytest.approx(optimizer_step)


@pytest.mark.parametrize("mode", MODES)
def test_one_process_needs_equal_memory_with_every_strategy(mode: Mode) -> None:
    own, single = memory_of(replace(TEN, mode=mode, processes=1)), memory_of(replace(TEN, processes=1))
    for name in ("weights", "gradients", "moments"):
        assert getattr(own, name) == getattr(single, name)
    assert own.persistent - own.master - own.persistent_buffers == single.persistent


@pytest.mark.parametrize(
    ("mode", "left"),
    [("single", 208), ("ddp", 248), ("zero1", 48 + 40 + 24), ("zero2", 48 + 24 + 24), ("zero3", 24 + 24 + 48)],
)
def test_with_many_processes_only_unsharded_memory_remains(mode: Mode, left: float) -> None:
    assert memory_of(replace(TEN, mode=mode, processes=10**9)).peak == pytest.approx(left, abs=1e-3)


def test_fsdp_without_accumulation_shards_gradients_too() -> None:
    accumulated = memory_of(replace(TEN, mode="fsdp2", processes=10**9, block=0))
    sharded = memory_of(replace(TEN, mode="fsdp2", processes=10**9, block=0, accumulates=False))
    assert accumulated.backward == pytest.approx(40, abs=1e-3)
    assert sharded.backward == pytest.approx(0, abs=1e-3)


def test_copies_and_activations_are_added() -> None:
    plain = memory_of(TEN, activations=1000.0)
    rich = memory_of(replace(TEN, num_averages=1, reference=True), activations=1000.0, others=7.0)
    assert plain.peak == 128 + 40 + 1000
    assert rich.peak - plain.peak == 40 + 56 + 7


def test_offloading_leaves_only_the_weights_on_the_device() -> None:
    memory = memory_of(replace(TEN, mode="zero3", offload=True))
    assert (memory.persistent, memory.host) == (24 + 24, 80)


def test_deepspeed_allocates_its_bucket_however_few_parameters_are_trained() -> None:
    memory = memory_of(Layout(mode="zero2", processes=8, trainable=1))
    assert memory.backward > 4 * BUCKET


class Chain(nn.Module):
    """Two layers without bias, so small that saved bytes can be counted by hand."""

    _no_split_modules = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh()) * self.scale


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("batch", [2, 4])
def test_saved_activations_by_hand(batch: int, fake: bool) -> None:
    mode = FakeTensorMode() if fake else torch.enable_grad()
    with mode:
        network, x = Chain(), torch.zeros(batch, 5)
        # the input, tanh's output, which the second layer saves too, and the second layer's output
        assert saved_bytes(network, lambda: network(x)) == 4 * batch * (5 + 7 + 3)


def test_a_checkpointed_module_saves_only_its_input() -> None:
    network, x = Chain(), torch.zeros(2, 5)
    assert saved_bytes(network, lambda: checkpoint(network, x, use_reentrant=False)) == 4 * 2 * 5


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fake_network_saves_as_many_bytes_as_a_real_one(checkpointing: bool) -> None:
    def measured() -> tuple[int, int]:
        network = unet().train()
        if checkpointing:
            network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        inputs = torch.zeros(2, 4, 8, 8), torch.ones(2), torch.zeros(2, 6, 16)

        def forward() -> torch.Tensor:
            return network(*inputs, return_dict=False)[0]

        return saved_bytes(network, forward), peak_bytes(network, lambda: forward().sum().backward())

    with FakeTensorMode():
        fake = measured()
    real = measured()
    assert fake[0] == real[0]
    assert fake[1] == pytest.approx(real[1], rel=0.02)


def test_the_peak_by_hand() -> None:
    network, x = nn.Linear(5, 7, bias=False), torch.zeros(2, 5)
    # the output, its sum, and the sum's gradient expanded over the output; then the weight's gradient, 4 x 35
    assert peak_bytes(network, lambda: network(x).sum().backward()) >= 4 * 35
    assert peak_bytes(network, lambda: network(x).sum().backward()) <= 4 * (35 + 2 * 14 + 2 * 10)


def test_fsdp_gathers_two_blocks_and_all_outside_of_blocks() -> None:
    network = nn.Sequential(Chain(), nn.Linear(2, 2))
    network._no_split_modules = ["Chain"]
    assert gathered_by_fsdp(network) == 6 + (35 + 21 + 3)


def test_a_run_states_what_each_process_holds() -> None:
    network = Chain()
    network.first.requires_grad_(False)
    layout = layout_of(network, "zero2", processes=2)
    text = placement_table(layout, precision="bf16", microbatch_size=8)
    assert "DeepSpeed ZeRO-2 over 2 processes" in text
    assert "8 x 2 = 16 images" in text
    assert "24 of the denoiser's 59 parameters" in text
    config = placement_config(layout, precision="bf16", microbatch_size=8)
    assert config["trainable_parameters"] == 24
    assert config["bytes_per_process"]["gradients"] == 48
