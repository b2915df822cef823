"""Phi-3.5-vision, built from transformers' Phi-3 decoder and CLIP tower, with the projector between them.

transformers has no such model, and the published one is remote code that breaks with newer releases. This one loads
the published files unchanged and runs none of that code.
"""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportIncompatibleVariableOverride=false
from __future__ import annotations

from typing import Any, ClassVar, no_type_check

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3Model, PreTrainedModel

CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
"""Config of openai/clip-vit-large-patch14-336, which the published config only names."""

_LAYOUT = {"projection_cls": ("mlp",), "use_hd_transform": (True,), "with_learnable_separator": (True,)}
_ORDERS = ("sub_glb", "glb_sub")


@no_type_check  # a config.json may hold further settings, which beartype would reject
class Phi3VConfig(Phi3Config):
    """A published config.json: that of a Phi-3 decoder, with `img_processor` and `embd_layer` for images.

    `vision_config` is an addition: the sizes of the CLIP tower, by default those of ViT-L/14 at 336 pixels.
    """

    model_type = "phi3_v"
    img_processor: dict[str, Any] | None = None
    embd_layer: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Raise ValueError for a tower or a projector that differs from the published one."""
        kwargs.pop(
            "_attn_implementation", None
        )  # the published config requires flash attention, which is rarely installed
        scaling = kwargs.get("rope_scaling")
        if scaling and scaling.get("type") == "su":  # former name of longrope
            kwargs["rope_scaling"] = {**scaling, "type": "longrope"}
        super().__post_init__(**kwargs)
        vision, embedding = self.img_processor or {}, self.embd_layer or {}
        name = vision.get("model_name", "openai/clip-vit-large-patch14-336")
        if self.vision_config is None and name != "openai/clip-vit-large-patch14-336":
            raise ValueError(
                f"img_processor's model_name is {name!r}; only openai/clip-vit-large-patch14-336 is supported."
            )
        if vision.get("type_feature", "patch") != "patch":
            raise ValueError(f"img_processor's type_feature is {vision['type_feature']!r}; only patch is supported.")
        for key, known in {**_LAYOUT, "hd_transform_order": _ORDERS}.items():
            if embedding.get(key, known[0]) not in known:
                raise ValueError(
                    f"embd_layer's {key} is {embedding[key]!r}; supported: {' or '.join(map(str, known))}."
                )

    @property
    def vision(self) -> CLIPVisionConfig:
        """The CLIP tower's config, up to the layer whose states are used."""
        sizes: dict[str, Any] = {**CLIP_L_336, **(self.vision_config or {})}
        layer, depth = (self.img_processor or {}).get("layer_idx", -2), sizes["num_hidden_layers"]
        num_layers = layer if layer >= 0 else depth + 1 + layer
        if not 0 < num_layers <= depth:
            raise ValueError(f"img_processor's layer_idx is {layer}; the tower has states 0 to {depth}.")
        return CLIPVisionConfig(**{**sizes, "num_hidden_layers": num_layers})

    @property
    def global_first(self) -> bool:
        """True if the view of the whole image comes before its crops (glb_sub); False if behind them (sub_glb)."""
        return (self.embd_layer or {}).get("hd_transform_order", "sub_glb") == "glb_sub"


class Phi3V(PreTrainedModel):
    """Phi-3.5-vision without language-model head and generation.

    Submodules have other names than published, so that a LoRA in the decoder cannot also match layers of the tower;
    `KEY_MAPPING` maps the published tensors to them.
    """

    config_class = Phi3VConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar = ["Phi3DecoderLayer", "CLIPEncoderLayer"]
    # The language-model head; a second copy of the embeddings; the layers of the tower behind the one that is used.
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        r"^lm_head\.", r"vision_embed_tokens\.wte\.", r"^vision_tower\.encoder\.layers\.\d+\.", r"\.position_ids$",
    ]  # fmt: skip

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        merged = 4 * config.vision.hidden_size  # 2 x 2 patches become one token
        self.vision_tower = CLIPVisionModel(config.vision)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.language_model = Phi3Model(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens


KEY_MAPPING = {
    r"^model\.vision_embed_tokens\.img_processor\.vision_model\.": "vision_tower.",
    r"^model\.vision_embed_tokens\.(img_projection\.|glb_GN|sub_GN)": r"\1",
    r"^model\.(embed_tokens|layers|norm)\.": r"language_model.\1.",
}
"""Patterns of published tensor names and their replacements."""


def load_phi3_v(source: str, *, dtype: torch.dtype) -> Phi3V:
    """Load a folder or Hub id; ValueError for missing or unexpected tensors."""
    config = Phi3VConfig.from_pretrained(source)
    loaded: Any = Phi3V.from_pretrained(
        source, config=config, dtype=dtype, key_mapping=KEY_MAPPING, output_loading_info=True
    )
    model, found = loaded
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ValueError(f"The model {source!r} lacks {len(names)} tensors: {', '.join(names[:5])}, ...")
    if found["unexpected_keys"]:
        names = sorted(found["unexpected_keys"])
        raise ValueError(f"The model {source!r} has {len(names)} unexpected tensors: {', '.join(names[:5])}, ...")
    return model
