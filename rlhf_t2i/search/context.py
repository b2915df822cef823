"""Where a search paints and judges: batches that fit the memory, scores that are kept, costs that are counted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import sample
from rlhf_t2i.types import DiffusionModel, Prediction, Reward, Sampler

PartT = TypeVar("PartT")


@runtime_checkable
class RewardFunction(Protocol):
    """Several rewards at once: their verdict, and what each of them said. A `WeightedSum` is one; so is a Reward."""

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], /
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]: ...


@dataclass(frozen=True, slots=True)
class Veto:
    """No image that this reward puts below the threshold is picked while there is another."""

    reward: Reward
    threshold: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What was spent, counted alike for every search."""

    denoiser_calls: int = 0
    """Images that went through the denoiser: each counts twice with classifier-free guidance, and once more with a
    gradient."""
    reward_calls: int = 0
    """Images that were judged, by each judge."""
    seconds: float = 0.0

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.denoiser_calls - other.denoiser_calls,
            self.reward_calls - other.reward_calls,
            self.seconds - other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was said of N images of each of P prompts."""

    scores: dict[str, Float[Tensor, "P N"]]
    """`reward`, which decides; then each judge's, if there are several; and `veto`. They may be no finite numbers."""
    vetoed: Bool[Tensor, "P N"]

    @property
    def reward(self) -> Float[Tensor, "P N"]:
        return self.scores["reward"]

    @property
    def order(self) -> Int[Tensor, "P N"]:
        """The images of each prompt, best first.

        Those without a finite reward come after all that have one. Vetoed ones come last, and among them the one that
        the veto likes best is first.
        """
        key = torch.where(self.vetoed, self.scores.get("veto", self.reward), self.reward)
        by_key = key.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
        by_veto = self.vetoed.gather(1, by_key).int().argsort(dim=1, stable=True)
        return by_key.gather(1, by_veto)

    @property
    def standing(self) -> Float[Tensor, "P N"]:
        """How many images of its prompt each one beats."""
        num = self.order.shape[1]
        return (num - 1 - self.order.argsort(dim=1)).float()


@dataclass(frozen=True, slots=True)
class Candidates:
    """The images that a search ends with, on the CPU and in [0, 1], and what they cost."""

    images: Float[Tensor, "P N 3 Y X"]
    verdict: Verdict
    cost: Cost

    @property
    def picked(self) -> Int[Tensor, " P"]:
        """Which of its images each prompt gets."""
        return self.verdict.order[:, 0]

    @property
    def best(self) -> Float[Tensor, "P 3 Y X"]:
        """The picked images."""
        return self.images[torch.arange(len(self.images)), self.picked]


class SearchContext:
    """A painter, its way to paint, and judges. All rows are prompt after prompt, the same number for each."""

    def __init__(
        self,
        model: DiffusionModel,
        reward: RewardFunction,
        *,
        sampler: Sampler,
        batch_size: int = 64,
        veto: Veto | None = None,
    ) -> None:
        """At most `batch_size` images go through a network at once; half as many from then on if memory runs out."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.model, self.reward, self.sampler, self.veto = model, reward, sampler, veto
        self.batch_size = batch_size
        self.denoiser_calls = self.reward_calls = 0

    @property
    def num_steps(self) -> int:
        return self.sampler.schedule.num_steps

    def spent(self) -> Cost:
        """All so far, by the clock; the difference of two is the cost of what lies between."""
        return Cost(self.denoiser_calls, self.reward_calls, time.monotonic())

    # --- painting ---

    def predict(self, latents: Float[Tensor, "B C H W"], step: int, conditioning: Float[Tensor, "B L D"]) -> Prediction:
        """What the model sees in latents that have taken `step` steps."""

        def work(rows: Tensor) -> Prediction:
            level = self.sampler.schedule.at(torch.full((len(rows),), step))
            guidance_scale = self.sampler.guidance_scale
            return self.model.predict(latents[rows], level, conditioning[rows], guidance_scale=guidance_scale)

        parts = self.in_batches(len(latents), work)
        self.denoiser_calls += len(latents) * self.model.num_calls(self.sampler.guidance_scale)
        return Prediction(torch.cat([part.clean for part in parts]), torch.cat([part.noise for part in parts]))

    def step(
        self,
        latents: Float[Tensor, "B C H W"],
        prediction: Prediction,
        step: int,
        *,
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "B C H W"]:
        """Draw the next latents, each from its own generator."""
        schedule, at = self.sampler.schedule, torch.full((len(latents),), step)
        transition = self.sampler.dynamics(latents, prediction, schedule.at(at), schedule.at(at + 1))
        return sample(transition, generators=generators)

    def walk(
        self,
        latents: Float[Tensor, "B C H W"],
        conditioning: Float[Tensor, "B L D"],
        steps: range,
        *,
        generators: Sequence[torch.Generator],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """Take some denoising steps: the latents after them, and the clean image that the last one saw ahead."""
        clean = latents
        for step in steps:
            prediction = self.predict(latents, step, conditioning)
            latents, clean = self.step(latents, prediction, step, generators=generators), prediction.clean
        return latents, clean

    def noise_of_steps(self) -> Float[Tensor, " T"]:
        """The standard deviation that the dynamics give each step."""
        schedule, at = self.sampler.schedule, torch.arange(self.num_steps)
        nothing = schedule.alpha.new_zeros(self.num_steps, 1, 1, 1)
        prediction = Prediction(nothing, nothing)
        return self.sampler.dynamics(nothing, prediction, schedule.at(at), schedule.at(at + 1)).std

    # --- judging ---

    def judge(
        self, latents: Float[Tensor, "B C H W"], prompts: Sequence[str], *, veto: bool = True
    ) -> tuple[Float[Tensor, "P N 3 Y X"], Verdict]:
        """Decode latents and let the judges speak: the same number for each of P prompts.

        An image whose reward is no finite number loses, and a warning counts such images. Raises ValueError, naming
        the prompt, if no image of a prompt has a finite reward.
        """
        num = len(latents) // len(prompts)
        of_row = [prompt for prompt in prompts for _ in range(num)]
        judging = self.veto if veto else None

        def work(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            images, asked = self.model.decode(latents[rows]).clamp(0, 1), [of_row[int(i)] for i in rows]
            scores = verdicts(self.reward, images, asked)
            if judging is not None:
                scores["veto"] = judging.reward(images, asked)
            return images.cpu(), {name: values.float().cpu() for name, values in scores.items()}

        parts = self.in_batches(len(latents), work)
        images = torch.cat([images for images, _ in parts]).unflatten(0, (len(prompts), num))
        scores = {
            name: torch.cat([part[name] for _, part in parts]).unflatten(0, (len(prompts), num)) for name in parts[0][1]
        }
        self.reward_calls += len(latents) * num_rewards(scores)
        _check_finite(scores["reward"], prompts)
        # "not at least" instead of "below": a safety judge that says NaN has not said that an image is safe.
        vetoed = ~(scores["veto"] >= judging.threshold) if judging else torch.zeros_like(scores["reward"]).bool()
        return images, Verdict(scores, vetoed)

    # --- memory ---

    def in_batches(self, count: int, work: Callable[[Tensor], PartT]) -> list[PartT]:
        """`work` on every row from 0 to `count`, as many at once as fit; OutOfMemoryError if not even one does."""
        parts: list[PartT] = []
        done = 0
        while done < count:
            rows = torch.arange(done, min(done + self.batch_size, count))
            try:
                parts.append(work(rows))
                done += len(rows)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                self.batch_size = len(rows) // 2
                warnings.warn(
                    f"Out of memory with {len(rows)} images at once; going on with {self.batch_size}, which changes "
                    f"no result. Set batch_size to {self.batch_size} to be spared the attempt.",
                    stacklevel=3,
                )
        return parts


def verdicts(reward: RewardFunction, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> dict[str, Tensor]:
    """What one reward or several say: `reward`, and each one's own score where there are several.

    ValueError if there is not one number for each image.
    """
    said = reward(images, prompts)
    total, each = (said, {}) if isinstance(said, Tensor) else said
    if total.shape != (len(images),):
        raise ValueError(
            f"The reward returned shape {tuple(total.shape)} for {len(images)} images; it must return "
            f"({len(images)},). The first prompt was {prompts[0]!r}."
        )
    return {"reward": total, **(each if len(each) > 1 else {})}


def num_rewards(scores: Mapping[str, Tensor]) -> int:
    """How many judges these scores are of: of several each has its own beside their verdict."""
    vetoes = int("veto" in scores)
    return max(1, len(scores) - vetoes - 1) + vetoes


def _check_finite(reward: Float[Tensor, "P N"], prompts: Sequence[str]) -> None:
    lost = ~reward.isfinite()
    if lost.all(dim=1).any():
        prompt = prompts[int(lost.all(dim=1).nonzero()[0])]
        raise ValueError(f"No image of {prompt!r} got a finite reward ({reward.shape[1]} were judged).")
    if lost.any():
        warnings.warn(
            f"{int(lost.sum())} of {lost.numel()} images got a reward that is no finite number; they lose.",
            stacklevel=4,
        )
