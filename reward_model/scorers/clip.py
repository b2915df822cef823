"""Image-text similarity of any CLIP model: CLIP logit, CLIPScore and PickScore."""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward_model.images import preprocess_as_clip
from reward_model.progress import no_loading_bar

Form = Literal["logit", "clip_score", "cosine"]


@dataclass(frozen=True, slots=True)
class Clip:
    """Similarity of images (B, 3, Y, X) in [0, 1] and prompts, on the device of the images; differentiable.

        logit        exp(logit_scale) * cos(image, text)       CLIP's own (arXiv:2103.00020, Fig. 3)
        clip_score   2.5 * max(cos(image, text), 0)            CLIPScore (arXiv:2104.08718, Eq. 1)
        cosine       cos(image, text)                          what HPSv2's package reports (arXiv:2306.09341)

    With yuvalkirstain/PickScore_v1 the logit is PickScore (arXiv:2305.01569, Eq. 1). Differences of logits between
    images of one prompt are log-odds; between prompts they mean little: some score higher with any image. CLIPScore
    has no gradient below 0. Its paper puts "A photo depicts" before a caption; for generated images that is not usual,
    and not done here.
    """

    model: Any
    """A `CLIPModel`, frozen; its logit_scale is float32."""
    tokenizer: Any
    prepare: Callable[[Tensor], Tensor]
    """Images (B, 3, Y, X) in [0, 1] of any size to the model's pixels."""
    form: Form = "logit"
    batch_size: int = 64

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        cosine = self.cosine(images, prompts)
        match self.form:
            case "logit":
                return self.model.logit_scale.exp() * cosine
            case "clip_score":
                return 2.5 * cosine.clamp_min(0)
            case "cosine":
                return cosine

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.visual_projection.weight.dtype

    @property
    def _wide(self) -> torch.dtype:
        """The precision of everything but the towers: float32 at least."""
        return torch.promote_types(self._dtype, torch.float32)

    @property
    def log_odds_unit(self) -> float:
        """Difference of two scores at which the log-odds of one image over the other are 1."""
        scale = float(self.model.logit_scale.exp())
        return {"logit": 1.0, "clip_score": 2.5 / scale, "cosine": 1 / scale}[self.form]

    def cosine(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; the numbers must agree.")
        self.model.to(images.device)
        image_embeddings = torch.cat([self.encode_image(some) for some in images.split(self.batch_size)])
        texts = list(dict.fromkeys(prompts))
        starts = range(0, len(texts), self.batch_size)
        text_embeddings = torch.cat([self.encode_text(texts[start : start + self.batch_size]) for start in starts])
        rows = {text: row for row, text in enumerate(texts)}
        images, texts_of_rows = (one.to(self._wide) for one in (image_embeddings, text_embeddings))
        return F.cosine_similarity(images, texts_of_rows[[rows[prompt] for prompt in prompts]])

    def encode_image(self, images: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B D"]:
        """Return the embeddings of images, clamped to [0, 1] as by a processor."""
        return self.model.get_image_features(
            pixel_values=self.prepare(images.to(self._wide)).to(self._dtype)
        ).pooler_output

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Return the embeddings of texts, truncated to the model's maximum length."""
        # All rows have the same length, so that an embedding does not depend on the other texts.
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        outputs = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return outputs.pooler_output


def load_clip(
    source: str | Path, *, form: Form = "logit", batch_size: int = 64, dtype: torch.dtype = torch.float32
) -> Clip:
    """Load a folder or Hub id, whose towers compute in `dtype`; similarities are float32.

    Raises FileNotFoundError if there is none, ValueError if it is no complete CLIP.
    """
    model, tokenizer, processor = _loaded(str(source), dtype)
    return Clip(model, tokenizer, partial(preprocess_as_clip, settings=processor), form, batch_size)


@cache
@no_loading_bar()
def _loaded(source: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Load model (frozen), tokenizer and image processor, once per source and precision."""
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
    require_vocabulary(tokenizer, config.text_config.vocab_size, source=source)
    if processor.resample != Image.Resampling.BICUBIC:
        raise ValueError(
            f"The CLIP {source!r} resizes with filter {processor.resample}; only bicubic (3) is supported."
        )
    scale = model.logit_scale.data
    model.to(dtype).logit_scale.data = scale  # exp(4.6) in half precision is off by a per cent
    return model.eval().requires_grad_(False), tokenizer, processor


def require_vocabulary(tokenizer: Any, size: int, *, source: str) -> None:
    """Raise ValueError unless a tokenizer has as many tokens as its model: without its files it is silently empty."""
    if len(tokenizer) != size:
        raise ValueError(
            f"The tokenizer of the CLIP {source!r} has {len(tokenizer)} tokens and its model {size}; are "
            f"tokenizer.json, or vocab.json and merges.txt, beside the weights?"
        )


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
            f"{source!r} holds no config.json of a transformers model, so it is no CLIP. A LLaVA-Reward model "
            f"is llava_reward:PATH."
        ) from error
