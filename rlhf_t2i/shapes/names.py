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
TOY_PROMPTS = "shapes"
"""Name of the toy prompts: training or held-out ones, as the use requires."""
TOY_PAIRS = "shapes"
"""Name of the toy preference pairs, which are made on first use."""
TOY_REWARD = "llava_reward"
"""Name of the toy LLaVA-Reward among the rewards."""
TOY_REWARD_MODEL = "shapes"
"""Name of the toy LLaVA-Reward where a folder of one is expected."""
TOY_BACKBONE = "shapes"
"""Name of its backbone, a toy LLaVA."""

TOY_MODEL_FOLDER = Path(__file__).parent / "weights"
TOY_FLOW_MODEL_FOLDER = TOY_MODEL_FOLDER / "flow"
TOY_REWARD_MODEL_FOLDER = TOY_MODEL_FOLDER / "reward_model"
TOY_BACKBONE_FOLDER = TOY_REWARD_MODEL_FOLDER / "backbone"

TOY_MODELS = {TOY_MODEL: TOY_MODEL_FOLDER, TOY_FLOW_MODEL: TOY_FLOW_MODEL_FOLDER}
"""Folder of each toy model, by name."""

TOY_RESOLUTION = 32
"""Height and width of the images of the toy models, in pixels."""


def default_resolution(model: str) -> int | None:
    """Return the resolution of a model whose pipeline folder does not state it; None if it does."""
    return TOY_RESOLUTION if model == TOY_FLOW_MODEL else None


def toy_pairs_folder(seed: int) -> Path:
    """Return the folder in which the toy preference pairs of a seed are made."""
    return Path("runs") / f"{TOY_PAIRS}-pairs-{seed}"
