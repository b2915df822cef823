"""The table NAME:PATH -> scorer (`hps:models/hps`)."""

from __future__ import annotations

from importlib import import_module
from typing import Literal, get_args

import torch

from reward_model.scorers.pointwise import PointwiseScorer, ScoreFunction

ScorerName = Literal[
    "clip",
    "clip_score",
    "pick_score",
    "hps",
    "hps_v3",
    "image_reward",
    "aesthetic",
    "vqa_score",
    "visual_gpt_score",
    "unified_reward",
]
NAMES: tuple[str, ...] = get_args(ScorerName)
DTYPES = ("float32", "bfloat16", "float16")
WITH_DTYPE = ("clip", "clip_score", "pick_score")
"""Scorers whose networks may compute in half precision."""


def is_known(specification: str) -> bool:
    """True if this is NAME:PATH with the name of a scorer."""
    return specification.partition(":")[0] in NAMES and ":" in specification


def load_scorer(specification: str) -> PointwiseScorer:
    """Load the scorer NAME:PATH; ValueError for an unknown name."""
    return PointwiseScorer(specification, load_function(specification))


def load_function(specification: str, *, dtype: str = "float32") -> ScoreFunction:
    """Load the score function NAME:PATH of image batches and prompts.

    `dtype`, float32, bfloat16 or float16, is the precision of a CLIP's towers (clip, clip_score, pick_score), from
    which the others cannot depart. Raises ValueError for another one.
    """
    name, _, path = specification.partition(":")
    if dtype not in DTYPES or (dtype != "float32" and name not in WITH_DTYPE):
        allowed = ", ".join(DTYPES) if name in WITH_DTYPE else "float32"
        raise ValueError(f"The dtype of {name} is {dtype!r}; it must be {allowed}.")
    precision: torch.dtype = getattr(torch, dtype)
    match name:
        case "clip" | "pick_score":  # PickScore is a CLIP's own logit
            from reward_model.scorers.clip import load_clip

            return load_clip(path, dtype=precision)
        case "clip_score":
            from reward_model.scorers.clip import load_clip

            return load_clip(path, form="clip_score", dtype=precision)
        case _ if name in NAMES:  # a module of the scorer's name has its loader
            return getattr(import_module(f"reward_model.scorers.{name}"), f"load_{name}")(path)
        case _:
            raise ValueError(
                f"There is no scorer {specification!r}; write NAME:PATH, with NAME one of {', '.join(NAMES)}."
            )
