"""Does a picture look like its prompt? The image-text similarity of any CLIP, as a reward."""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class SimilarityReward:
    """How well a picture and its prompt belong together, on the device of the pictures; differentiable.

        score = exp(logit_scale) * cos(image, text)

    These are CLIP's logits (arXiv:2103.00020, Fig. 3). With openai/clip-vit-large-patch14 they are 100 * cos, where
    CLIPScore is 2.5 * max(cos, 0) (arXiv:2104.08718, Eq. 1); with yuvalkirstain/PickScore_v1 they are PickScore
    (arXiv:2305.01569, Eq. 1). Differences between pictures of one prompt are log-odds. Between prompts they mean
    little: some prompts score higher with any picture.
    """

    def __init__(self, source: str | Path, *, batch_size: int = 64) -> None:
        """Load a folder or Hub id; FileNotFoundError if there is none, ValueError if it is no complete CLIP."""
        self.model, self.tokenizer, self.processor = _loaded(str(source))
        self.batch_size = batch_size

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures came with {len(prompts)} prompts; there must be as many.")
        self.model.to(images.device)
        seen = torch.cat([self.see(some) for some in images.split(self.batch_size)])
        texts = list(dict.fromkeys(prompts))
        starts = range(0, len(texts), self.batch_size)
        read = torch.cat([self.read(texts[start : start + self.batch_size]) for start in starts])
        place = {text: row for row, text in enumerate(texts)}
        return self.model.logit_scale.exp() * F.cosine_similarity(seen, read[[place[prompt] for prompt in prompts]])

    def see(self, images: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B D"]:
        """The embeddings of pictures, whose values are cut off at black and white as a processor does."""
        return self.model.get_image_features(pixel_values=preprocess(images.float(), self.processor)).pooler_output

    def read(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """The embeddings of texts; what is beyond the model's last position is not read."""
        # Every row has the same length, so that a text is read alike in any company.
        words = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        outputs = self.model.get_text_features(input_ids=words.input_ids, attention_mask=words.attention_mask)
        return outputs.pooler_output


def preprocess(images: Float[Tensor, "B 3 _ _"], settings: Any) -> Float[Tensor, "B 3 _ _"]:
    """What a CLIP image processor makes of pictures in [0, 1], without its rounding of resized ones to 8 bits.

    Clamped values keep their gradient, as if nothing had been cut off.
    """
    images = _clamp(images)
    if settings.do_resize:
        height, width = _resized(images.shape[-2], images.shape[-1], settings.size)
        for size in ((images.shape[-2], width), (height, width)):  # columns first, as Pillow does
            if images.shape[-2:] != size:
                images = _clamp(F.interpolate(images, size, mode="bicubic", antialias=True))
    if settings.do_center_crop:
        height, width = settings.crop_size["height"], settings.crop_size["width"]
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        images = images[..., top : top + height, left : left + width]
    if settings.do_normalize:
        mean, std = (images.new_tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
        images = (images - mean) / std
    return images


def _clamp(images: Tensor) -> Tensor:
    return images.detach().clamp(0, 1) + (images - images.detach())


def _resized(height: int, width: int, size: Any) -> tuple[int, int]:
    """Where the processor's `size` takes a picture: a fixed size, or its shortest side to a length."""
    if size["height"]:
        return size["height"], size["width"]
    short = size["shortest_edge"]
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


@cache
def _loaded(source: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor, once for everything that asks for them; the model frozen, in float32."""
    config = _config(source)
    if config.model_type != "clip":
        raise ValueError(
            f"{source!r} is a model of type {config.model_type!r}; clip:PATH takes a whole CLIPModel (type 'clip'), "
            f"such as openai/clip-vit-large-patch14 or yuvalkirstain/PickScore_v1."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        processor = CLIPImageProcessorPil.from_pretrained(source)
        model, report = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"The CLIP {source!r} is not complete: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"The CLIP {source!r} lacks weights: {', '.join(sorted(report['missing_keys'])[:5])}.")
    # Without its files a tokenizer is empty, and says nothing.
    if len(tokenizer) != config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer of the CLIP {source!r} knows {len(tokenizer)} tokens and its model "
            f"{config.text_config.vocab_size}; are tokenizer.json, or vocab.json and merges.txt, beside the weights?"
        )
    if processor.resample != Image.Resampling.BICUBIC:
        raise ValueError(f"The CLIP {source!r} resizes with filter {processor.resample}; only bicubic (3) is known.")
    return model.eval().requires_grad_(False), tokenizer, processor


def _config(source: str) -> Any:
    folder = Path(source)
    if not folder.is_dir() and (len(folder.parts) != 2 or folder.is_absolute() or source.startswith(".")):
        raise FileNotFoundError(f"There is no CLIP in {source!r}: no such folder, and it is no Hub id.")
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"There is no folder {source!r}, and fetching it from the Hub failed: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{source!r} holds no config.json of a transformers model, so it is no CLIP. A LLaVA-Reward judge is asked "
            f"as judge:PATH."
        ) from error
