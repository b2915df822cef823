"""HPSv2 and HPSv2.1 (arXiv:2306.09341): a CLIP ViT-H/14 fine-tuned on human preferences."""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer

from reward_model.images import normalise, resize
from reward_model.scorers.clip import Clip, load_clip, require_vocabulary
from reward_model.scorers.open_clip import clip_from_open_clip
from reward_model.scorers.weights import folder_of, read_weights, weights_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's mean and standard deviation of each channel."""


def load_hps(source: str | Path, *, batch_size: int = 64) -> Clip:
    """Load the scorer cos(image, text), typically 0.2 to 0.35; its package's tables show 100 times as much.

    `source` is the published file (HPS_v2.1_compressed.pt, open_clip's layout) in a folder with the tokenizer of CLIP,
    or a folder in the layout of transformers. Images that are not square are resized and padded with black, as in its
    package, not cropped.

    Raises FileNotFoundError or ValueError, naming what is wrong.
    """
    if (folder_of(source, scorer="HPS") / "config.json").is_file():
        clip = load_clip(folder_of(source, scorer="HPS"))
        model, tokenizer = clip.model, clip.tokenizer
    else:
        model, tokenizer = _loaded(weights_of(source, scorer="HPS"))
    prepare = partial(fit_into_square, side=model.config.vision_config.image_size)
    return Clip(model, tokenizer, prepare, "cosine", batch_size)


def fit_into_square(images: Float[Tensor, "B 3 _ _"], side: int) -> Float[Tensor, "B 3 {side} {side}"]:
    """Resize the longest side to `side`, pad with black on both sides, and normalise."""
    height, width = (round(length * side / max(images.shape[-2:])) for length in images.shape[-2:])
    images = resize(images, max(height, 1), max(width, 1))
    down, right = side - images.shape[-2], side - images.shape[-1]
    images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalise(images, mean=MEAN, std=STD)


@cache
def _loaded(file: Path) -> tuple[Any, Any]:
    tensors = read_weights(file)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.parent} has no tokenizer: put CLIP's beside {file.name}. ({error})") from error
    model: Any = clip_from_open_clip(tensors, file=file, eos_token_id=tokenizer.eos_token_id)
    require_vocabulary(tokenizer, model.config.text_config.vocab_size, source=str(file.parent))
    return model.eval().requires_grad_(False), tokenizer
