"""Copies of pipelines that tests load: as fresh as from disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.policies import policy_of


def test_a_copy_shares_no_weight_and_changed_files_are_read_again(tiny_sd: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    biases = [policy_of(folder).network.conv_in.bias for _ in range(4)]
    expected = biases[0].detach().clone()
    for bias in biases:
        assert torch.equal(bias, expected)
        with torch.no_grad():
            bias.add_(1)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "conv_in.bias": weights["conv_in.bias"] + 2}, file, {"format": "pt"})
    assert torch.equal(policy_of(folder).network.conv_in.bias, expected + 2)
