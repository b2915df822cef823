"""From what a user writes (`llava_reward`, `jpeg_compressibility=0.1`, `my_module:my_reward`) to rewards that are checked."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.config import names
from rlhf_t2i.types import Reward

BUILT_IN = ("llava_reward", "oracle", "oracle_pass", "jpeg_compressibility", "jpeg_incompressibility")
KNOWN = ("clip", "clip_score", "pick_score", "hps", "image_reward", "vqa_score")
"""Judges of other projects, asked as NAME:PATH."""


@dataclass(frozen=True, slots=True)
class CheckedReward:
    """A reward that has a name, and whose every answer is looked at before it is used."""

    name: str
    function: Reward
    finite: bool = True
    """Whether a number that is not finite is an error; a search lets such an image lose instead."""

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """The rewards as float32; TypeError or ValueError, naming the reward and the prompt, if they are none."""
        scores = self.function(images, prompts)
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"The reward {self.name!r} returned a {type(scores).__name__}; it must return a torch.Tensor with one "
                f"float for each image. The first prompt was {prompts[0]!r}."
            )
        if scores.shape != (len(images),):
            raise ValueError(
                f"The reward {self.name!r} returned shape {tuple(scores.shape)} for {len(images)} images; it must "
                f"return ({len(images)},). The first prompt was {prompts[0]!r}."
            )
        if not scores.is_floating_point():
            raise TypeError(
                f"The reward {self.name!r} returned {scores.dtype}; it must return floats. The first prompt was "
                f"{prompts[0]!r}."
            )
        scores = scores.float().to(images.device)
        if self.finite and not (finite := scores.isfinite()).all():
            worst = int((~finite).nonzero()[0])
            raise ValueError(
                f"The reward {self.name!r} returned {scores[worst].item()} for the prompt {prompts[worst]!r} "
                f"(image {worst} of {len(images)}); rewards must be finite."
            )
        return scores


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """Several judges, one verdict: sum_i weight_i * reward_i."""

    parts: tuple[tuple[CheckedReward, float], ...]

    @property
    def rewards(self) -> list[CheckedReward]:
        """The judges, without their weights."""
        return [reward for reward, _ in self.parts]

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], *, batch_size: int | None = None
    ) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:
        """The verdicts, and what each judge said before its weight; at most `batch_size` images are judged at once."""
        chunks = torch.arange(len(images)).split(batch_size or len(images))
        each = {
            reward.name: torch.cat([reward(images[rows], [prompts[int(i)] for i in rows]) for rows in chunks])
            for reward, _ in self.parts
        }
        total = torch.stack([weight * each[reward.name] for reward, weight in self.parts]).sum(0)
        return total, each


def load_rewards(specification: str, *, finite: bool = True) -> WeightedSum:
    """Build the weighted sum that `oracle,jpeg_compressibility=0.1` asks for.

    Each part is NAME or NAME=WEIGHT (1 if left out), NAME being a built-in reward, `llava_reward:PATH` for a LLaVA-Reward
    judge (a folder or Hub id), `clip:PATH` for the image-text similarity of a CLIP, NAME:PATH for another judge of
    `KNOWN`, or `module:function`, found in the working directory or among installed packages. What is not finite is an
    error unless `finite` is false. Raises ValueError for anything else.
    """
    specifications = names(specification)
    if not specifications:
        raise ValueError(f"No reward was given; choose from {', '.join(BUILT_IN)} or module:function.")
    parts: list[tuple[CheckedReward, float]] = []
    for part in specifications:
        name, separator, number = part.partition("=")
        weight = _weight(number, part) if separator else 1.0
        if name in {reward.name for reward, _ in parts}:
            raise ValueError(f"The reward {name!r} was given twice.")
        parts.append((load_reward(name, finite=finite), weight))
    return WeightedSum(tuple(parts))


def load_reward(name: str, *, finite: bool = True) -> CheckedReward:
    """One judge by name; heavy imports wait until their judge is asked for."""
    return CheckedReward(name, _function(name, finite=finite), finite)


def _function(name: str, *, finite: bool) -> Reward:
    from rlhf_t2i.rewards import builtin

    match name:
        case "oracle":
            return builtin.oracle_graded
        case "oracle_pass":
            return builtin.oracle_pass
        case "jpeg_compressibility":
            return builtin.jpeg_compressibility
        case "jpeg_incompressibility":
            return builtin.jpeg_incompressibility
        case "llava_reward":
            from rlhf_t2i.rewards.llava_reward import BUILT_IN_REWARD_MODEL, LlavaRewardFunction

            return LlavaRewardFunction(BUILT_IN_REWARD_MODEL)
        case _ if name.startswith("judge:"):
            from rlhf_t2i.rewards.llava_reward import LlavaRewardFunction

            return LlavaRewardFunction(name.removeprefix("judge:"))
        case _ if name.partition(":")[0] in KNOWN:
            from rlhf_t2i.rewards.scorers import load_function

            return load_function(name)
        case _ if name.startswith(("http://", "https://")):
            from rlhf_t2i.rewards.remote import RemoteReward

            return RemoteReward(name, finite=finite)
        case _ if ":" in name:
            return _imported(name)
        case _:
            raise ValueError(
                f"There is no reward {name!r}; choose from {', '.join(BUILT_IN)}, give a judge as llava_reward:PATH, a CLIP "
                f"as clip:PATH (or another of {', '.join(KNOWN)}), or your own as module:function."
            )


def _imported(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    if not all(module_name.split(".")):
        raise ValueError(f"The reward {name!r} is not of the form module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"The reward {name!r} names a module that is neither installed nor in {os.getcwd()}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"The module {module_name!r} has no callable {function_name!r}.")
    return cast(Reward, function)


def _weight(text: str, specification: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"In the reward {specification!r} the weight {text!r} is not a number.")
    return weight
