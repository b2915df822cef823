"""The search context: sampling and scoring in batches that fit the memory, with a count of what they cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_t2i.advantages import standardised_sum_of_groups
from rlhf_t2i.diffusion.gaussian import sample
from rlhf_t2i.rewards.load import WeightedSum, as_checked, as_weighted_sum
from rlhf_t2i.types import Conditioning, DiffusionModel, MetadataReward, Prediction, Reward, Sampler

ResultT = TypeVar("ResultT")


RewardFunction = Reward | MetadataReward | WeightedSum
"""A reward, or a weighted sum of rewards that also returns each of them by name."""


@dataclass(frozen=True, slots=True)
class Veto:
    """A reward and a threshold: an image with a lower score is selected only if all images of its prompt are vetoed."""

    reward: Reward | MetadataReward
    threshold: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a search, counted in the same way for every algorithm."""

    denoiser_calls: int = 0
    """Images that passed through the denoiser. Each counts twice with classifier-free guidance; a backward pass counts
    as one more call."""
    reward_calls: int = 0
    """Images that were scored, times the number of rewards."""
    seconds: float = 0.0
    """Wall-clock time."""

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.denoiser_calls - other.denoiser_calls,
            self.reward_calls - other.reward_calls,
            self.seconds - other.seconds,
        )


@dataclass(frozen=True, slots=True)
class CandidateScores:
    """Scores of N images for each of P prompts."""

    by_name: dict[str, Float[Tensor, "P N"]]
    """`reward`, the weighted sum; the score of each reward if there are several; and `veto` if there is
    one. A score may be NaN or infinite."""
    vetoed: Bool[Tensor, "P N"]
    """True for images that the veto forbids."""
    selection: Float[Tensor, "P N"] | None = None
    """Numbers that images are ordered by in place of `reward`."""

    @property
    def reward(self) -> Float[Tensor, "P N"]:
        return self.by_name["reward"]

    @property
    def order(self) -> Int[Tensor, "P N"]:
        """Indices of the images of each prompt, from best to worst.

        Images whose reward is not finite come after all images with a finite reward. Vetoed images come last, ordered
        by the score of the veto.
        """
        selection = self.reward if self.selection is None else self.selection
        key = torch.where(self.vetoed, self.by_name.get("veto", selection), selection)
        by_key = key.nan_to_num(-torch.inf, -torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)
        by_veto = self.vetoed.gather(1, by_key).int().argsort(dim=1, stable=True)
        return by_key.gather(1, by_veto)

    @property
    def rank(self) -> Int[Tensor, "P N"]:
        """Rank of each image among the images of its prompt, from 0 (best) to N - 1."""
        return self.order.argsort(dim=1)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The final images of a search, on the CPU with pixels in [0, 1], their scores and the cost of the search."""

    images: Float[Tensor, "P N 3 Y X"]
    scores: CandidateScores
    cost: Cost

    @property
    def selected(self) -> Int[Tensor, " P"]:
        """Index of the best image of each prompt."""
        return self.scores.order[:, 0]

    @property
    def best(self) -> Float[Tensor, "P 3 Y X"]:
        """The best image of each prompt."""
        return self.images[torch.arange(len(self.images)), self.selected]


PARTS_OF_GROUPS = "a search scores a part of them at a time"
"""Why a reward that compares the images of one prompt cannot be searched with."""


class SearchContext:
    """A model, its sampler and a reward, as used by all search algorithms.

    A batch holds all rows of the first prompt, then all rows of the second, and so on, the same number for each.
    """

    def __init__(
        self,
        model: DiffusionModel,
        reward: RewardFunction,
        *,
        sampler: Sampler,
        microbatch_size: int = 64,
        veto: Veto | None = None,
        standardise: bool = False,
    ) -> None:
        """Use at most `microbatch_size` images in one forward pass. It is halved whenever memory runs out.

        With `standardise` images are ordered by the weighted sum of standardised rewards, each divided by its standard
        deviation among the images of one prompt. A score of a plain function may be NaN or infinite.
        """
        if microbatch_size < 1:
            raise ValueError(f"microbatch_size is {microbatch_size}; it must be at least 1.")
        self.model, self.sampler = model, sampler
        self.reward = as_weighted_sum(reward, finite=False)
        self.veto = replace(veto, reward=as_checked(veto.reward, finite=False)) if veto else None
        for each in (self.reward, *([as_weighted_sum(self.veto.reward)] if self.veto else [])):
            each.refuse_groups(PARTS_OF_GROUPS)
        self.microbatch_size, self.standardise = microbatch_size, standardise
        self.denoiser_calls = self.reward_calls = 0

    @property
    def num_steps(self) -> int:
        return self.sampler.schedule.num_steps

    def cost_so_far(self) -> Cost:
        """Return the counters and the clock; the difference of two results is the cost of the work in between."""
        return Cost(self.denoiser_calls, self.reward_calls, time.monotonic())

    # --- sampling ---

    def predict(self, latents: Float[Tensor, "B C H W"], step: int, conditioning: Conditioning) -> Prediction:
        """Return the model's prediction for latents after `step` denoising steps."""

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
        """Sample the next latents, each with its own generator."""
        schedule, at = self.sampler.schedule, torch.full((len(latents),), step)
        transition = self.sampler.dynamics(latents, prediction, schedule.at(at), schedule.at(at + 1))
        return sample(transition, generators=generators)

    def denoise(
        self,
        latents: Float[Tensor, "B C H W"],
        conditioning: Conditioning,
        steps: range,
        *,
        generators: Sequence[torch.Generator],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
        """Run the given denoising steps; return the latents and the clean latents predicted in the last of them."""
        clean = latents
        for step in steps:
            prediction = self.predict(latents, step, conditioning)
            latents, clean = self.step(latents, prediction, step, generators=generators), prediction.clean
        return latents, clean

    def step_stds(self) -> Float[Tensor, " T"]:
        """Return the standard deviation of the noise that each denoising step adds; 0 for a deterministic step."""
        schedule, at = self.sampler.schedule, torch.arange(self.num_steps)
        zeros = schedule.alpha.new_zeros(self.num_steps, 1, 1, 1)
        return self.sampler.dynamics(zeros, Prediction(zeros, zeros), schedule.at(at), schedule.at(at + 1)).std

    # --- scoring ---

    def score(
        self, latents: Float[Tensor, "B C H W"], prompts: Sequence[str], *, veto: bool = True
    ) -> tuple[Float[Tensor, "P N 3 Y X"], CandidateScores]:
        """Decode latents and score the images; the B = P N rows are N images of each prompt.

        An image whose reward is not finite is ranked last, and a warning says how many there are. Raises ValueError,
        with the prompt, if no image of a prompt has a finite reward.
        """
        num = len(latents) // len(prompts)
        row_prompts = [prompt for prompt in prompts for _ in range(num)]
        active_veto = self.veto if veto else None

        def work(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            images, texts = self.model.decode(latents[rows]).clamp(0, 1), [row_prompts[int(i)] for i in rows]
            scores = call_reward(self.reward, images, texts)
            if active_veto is not None:
                scores["veto"] = as_checked(active_veto.reward)(images, texts)
            return images.cpu(), {name: values.float().cpu() for name, values in scores.items()}

        parts = self.in_batches(len(latents), work)
        images = torch.cat([images for images, _ in parts]).unflatten(0, (len(prompts), num))
        scores = {
            name: torch.cat([part[name] for _, part in parts]).unflatten(0, (len(prompts), num)) for name in parts[0][1]
        }
        self.reward_calls += len(latents) * num_rewards(scores)
        _check_finite(scores["reward"], prompts)
        # "not >=" instead of "<": an image for which a safety model returns NaN has not been found safe.
        vetoed = (
            ~(scores["veto"] >= active_veto.threshold) if active_veto else torch.zeros_like(scores["reward"]).bool()
        )
        selection = None
        if self.standardise and len(self.reward.terms) > 1:
            by_term = torch.stack([scores[term.name] for term in self.reward.rewards])
            selection = standardised_sum_of_groups(by_term, [weight for _, weight in self.reward.terms])
        return images, CandidateScores(scores, vetoed, selection)

    # --- memory ---

    def in_batches(self, count: int, work: Callable[[Tensor], ResultT]) -> list[ResultT]:
        """Call `work` on the row indices 0 to count - 1 in batches and return the results.

        When memory runs out the batch is halved, with a warning. Raises OutOfMemoryError if a single row does not fit.
        """
        results: list[ResultT] = []
        done = 0
        while done < count:
            rows = torch.arange(done, min(done + self.microbatch_size, count))
            try:
                results.append(work(rows))
                done += len(rows)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                self.microbatch_size = len(rows) // 2
                warnings.warn(
                    f"Out of memory with {len(rows)} images in one batch; continuing with {self.microbatch_size}, "
                    f"which changes no result. Set microbatch_size to {self.microbatch_size} to avoid this warning.",
                    stacklevel=3,
                )
        return results


def call_reward(reward: WeightedSum, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return the scores (B,) of images as `reward` and, for a sum of several rewards, also each reward by its name."""
    total, by_name = reward(images, prompts)
    return {"reward": total, **(by_name if len(by_name) > 1 else {})}


def num_rewards(scores: Mapping[str, Tensor]) -> int:
    """Return the number of rewards behind scores by name; the sum `reward` counts only if it is the only one."""
    vetoes = int("veto" in scores)
    return max(1, len(scores) - vetoes - 1) + vetoes


def _check_finite(reward: Float[Tensor, "P N"], prompts: Sequence[str]) -> None:
    bad = ~reward.isfinite()
    if bad.all(dim=1).any():
        prompt = prompts[int(bad.all(dim=1).nonzero()[0])]
        raise ValueError(f"No image of {prompt!r} has a finite reward ({reward.shape[1]} were scored).")
    if bad.any():
        warnings.warn(
            f"The reward of {int(bad.sum())} of {bad.numel()} images is not finite; they are ranked last.",
            stacklevel=4,
        )
