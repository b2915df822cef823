"""Phi-3.5-vision, the paper's main model: an image becomes crops of 336 x 336 and one view of the whole image.

Images, tokens and prompts are made as by the published processor; the model is `phi3_v_model.Phi3V`.
"""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from reward_model.backbones.outputs import pad
from reward_model.backbones.prompts import PromptTokenizer
from reward_model.backbones.settings import BackboneSettings, prompt_tokenizer
from reward_model.backbones.token_boxes import grid_boxes, nowhere, padded_area, with_line_ends
from reward_model.images import normalise, pad_to, resize, split_into_squares
from reward_model.types import BackboneOutput, Inputs

TITLE = "Phi-3.5-vision"
OPTIONS = ("num_crops",)
IMAGE_TEXT = "<|image_1|>"
IMAGE_TOKEN = "<|image|>"
"""Placeholder of a visual token in a row of ids, where the published processor has -1."""
PUBLISHED_TEMPLATE = "{% for message in messages %}<|user|>\n{{ message['content'] }}{{ eos_token }}{% endfor %}"
"""The user turn of the published LLaVA-Reward code, which replaces the end of the turn by the end token."""
PUBLISHED_NUM_CROPS = 16


@dataclass(slots=True)
class Phi3Vision:
    """A `Phi3V` of any size as a backbone."""

    model: Any
    prompt_tokenizer: PromptTokenizer
    num_crops: int
    """Maximum number of crops; an image is enlarged until no more of them fit."""
    mean: Sequence[float]
    std: Sequence[float]
    """Mean and standard deviation of pixels in [0, 1], for each channel."""

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def projector(self) -> Any:
        return self.model.img_projection

    @projector.setter
    def projector(self, module: nn.Module) -> None:
        self.model.img_projection = module

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    @property
    def crop(self) -> int:
        """Side of the vision tower's input in pixels."""
        return self.model.config.vision.image_size

    @property
    def side(self) -> int:
        """Visual tokens along a side of one crop."""
        return self.crop // self.model.config.vision.patch_size // 2

    def num_visual_tokens(self, height: int, width: int) -> int:
        return self._count(*hd_grid(height, width, num_crops=self.num_crops, crop=self.crop)[1])

    def token_boxes(self, height: int, width: int) -> Float[Tensor, "V 4"]:
        """Return the box of each visual token: those of the crops and of the view, line by line."""
        size, (rows, columns) = hd_grid(height, width, num_crops=self.num_crops, crop=self.crop)
        area = padded_area(size, (rows * self.crop, columns * self.crop))
        crops = with_line_ends(grid_boxes(rows * self.side, columns * self.side, area))
        view = with_line_ends(grid_boxes(self.side, self.side, area))
        first, last = (view, crops) if self.model.config.global_first else (crops, view)
        return torch.cat([first, nowhere(1), last])

    def prepare(self, images: Iterable[Float[Tensor, "3 _ _"]], prompts: Sequence[str]) -> Inputs:
        """Return all views and crops of all images in one tensor, and each image's grid of crops."""
        prepared = [self._views(image) for image in images]
        tokens = self.prompt_tokenizer(prompts, [self._count(*grid) for _, grid in prepared])
        grids = torch.tensor([grid for _, grid in prepared])
        return {**tokens, "pixel_values": torch.cat([views for views, _ in prepared]), "crop_grid": grids}

    def _views(self, image: Float[Tensor, "3 _ _"]) -> tuple[Float[Tensor, "N 3 S S"], tuple[int, int]]:
        """Return the HD transform (resized into the grid, padded with white, normalised) and the grid (rows, columns).

        The view of the whole image is a resize of the padded one, without antialiasing.
        """
        (height, width), grid = hd_grid(*image.shape[1:], num_crops=self.num_crops, crop=self.crop)
        image = resize(image[None], height, width, mode="bilinear")
        image = pad_to(image, grid[0] * self.crop, grid[1] * self.crop, value=1.0)
        image = normalise(image, mean=self.mean, std=self.std)
        view = F.interpolate(image, (self.crop, self.crop), mode="bicubic")
        return torch.cat([view, split_into_squares(image[0], self.crop)]), grid

    def _count(self, rows: int, columns: int) -> int:
        """Return the number of tokens: crops, view, one at the end of each line, and one between crops and view."""
        return (rows * columns + 1) * self.side**2 + (rows + 1) * self.side + 1

    def encode_image(self, inputs: Inputs) -> Inputs:
        """Add `features`: all rows' tokens before the projector (each of 2 x 2 patches), including separators."""
        tower = self.model.vision_tower
        pixels = inputs["pixel_values"].to(tower.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and pixels.requires_grad):  # the tower is frozen
            views = merge_patches(tower(pixels).last_hidden_state[:, 1:])
        separators = (self.model.sub_GN.flatten(), self.model.glb_GN.flatten())
        grids = inputs["crop_grid"].tolist()
        tokens = [
            join_views(own, grid, *separators, global_first=self.model.config.global_first)
            for own, grid in zip(views.split([1 + rows * columns for rows, columns in grids]), grids, strict=True)
        ]
        others = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return {**others, "features": torch.cat(tokens)}

    def forward(self, inputs: Inputs) -> BackboneOutput:
        if "features" not in inputs:
            inputs = self.encode_image(inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        visual = self.projector(inputs["features"].to(next(self.projector.parameters()).dtype))
        embeddings = self.model.get_input_embeddings()(ids)
        is_image = (ids == self.prompt_tokenizer.image_token_id)[..., None]
        states = self.language_model(
            inputs_embeds=embeddings.masked_scatter(is_image, visual.to(embeddings.dtype)),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
            use_cache=False,
        ).last_hidden_state
        return BackboneOutput(states, mask.bool(), *pad(visual.split(self._counts(inputs["crop_grid"]))))

    def _counts(self, grids: Int[Tensor, "B 2"]) -> list[int]:
        return [self._count(*grid) for grid in grids.tolist()]


def hd_grid(height: int, width: int, *, num_crops: int, crop: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (height, width) to which an image is resized, and its grid of crops (rows, columns).

    The longer side becomes n crops, with the largest n such that n * ceil(n * short / long) <= num_crops.
    """
    long, short = max(height, width), min(height, width)
    ratio = long / short
    across = 1
    while (across + 1) * math.ceil((across + 1) / ratio) <= num_crops:
        across += 1
    long, short = across * crop, int(across * crop / ratio)
    if short == 0:
        raise ValueError(f"An image of {height} x {width} pixels is too narrow: its short side is resized to 0.")
    down = math.ceil(short / crop)
    return ((short, long), (down, across)) if width >= height else ((long, short), (across, down))


def merge_patches(patches: Float[Tensor, "N P C"]) -> Float[Tensor, "N M M 4*C"]:
    """Concatenate 2 x 2 neighbouring patches: upper left, upper right, lower left, lower right."""
    side = math.isqrt(patches.shape[1]) // 2
    squares = patches.unflatten(1, (side, 2, side, 2))
    return squares.permute(0, 1, 3, 2, 4, 5).flatten(3)


def join_views(
    views: Float[Tensor, "N M M W"],
    grid: Sequence[int],
    line_end: Float[Tensor, " W"],
    between: Float[Tensor, " W"],
    *,
    global_first: bool,
) -> Float[Tensor, "V W"]:
    """Return one image's tokens: its joined crops line by line and its view line by line, with separators."""
    rows, columns = grid
    crops = views[1:].unflatten(0, (rows, columns)).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    lines = [
        torch.cat([area, line_end.expand(len(area), 1, -1)], dim=1).flatten(0, 1) for area in (crops, views[0])
    ]  # crops, view
    first, last = reversed(lines) if global_first else lines
    return torch.cat([first, between[None], last])


def image_settings(source: str, num_crops: int | None) -> dict[str, Any]:
    """Return num_crops, mean and std from `source`'s preprocessor_config.json; ValueError for num_crops < 1."""
    stored = ImageProcessingMixin.get_image_processor_dict(source)[0]
    crops: int = stored["num_crops"] if num_crops is None else num_crops
    if crops < 1:
        raise ValueError(f"num_crops is {crops}; it must be at least 1.")
    return {"num_crops": crops, "mean": stored["image_mean"], "std": stored["image_std"]}


def load_tokenizer(source: str) -> Any:
    """Load the stored tokenizer, with the start token that the published one adds to each text.

    Raises ValueError if it has no placeholder token for visual tokens.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    if get_tokenizer_config(source).get("add_bos_token", True):  # a Llama tokenizer's default
        start = str(tokenizer.bos_token)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        raise ValueError(f"The tokenizer of {source!r} has no token {IMAGE_TOKEN!r}, which Phi-3.5-vision's has.")
    return tokenizer


def adapt(model: Any, source: str, settings: BackboneSettings) -> Phi3Vision:
    """Return the backbone of a loaded model."""
    tokenizer = prompt_tokenizer(
        model, source, settings, published=PUBLISHED_TEMPLATE, tokenizer=load_tokenizer(source),
        image_token=IMAGE_TOKEN, image_text=IMAGE_TEXT,
    )  # fmt: skip
    return Phi3Vision(model, tokenizer, **image_settings(source, settings.num_crops))
