"""The names of the toy world on the command line, and its files; imports nothing heavy.

Its base model, flow model, prompts, preference pairs and reward-model backbone have names that can be given wherever a
folder or file of one's own can be given.
"""

from __future__ import annotations

from pathlib import Path

TOY_MODEL = "shapes"
"""Name of the toy Stable Diffusion."""
TOY_FLOW_MODEL = "shapes-flow"
"""Name of the toy flow model, a Z-Image."""
TOY_SIGN_MODEL = "words-flow"
"""Name of the toy flow model that writes words on signs, a Z-Image."""
TOY_PROMPTS = "shapes"
"""Name of the toy prompts of shapes: training or held-out ones, as the use requires."""
TOY_SIGN_PROMPTS = "words"
"""Name of the toy prompts of signs, likewise."""
TOY_PAIRS = "shapes"
"""Name of the toy preference pairs, which are made on first use."""
TOY_REWARD = "llava_reward"
"""Name of the toy reward model among the rewards."""
TOY_SIGN_REWARD = "rlhf_t2i.rewards.ocr:OcrReward(min_side=64)"
"""The reward of signs: OCR, with the images enlarged no more than it needs."""
TOY_REWARD_MODEL = "shapes"
"""Name of the toy reward model where a folder of one is expected; its score is the likelihood of the prompt."""
TOY_SKIP_CA_REWARD_MODEL = "shapes-skip-ca"
"""Name of another one on the same backbone with LLaVA-Reward's architecture: last token and SkipCA."""
TOY_BACKBONE = "shapes"
"""Name of its backbone, a toy LLaVA."""

TOY_MODEL_FOLDER = Path(__file__).parent / "weights"
TOY_FLOW_MODEL_FOLDER = TOY_MODEL_FOLDER / "flow"
TOY_REWARD_MODEL_FOLDER = TOY_MODEL_FOLDER / "reward_model"
TOY_BACKBONE_FOLDER = TOY_REWARD_MODEL_FOLDER / "backbone"

TOY_SIGN_MODEL_FOLDER = TOY_MODEL_FOLDER / "words"

TOY_MODELS = {
    TOY_MODEL: TOY_MODEL_FOLDER,
    TOY_FLOW_MODEL: TOY_FLOW_MODEL_FOLDER,
    TOY_SIGN_MODEL: TOY_SIGN_MODEL_FOLDER,
}
"""Folder of each toy model, by name."""

TOY_REWARD_MODELS = {
    TOY_REWARD_MODEL: TOY_REWARD_MODEL_FOLDER,
    TOY_SKIP_CA_REWARD_MODEL: TOY_MODEL_FOLDER / "reward_model_skip_ca",
}
"""Folder of each toy reward model, by name."""

TOY_PROMPT_SETS = (TOY_PROMPTS, TOY_SIGN_PROMPTS)
TOY_RESOLUTION = 32
"""Height and width of the images of the toy models of shapes, in pixels."""
TOY_SIGN_SIZE = (24, 80)
"""Height and width of the images of the toy model of words, in pixels."""


def default_resolution(model: str) -> int | tuple[int, int] | None:
    """Return the resolution of a model whose pipeline folder does not state it; None if it does.

    It is the side of square images in pixels, or their height and width.
    """
    return {TOY_FLOW_MODEL: TOY_RESOLUTION, TOY_SIGN_MODEL: TOY_SIGN_SIZE}.get(model)


def toy_pairs_folder(seed: int) -> Path:
    """Return the folder in which the toy preference pairs of a seed are made."""
    return Path("runs") / f"{TOY_PAIRS}-pairs-{seed}"
