"""ImageReward (arXiv:2304.05977): a BLIP text encoder with cross-attention to the image, and a scalar head.

Its published file holds `blip.visual_encoder.*` (a ViT-L/16), `blip.text_encoder.*` (a BERT with cross attention) and
`mlp.layers.*` (five linear layers with dropout between them). All but the head are classes of transformers under
other names.
"""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from reward_model.images import normalise, resize
from reward_model.scorers.hps import MEAN, STD
from reward_model.scorers.weights import fill, folder_of, read_weights, weights_of
from reward_model.text_files import read_object

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's output on the authors' data: scores are about standard normal."""
MAX_TOKENS = 35
"""Maximum length of a prompt; longer ones are truncated, as in the published code."""
_LAYERS = (0, 2, 4, 6, 7)
"""Indices of the head's linear layers; the others are dropouts."""
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_IN_BLOCK = {
    **{
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
    },
    **{"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
}
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")
"""Tensors of BLIP's pretraining, and constants."""


@dataclass(frozen=True, slots=True)
class ImageReward:
    """score = (head(first token of text_encoder(prompt, image)) - mean) / std; differentiable."""

    model: nn.ModuleDict
    """`vision`, `text` and `head`, frozen, in float32."""
    tokenizer: Any
    log_odds_unit: float = 1 / SCORE_STD
    """The head was trained with differences of its unscaled outputs as log-odds."""

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        vision: Any = self.model["vision"]
        text: Any = self.model["text"]
        self.model.to(images.device)
        image_states = vision(
            pixel_values=preprocess(images.to(vision.dtype), vision.config.image_size)
        ).last_hidden_state
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        states = text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image_states
        ).last_hidden_state
        return (self.model["head"](states[:, 0])[:, 0] - SCORE_MEAN) / SCORE_STD


def preprocess(images: Float[Tensor, "B 3 _ _"], side: int) -> Float[Tensor, "B 3 {side} {side}"]:
    """Resize the shortest side to `side`, crop the centre and normalise.

    Half of an odd margin is rounded to even, as in torchvision but not in transformers.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resize(images, int(side * height / short), int(side * width / short))
    top, left = (round((length - side) / 2) for length in images.shape[-2:])
    return normalise(images[..., top : top + side, left : left + side], mean=MEAN, std=STD)


def load_image_reward(source: str | Path) -> ImageReward:
    """Load the published ImageReward.pt, in a folder with med_config.json and the tokenizer of bert-base-uncased.

    Raises FileNotFoundError or ValueError, naming what is wrong.
    """
    return _loaded(weights_of(source, scorer="ImageReward"))


@cache
def _loaded(file: Path) -> ImageReward:
    tensors = {name: tensor for name, tensor in read_weights(file).items() if not _UNUSED.match(name)}
    for needed in ("blip.visual_encoder.pos_embed", "blip.text_encoder.embeddings.word_embeddings.weight"):
        if needed not in tensors:
            raise ValueError(f"{file} has no tensor {needed!r}, so it is no ImageReward.")
    model = nn.ModuleDict({"vision": _vision(tensors), "text": _text(tensors, file), "head": _head(tensors, file)})
    fill(model, {_renamed(name): tensor for name, tensor in tensors.items()}, file=file)
    return ImageReward(model.eval().requires_grad_(False), _tokenizer(file, model))


def _renamed(name: str) -> str:
    """Return our name of a published tensor; an unknown one keeps its name."""
    if found := re.match(r"mlp\.layers\.(\d+)\.(\w+)$", name):
        number = int(found[1])
        return f"head.{_LAYERS.index(number)}.{found[2]}" if number in _LAYERS else name
    if name.startswith("blip.text_encoder."):
        return name.replace("blip.text_encoder.", "text.", 1)
    if found := re.match(r"blip\.visual_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)$", name):
        return f"vision.encoder.layers.{found[1]}.{_IN_BLOCK.get(found[2], found[2])}.{found[3]}"
    for own, new in _VISION.items():
        if found := re.match(rf"blip\.visual_encoder\.{re.escape(own)}(\.weight|\.bias)?$", name):
            return f"vision.{new}{found[1] or ''}"
    return name


def _vision(tensors: dict[str, Tensor]) -> BlipVisionModel:
    start = "blip.visual_encoder."
    patches, positions = tensors[f"{start}patch_embed.proj.weight"], tensors[f"{start}pos_embed"]
    width, patch = patches.shape[0], patches.shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors[f"{start}blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_count(tensors, rf"{re.escape(start)}blocks\.(\d+)\."),
        num_attention_heads=max(1, width // 64),
        image_size=math.isqrt(positions.shape[1] - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # BLIP's own; transformers has 1e-5
    )
    return BlipVisionModel(config)


def _text(tensors: dict[str, Tensor], file: Path) -> BlipTextModel:
    start = "blip.text_encoder."
    embeddings = tensors[f"{start}embeddings.word_embeddings.weight"]
    config_file = file.parent / "med_config.json"
    settings: dict[str, Any] = read_object(config_file) if config_file.is_file() else {}
    config = BlipTextConfig(
        vocab_size=embeddings.shape[0],
        hidden_size=embeddings.shape[1],
        encoder_hidden_size=tensors[f"{start}encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(tensors[f"{start}encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_count(tensors, rf"{re.escape(start)}encoder\.layer\.(\d+)\."),
        num_attention_heads=settings.get("num_attention_heads", max(1, embeddings.shape[1] // 64)),
        max_position_embeddings=len(tensors[f"{start}embeddings.position_embeddings.weight"]),
        layer_norm_eps=settings.get("layer_norm_eps", 1e-12),
        bos_token_id=None,
        sep_token_id=None,
    )
    return BlipTextModel(config, add_pooling_layer=False)


def _head(tensors: dict[str, Tensor], file: Path) -> nn.Sequential:
    try:
        weights = [tensors[f"mlp.layers.{number}.weight"] for number in _LAYERS]
    except KeyError as error:
        raise ValueError(f"{file} lacks {error} of ImageReward's head.") from error
    return nn.Sequential(*(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights))


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})


def _tokenizer(file: Path, model: nn.ModuleDict) -> Any:
    """Load bert-base-uncased's; the model may have BLIP's two tokens [DEC] and [ENC] besides, which are unused."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder_of(file, scorer="ImageReward"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file.parent} has no tokenizer: put that of bert-base-uncased beside {file.name}. ({error})"
        ) from error
    text: Any = model["text"]
    missing = text.config.vocab_size - len(tokenizer)
    if missing not in (0, 2):
        raise ValueError(
            f"The tokenizer in {file.parent} has {len(tokenizer)} tokens and the model {text.config.vocab_size}; it "
            f"must be that of bert-base-uncased, with or without BLIP's two."
        )
    return tokenizer
