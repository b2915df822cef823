"""LLaVA-NeXT (1.6): an image becomes one resized view and crops at its own aspect ratio (AnyRes)."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reward_model.backbones.llava import PUBLISHED_TEMPLATE
from reward_model.backbones.outputs import clip_features, run_language_model
from reward_model.backbones.prompts import PromptTokenizer
from reward_model.backbones.settings import BackboneSettings, prompt_tokenizer
from reward_model.backbones.token_boxes import grid_boxes, padded_area, with_line_ends
from reward_model.images import normalise, pad_to, resize, split_into_squares
from reward_model.types import BackboneOutput, Inputs

TITLE = "LLaVA-NeXT"
OPTIONS = ("num_crops",)


@dataclass(slots=True)
class LlavaNext:
    """`LlavaNextForConditionalGeneration` of any size as a backbone."""

    model: Any
    """Its config's image_grid_pinpoints are the possible grids of crops, (height, width) in pixels each."""
    prompt_tokenizer: PromptTokenizer
    processor: Any
    """The family's image processor, of which only the settings are used."""

    @property
    def width(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def projector(self) -> Any:
        return self.model.model.multi_modal_projector

    @projector.setter
    def projector(self, module: nn.Module) -> None:
        self.model.model.multi_modal_projector = module

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def crop(self) -> int:
        """Side of the vision tower's input in pixels."""
        return self.model.config.vision_config.image_size

    def num_visual_tokens(self, height: int, width: int) -> int:
        """Count those of the resized view, and of the crops without padding, with one more at the end of each line."""
        rows, columns = self._tokens_of_crops(height, width)
        top, left = self._removed(height, width)
        return self._side**2 + (rows - 2 * top) * (columns - 2 * left + 1)

    def token_boxes(self, height: int, width: int) -> Float[Tensor, "V 4"]:
        """Return the box of each visual token: those of the view of the whole image, and of the crops line by line."""
        fitted, padded = self._fitted(height, width)
        rows, columns = self._tokens_of_crops(height, width)
        top, left = self._removed(height, width)
        boxes = grid_boxes(rows, columns, padded_area(fitted, padded))[top : rows - top, left : columns - left]
        return torch.cat([grid_boxes(self._side, self._side).flatten(0, 1), with_line_ends(boxes)])

    @property
    def _side(self) -> int:
        """Visual tokens along a side of one crop."""
        return self.crop // self.model.config.vision_config.patch_size

    def _tokens_of_crops(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of all crops, those of padding included."""
        rows, columns = (length // self.crop * self._side for length in self._grid(height, width))
        return rows, columns

    def _removed(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows of tokens of padding that are removed above and below each, and the columns to each side."""
        rows, columns = self._tokens_of_crops(height, width)
        # Padding is removed on both sides alike, as `unpad_image` in transformers does.
        if width / height > columns / rows:
            return (rows - int(round(height * (columns / width), 7))) // 2, 0
        return 0, (columns - int(round(width * (rows / height), 7))) // 2

    def prepare(self, images: Iterable[Float[Tensor, "3 _ _"]], prompts: Sequence[str]) -> Inputs:
        """Return all views and crops of all images in one tensor, and the size of each image in pixels."""
        views, sizes = zip(*((self._views(image), (image.shape[1], image.shape[2])) for image in images), strict=True)
        tokens = self.prompt_tokenizer(prompts, [self.num_visual_tokens(*size) for size in sizes])
        return {**tokens, "pixel_values": torch.cat(views), "image_sizes": torch.tensor(sizes)}

    def _views(self, image: Float[Tensor, "3 _ _"]) -> Float[Tensor, "N 3 S S"]:
        """Return the image resized to a square, and its crops: at its own aspect ratio, padded with black."""
        fitted, padded = self._fitted(*image.shape[1:])
        crops = split_into_squares(pad_to(resize(image[None], *fitted), *padded, value=0.0)[0], self.crop)
        view = resize(image[None], self.crop, self.crop)
        return normalise(torch.cat([view, crops]), mean=self.processor.image_mean, std=self.processor.image_std)

    def _fitted(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the size to which an image is resized for its crops, and that to which it is then padded."""
        from transformers.image_processing_utils import get_patch_output_size
        from transformers.image_utils import ChannelDimension

        padded = self._grid(height, width)
        image = torch.empty(3, height, width, device="meta")  # only its size is used
        fitted_height, fitted_width = get_patch_output_size(image, padded, ChannelDimension.FIRST)
        return (fitted_height, fitted_width), padded

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the grid in which the image is largest, then the one with the least padding."""
        from transformers.image_processing_utils import select_best_resolution

        return select_best_resolution((height, width), self.model.config.image_grid_pinpoints)

    def encode_image(self, inputs: Inputs) -> Inputs:
        others = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        return {**others, "features": clip_features(self.model, inputs["pixel_values"])}

    def forward(self, inputs: Inputs) -> BackboneOutput:
        if "features" not in inputs:
            inputs = self.encode_image(inputs)
        inner, sizes = self.model.model, inputs["image_sizes"]
        views = self.projector(inputs["features"].to(next(self.projector.parameters()).dtype))
        visual, _ = inner.pack_image_features(
            views.split(self._num_views(sizes)), sizes, self.model.config.vision_feature_select_strategy,
            image_newline=inner.image_newline,
        )  # fmt: skip
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        return run_language_model(self.model, inputs, visual, position_ids=positions)

    def _num_views(self, sizes: Int[Tensor, "B 2"]) -> list[int]:
        grids = [self._grid(height, width) for height, width in sizes.tolist()]
        return [1 + (height // self.crop) * (width // self.crop) for height, width in grids]


def bound_crops(model: Any, processor: Any, num_crops: int | None) -> None:
    """Restrict the model to grids of at most `num_crops` crops.

    Raises ValueError if no grid is left, or if the processor's crops do not have the size of the vision tower's input.
    """
    config, size = model.config, model.config.vision_config.image_size
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; only 'default' is "
            f"supported: crops are joined without their class tokens."
        )
    if processor.crop_size["height"] != size or processor.size.get("shortest_edge") != size:
        raise ValueError(
            f"The processor makes crops of {processor.crop_size['height']} pixels of {processor.size}; the vision "
            f"tower takes {size}."
        )
    if num_crops is None:
        return
    counts = [(height // size) * (width // size) for height, width in config.image_grid_pinpoints]
    if num_crops < min(counts):
        raise ValueError(
            f"num_crops is {num_crops}; this model's grids have {', '.join(map(str, sorted(counts)))} crops."
        )
    config.image_grid_pinpoints = [
        grid for grid, count in zip(config.image_grid_pinpoints, counts, strict=True) if count <= num_crops
    ]


def adapt(model: Any, source: str, settings: BackboneSettings) -> LlavaNext:
    """Return the backbone of a loaded model."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    processor = LlavaNextImageProcessorPil.from_pretrained(source)
    bound_crops(model, processor, settings.num_crops)
    return LlavaNext(model, prompt_tokenizer(model, source, settings, published=PUBLISHED_TEMPLATE), processor)
