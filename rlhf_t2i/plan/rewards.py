"""Memory of the weights of reward models, by their published sizes; a dry run does not load them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rlhf_t2i.output.run_folder import reward_model_of
from rlhf_t2i.rewards.placement import path_and_arguments

_CLIP_L, _CLIP_H, _SIGLIP = 427_616_513, 986_109_441, 877_960_274
PARAMETERS = {
    "openai/clip-vit-large-patch14": _CLIP_L, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _CLIP_H,
    "yuvalkirstain/PickScore_v1": _CLIP_H, "google/siglip-so400m-patch14-384": _SIGLIP,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976, "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "microsoft/Phi-3.5-vision-instruct": 4_146_621_440,
}  # fmt: skip
"""Parameters of models that rewards are made of, by their Hub ids."""
_IN_FLOAT32 = ("clip", "clip_score", "pick_score")
"""Rewards that are a CLIP, which is held in float32 unless its argument dtype says otherwise."""
_WITHOUT_WEIGHTS = ("jpeg_compressibility", "jpeg_incompressibility", "oracle", "oracle_pass", "oracle_word")
_SERVERS = ("http://", "https://", "vlm:")


def reward_bytes(name: str) -> int | float | None:
    """Return the bytes on the device of a reward's weights, 0 for one on a server; None if its size is unknown here.

    A LLaVA-Reward counts its backbone in bfloat16; its folder names that.
    """
    kind, _, argument = name.partition(":")
    if name in _WITHOUT_WEIGHTS or name.startswith(_SERVERS):
        return 0
    if kind in _IN_FLOAT32:
        model, options = path_and_arguments(argument)
        size = 4 if options.get("dtype", "float32") == "float32" else 2
        return None if model not in PARAMETERS else size * PARAMETERS[model]
    if kind == "llava_reward" and argument:
        path, options = path_and_arguments(argument)
        backbone = _backbone(Path(reward_model_of(path)))
        return None if backbone not in PARAMETERS or options.get("quantization") else 2 * PARAMETERS[backbone]
    return None


def is_offloaded(name: str) -> bool:
    """True for a reward of known size that is on the device only while it scores, NAME:PATH(offload=True)."""
    return bool(reward_bytes(name)) and path_and_arguments(name.partition(":")[2])[1].get("offload") is True


def bytes_of_rewards(names: Iterable[str]) -> tuple[int | float, list[str]]:
    """Return the bytes of all rewards whose sizes are known, and the names of the others."""
    sizes = {name: reward_bytes(name) for name in dict.fromkeys(names)}
    return sum(size or 0 for size in sizes.values()), [name for name, size in sizes.items() if size is None]


def _backbone(folder: Path) -> str | None:
    from rlhf_t2i.output.run_folder import REWARD_MODEL_CONFIG

    file = folder / Path(REWARD_MODEL_CONFIG).name
    return json.loads(file.read_text(encoding="utf-8")).get("backbone") if file.is_file() else None
