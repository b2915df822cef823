"""LAION's aesthetic predictor: linear layers on the image embedding of CLIP ViT-L/14; the prompt is ignored."""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward_model.images import preprocess_as_clip
from reward_model.scorers.weights import fill, folder_of, read_weights

LAYERS = (0, 2, 4, 6, 7)
"""Indices of the linear layers in the published file; the others are dropouts."""


@dataclass(frozen=True, slots=True)
class Aesthetic:
    """score = layers(embedding / |embedding|), about 1 to 10; differentiable.

    There is no activation between the layers, so that the score is linear in the normalised embedding. DDPO
    (arXiv:2305.13301, section 5) and AlignProp train on it. Source: LAION's improved-aesthetic-predictor.
    """

    model: nn.ModuleDict
    """`vision` and `head`, frozen, in float32."""
    prepare: Callable[[Tensor], Tensor]
    """Images (B, 3, Y, X) in [0, 1] of any size to the tower's pixels."""
    batch_size: int = 64
    log_odds_unit: float = 1.0
    """Arbitrary: the head was trained on ratings, and only the order of images has a meaning."""

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        del prompts
        self.model.to(images.device)
        vision: Any = self.model["vision"]
        parts = [vision(pixel_values=self.prepare(some.to(vision.dtype))) for some in images.split(self.batch_size)]
        embeddings = torch.cat([part.image_embeds for part in parts])
        return self.model["head"](F.normalize(embeddings, dim=-1))[:, 0]


def load_aesthetic(source: str | Path) -> Aesthetic:
    """Load the published file (sac+logos+ava1-l14-linearMSE.pth), in a folder with the CLIP in transformers' layout.

    `source` is the folder, or the file in it. Raises FileNotFoundError or ValueError, naming what is wrong.
    """
    folder, given = folder_of(source, scorer="aesthetic predictor"), Path(source)
    files = [given] if given.is_file() else sorted(folder.glob("*.pth"))
    if len(files) != 1 or not (folder / "config.json").is_file():
        names = ", ".join(file.name for file in folder.iterdir()) or "nothing"
        raise ValueError(
            f"The aesthetic predictor in {folder} needs one .pth file of linear layers, and the files of "
            f"openai/clip-vit-large-patch14 beside it; there are: {names}."
        )
    return _loaded(files[0])


@cache
def _loaded(file: Path) -> Aesthetic:
    try:
        processor = CLIPImageProcessorPil.from_pretrained(file.parent)
        clip: Any = CLIPConfig.from_pretrained(file.parent)
        config: Any = clip.vision_config
        config.projection_dim = clip.projection_dim
        vision, report = CLIPVisionModelWithProjection.from_pretrained(
            file.parent, config=config, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"The CLIP in {file.parent} is not complete: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"The CLIP in {file.parent} lacks weights: {', '.join(sorted(report['missing_keys'])[:5])}.")
    head = linear_layers(read_weights(file), "layers.", file=file, scorer="the aesthetic predictor")
    width, expected = head[0].in_features, vision.config.projection_dim
    if width != expected:
        raise ValueError(
            f"The layers in {file} take embeddings of {width} numbers, and the CLIP beside it has {expected}; the "
            f"published file belongs to openai/clip-vit-large-patch14."
        )
    model = nn.ModuleDict({"vision": vision, "head": head})
    return Aesthetic(model.eval().requires_grad_(False), partial(preprocess_as_clip, settings=processor))


def linear_layers(tensors: dict[str, Tensor], start: str, *, file: Path, scorer: str) -> nn.Sequential:
    """Return the linear layers START0, START2, START4, START6 and START7 of a file, which has nothing else.

    Raises ValueError, naming the file and the scorer, if one is missing.
    """
    try:
        weights = [tensors[f"{start}{number}.weight"] for number in LAYERS]
    except KeyError as error:
        raise ValueError(f"{file} lacks {error} of {scorer}.") from error
    head = nn.Sequential(*(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights))
    names = {f"{start}{number}.": f"{row}." for row, number in enumerate(LAYERS)}
    renamed = {}
    for name, tensor in tensors.items():
        before = name[: name.rfind(".") + 1]
        renamed[names.get(before, before) + name.removeprefix(before)] = tensor
    fill(head, renamed, file=file)
    return head
