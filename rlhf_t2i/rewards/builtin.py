"""Rewards that need no model: the oracle of the toy world, and the size of an image as JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.pixels import to_pil
from rlhf_t2i.shapes import oracle
from rlhf_t2i.shapes.sign_oracle import read_signs, sign_scores
from rlhf_t2i.shapes.signs import is_sign_prompt, parse_sign


def oracle_graded(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """Return the oracle's graded score in [0, 1]; raises ValueError for a prompt outside the toy world."""
    return _scores(images, prompts).graded


def oracle_pass(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """Return 1 for an image that meets every condition of its prompt, else 0; raises ValueError as `oracle_graded`."""
    return _scores(images, prompts).passed.float()


def oracle_word(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """Return 1 for an image of a sign on which the oracle reads the word of the prompt, else 0.

    Colours and legibility do not count. Raises ValueError for a prompt that is not about a sign.
    """
    asked = [parse_sign(prompt).word for prompt in prompts]
    return torch.tensor([float(r.sign.word == word) for r, word in zip(read_signs(images), asked, strict=True)])


def _scores(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> oracle.OracleScores:
    """Return the scores of the oracle of signs if all prompts are about signs, else of that of shapes."""
    signs = bool(prompts) and all(is_sign_prompt(prompt) for prompt in prompts)
    return sign_scores(images, prompts) if signs else oracle.oracle_scores(images, prompts)


def jpeg_compressibility(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """Return minus the size in kB as JPEG of quality 95 (DDPO, arXiv:2305.13301, section 5)."""
    del prompts
    return torch.tensor([-_jpeg_bytes(image) / 1000 for image in images])


def jpeg_incompressibility(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """Return the size in kB as JPEG of quality 95."""
    return -jpeg_compressibility(images, prompts)


def _jpeg_bytes(image: Float[Tensor, "3 Y X"]) -> int:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=95)
    return buffer.tell()
