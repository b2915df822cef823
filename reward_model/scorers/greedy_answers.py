"""Answers in words of a multimodal LLM to questions about images."""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from reward_model.backbones.load import backbone_family, load_backbone
from reward_model.types import Backbone

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
"""Families of backbones that write: those whose models are transformers' own."""


def load_answering(source: str) -> Backbone:
    """Load a multimodal LLM that is asked questions, in the type of its weights.

    Raises FileNotFoundError if there is none, and ValueError for one that is not of `FAMILIES`.
    """
    if (family := backbone_family(source)) not in FAMILIES:
        raise ValueError(f"{source!r} is a model of type {family!r}; one that writes is of {', '.join(FAMILIES)}.")
    dtype = getattr(AutoConfig.from_pretrained(source), "dtype", None) or torch.float32
    backbone = load_backbone(source, dtype=dtype, padding_side="left")
    backbone.prompt_tokenizer = replace(backbone.prompt_tokenizer, answering=True)
    return backbone


@torch.no_grad()
def greedy_answers(
    backbone: Backbone, images: Float[Tensor, "B 3 Y X"], questions: Sequence[str], *, max_tokens: int, batch_size: int
) -> list[str]:
    """Return the greedy answer to each question about its image, of at most `max_tokens` tokens.

    `backbone` is one of `load_answering`, which is moved to the device of the images; one forward pass has `batch_size`
    of them.
    """
    backbone.model.to(images.device)
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        end = start + batch_size
        answers += _answers(backbone, images[start:end], questions[start:end], max_tokens)
    return answers


def _answers(backbone: Backbone, images: Tensor, questions: Sequence[str], max_tokens: int) -> list[str]:
    model, tokens = backbone.model, backbone.prompt_tokenizer
    inputs: Any = backbone.prepare(list(images.detach()), questions)
    if "image_grid_thw" in inputs:  # the Qwen families number their tokens by it
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokens.image_token_id).int()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, pad_token_id=tokens.padding_id,
        eos_token_id=model.generation_config.eos_token_id or tokens.tokenizer.eos_token_id,
    )  # fmt: skip
    inputs = {name: tensor.to(images.device) for name, tensor in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    written = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
    return tokens.tokenizer.batch_decode(written, skip_special_tokens=True)
