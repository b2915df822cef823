"""Reference images of instructions, for models that edit: a condition of sampling besides the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from reward_model.image_files import open_image
from reward_model.images import fit, to_tensor
from rlhf_t2i.models.table import FAMILIES, family_entry, pipeline_class_of
from rlhf_t2i.prompt_rows import IMAGE, EditPrompt, Prompt
from rlhf_t2i.types import Conditioning


def check_edits(prompts: Sequence[str], *, model: str) -> None:
    """Raise ValueError, with its place, unless no row has a reference image, or each has and the model can edit it.

    A file that is missing or no image raises FileNotFoundError or ValueError. No model is loaded.
    """
    edits = [prompt for prompt in prompts if isinstance(prompt, EditPrompt)]
    if not edits:
        return
    pipeline_class = pipeline_class_of(model)
    if not family_entry(pipeline_class).edits_images:
        able = ", ".join(name for name, entry in FAMILIES.items() if entry.edits_images)
        raise ValueError(
            f"{_place(edits[0])} has an {IMAGE!r} to edit, and the model {model!r} ({pipeline_class}) generates from "
            f"text alone. Take a model that edits ({able}), or rows without {IMAGE!r}."
        )
    for prompt in prompts:
        if not isinstance(prompt, EditPrompt):
            raise ValueError(
                f"{_place(prompt)} has no {IMAGE!r} to edit, and {_place(edits[0])} has one: give every row its "
                f"image, or none."
            )
    for prompt in dict.fromkeys(edits):
        _check_image(prompt)


def encode_rows(policy: Any, prompts: Sequence[str]) -> Conditioning:
    """Run the text encoders and, on reference images resized and cropped to the policy's size, the autoencoder.

    Raises ValueError for a reference image that the policy's family cannot edit, or that cannot be read.
    """
    conditioning = policy.encode_prompts(prompts)
    paths = [prompt.image for prompt in prompts if isinstance(prompt, EditPrompt)]
    if not paths:
        return conditioning
    if not family_entry(policy.pipeline_class.__name__).edits_images:
        raise ValueError(f"{policy.title} generates from text alone; it cannot edit the image {str(paths[0])!r}.")
    images = torch.stack([fit(to_tensor(path), *policy.image_size) for path in paths])
    return replace(conditioning, image=policy.encode_images(images))


def _check_image(prompt: EditPrompt) -> None:
    if not prompt.image.is_file():
        raise FileNotFoundError(f"{_place(prompt)}: there is no {IMAGE} {str(prompt.image)!r}.")
    try:
        with open_image(prompt.image):
            pass
    except Exception as error:  # Pillow's decoders raise any exception type on broken bytes
        raise ValueError(f"{_place(prompt)}: {str(prompt.image)!r} is no image that can be read: {error}.") from error


def _place(prompt: str) -> str:
    return (prompt.where if isinstance(prompt, Prompt) else "") or f"The prompt {str(prompt)!r}"
