"""From the path or Hub id of a multimodal LLM to a backbone; the one place that knows which families there are."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig

from reward_model.backbones import llava, llava_next, phi3_v, qwen2_5_vl, qwen3_vl
from reward_model.backbones.patches import load_patch_frame
from reward_model.backbones.prompts import PaddingSide, PromptTokenizer, find_chat_template
from reward_model.types import Backbone

Template = Literal["family", "published"]
FAMILIES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "phi3_v": "Phi-3.5-vision",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
"""The families with an adapter, by the `model_type` of their config.json."""
_BOUNDED, _CUT = ("qwen2_5_vl", "qwen3_vl"), ("llava_next", "phi3_v")
"""The families that take min_pixels and max_pixels, and num_crops."""
LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip
"""The linear layers of the language models known here; published targets."""


def load_backbone(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    template: Template = "family",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    num_crops: int | None = None,
    padding_side: PaddingSide = "right",
) -> Backbone:
    """Load a model with random or trained weights, frozen and ready to read. No remote code is run.

    `template` is how a prompt is shown: by the model's own chat template, or as the published LLaVA-Reward code did.
    `min_pixels` and `max_pixels` bound an image where the family keeps its shape (Qwen), `num_crops` the squares that
    it is cut into (LLaVA-NeXT, Phi-3.5-vision); None takes the model's own. Raises ValueError for a family without an
    adapter, or a setting that the family does not have.
    """
    kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind not in FAMILIES:
        raise ValueError(no_adapter(source, kind))
    if kind == "phi3_v":
        from reward_model.backbones.phi3_v_model import load_phi3_v

        model = load_phi3_v(source, dtype=dtype)
    else:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    return adapt(
        model.eval().requires_grad_(False), source,
        template=template, min_pixels=min_pixels, max_pixels=max_pixels, num_crops=num_crops, padding_side=padding_side,
    )  # fmt: skip


def no_adapter(source: str, kind: str | None) -> str:
    """What to say of a model whose family is not known here."""
    known = ", ".join(f"{kind} ({name})" for kind, name in FAMILIES.items())
    return (
        f"{source!r} is a model of type {kind!r}, for which there is no adapter; there are {known}. An adapter is a "
        f"class that follows reward_model.types.Backbone, in a file of its own in reward_model/backbones/: `prepare` "
        f"(pixels and token ids), `encode_image` (vision features), `forward` (visual tokens and last hidden states), "
        f"`num_visual_tokens`, `width`, `projector`, `language_model`; and a case in reward_model/backbones/load.py. "
        f"The linear layers of its language model must be among LORA_TARGETS there."
    )


def adapt(
    model: Any,
    source: str,
    *,
    template: Template = "family",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    num_crops: int | None = None,
    padding_side: PaddingSide = "right",
) -> Backbone:
    """The backbone around a model that is in memory; tokenizer and image settings come from `source`."""
    config, family = model.config, FAMILIES[model.config.model_type]
    if config.model_type not in _BOUNDED and (min_pixels is not None or max_pixels is not None):
        raise ValueError(f"min_pixels and max_pixels mean nothing to {family}: its images do not keep their shape.")
    if config.model_type not in _CUT and num_crops is not None:
        raise ValueError(f"num_crops means nothing to {family}: its images are not cut up.")

    def tokenizer_for(
        published: str, tokenizer: Any, place: int, *, written_image: str | None = None
    ) -> PromptTokenizer:
        own = published if template == "published" else find_chat_template(source, tokenizer)
        return PromptTokenizer(tokenizer, place, own, num_places(config), padding_side, written_image=written_image)

    match config.model_type:
        case "llava":
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            prompt_tokenizer = tokenizer_for(
                llava.PUBLISHED_TEMPLATE, AutoTokenizer.from_pretrained(source), config.image_token_id
            )
            return llava.Llava(model, prompt_tokenizer, CLIPImageProcessorPil.from_pretrained(source))
        case "llava_next":
            from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

            processor = LlavaNextImageProcessorPil.from_pretrained(source)
            llava_next.bound_crops(model, processor, num_crops)
            prompt_tokenizer = tokenizer_for(
                llava.PUBLISHED_TEMPLATE, AutoTokenizer.from_pretrained(source), config.image_token_id
            )
            return llava_next.LlavaNext(model, prompt_tokenizer, processor)
        case "phi3_v":
            tokenizer = phi3_v.load_tokenizer(source)
            place = tokenizer.convert_tokens_to_ids(phi3_v.PLACE)
            prompt_tokenizer = tokenizer_for(
                phi3_v.PUBLISHED_TEMPLATE, tokenizer, place, written_image=phi3_v.WRITTEN_IMAGE
            )
            return phi3_v.Phi3Vision(model, prompt_tokenizer, **phi3_v.image_settings(source, num_crops))
        case "qwen2_5_vl":
            prompt_tokenizer = tokenizer_for(
                qwen2_5_vl.PUBLISHED_TEMPLATE, AutoTokenizer.from_pretrained(source), config.image_token_id
            )
            return qwen2_5_vl.Qwen25VL(model, prompt_tokenizer, load_patch_frame(source, min_pixels, max_pixels))
        case "qwen3_vl":
            prompt_tokenizer = tokenizer_for(
                qwen2_5_vl.PUBLISHED_TEMPLATE, AutoTokenizer.from_pretrained(source), config.image_token_id
            )
            return qwen3_vl.Qwen3VL(model, prompt_tokenizer, load_patch_frame(source, min_pixels, max_pixels))
        case other:
            raise ValueError(no_adapter(source, other))


def num_places(config: Any) -> int:
    """How many tokens a row may have.

    Under longrope the positions are scaled otherwise as soon as any row of a batch is longer than the original model's
    limit, so that a longer row would change the scores of its neighbours: what lies beyond counts as no place.
    """
    text = config.get_text_config()
    if (text.rope_parameters or {}).get("rope_type") == "longrope":
        return min(text.max_position_embeddings, text.rope_parameters["original_max_position_embeddings"])
    return text.max_position_embeddings
