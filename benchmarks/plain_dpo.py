"""Diffusion-DPO as it is commonly written, as a baseline: each step reads and encodes its images again."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from rlhf_t2i.shapes.names import TOY_MODEL_FOLDER


def train_on_the_fly(
    pairs: Sequence[Sequence[Mapping[str, str]]],
    folder: Path,
    *,
    draw: Callable[[int, tuple[int, ...]], tuple[Tensor, Tensor]],
    before_step: Callable[[], None],
    beta: float,
    learning_rate: float,
) -> list[float]:
    """Run the loop of diffusers' `train_diffusion_dpo.py` with all weights trained and a frozen copy as the reference.

    `pairs` has the pairs of each step; `draw` returns a step's timesteps and its noise of a given shape. Returns the
    loss of each step.
    """
    pipeline: Any = StableDiffusionPipeline.from_pretrained(TOY_MODEL_FOLDER, dtype=torch.float32)
    vae, text_encoder, tokenizer = pipeline.vae.eval(), pipeline.text_encoder.eval(), pipeline.tokenizer
    unet, scheduler = pipeline.unet, pipeline.scheduler
    for frozen in (vae, text_encoder, reference := copy.deepcopy(unet)):
        frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=1e-4)
    losses: list[float] = []
    for step, own in enumerate(pairs):
        before_step()
        files = [folder / row[side] for side in ("winner", "loser") for row in own]
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        tokens = tokenizer(
            [row["prompt"] for row in own], padding="max_length", truncation=True,
            max_length=tokenizer.model_max_length, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            latents = vae.encode(pixels).latents * vae.config.scaling_factor
            states = text_encoder(tokens.input_ids)[0].repeat(2, 1, 1)
        timesteps, noise = draw(step, (len(own), *latents.shape[1:]))
        timesteps, noise = timesteps.repeat(2), noise.repeat(2, 1, 1, 1)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        is_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
        winner, loser = (unet(noisy, timesteps, states).sample - target).square().mean(dim=(1, 2, 3)).chunk(2)
        with torch.no_grad():
            errors = (reference(noisy, timesteps, states).sample - target).square().mean(dim=(1, 2, 3))
        reference_winner, reference_loser = errors.chunk(2)
        difference = (winner - loser) - (reference_winner - reference_loser)
        loss = -F.logsigmoid(-0.5 * beta * difference).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
