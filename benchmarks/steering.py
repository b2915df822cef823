"""Compare the search methods on the toy world: `python benchmarks/steering.py`.

Prints two Markdown tables. The first has, for every method, its cost and the oracle's pass rate of the images selected
by a reward; the last column is the fraction of the gain of best-of-16 over one image. The second has FK steering with
and without rewards at several guidance scales, a small version of LLaVA-Reward's experiment (arXiv:2507.21391). Cells
are the mean, lowest and highest over seeds; every seed searches for several images of each held-out prompt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.search.candidates import best_of_n, expected_best, pruned_best_of_n
from rlhf_t2i.search.context import Candidates, RewardFunction, SearchContext
from rlhf_t2i.search.noise_search import gradient_search, neighbourhood_search
from rlhf_t2i.search.particles import PotentialName
from rlhf_t2i.search.steering import fk_steering, measure_reward_std
from rlhf_t2i.seeds import CALIBRATE, RESAMPLE, SAMPLE, generator_for
from rlhf_t2i.shapes import oracle
from rlhf_t2i.shapes.names import TOY_MODEL, TOY_PROMPTS
from rlhf_t2i.types import DiffusionModel, Sampler

NUM_STEPS = 8
RESAMPLE_AFTER = (2, 3, 4, 6)
STRENGTH = 2.0
POTENTIALS: tuple[PotentialName, ...] = ("difference", "max", "sum")
GUIDANCE_SCALES = (1.0, 3.0, 5.0, 7.5)
NUM_GUIDED_PARTICLES = 4


@dataclass(frozen=True)
class Outcome:
    """The result of one method with one seed: means over searches."""

    denoiser_calls: float
    reward_calls: float
    seconds: float
    reward: float
    passed: float


@dataclass(frozen=True)
class Bench:
    """The searches of one seed: model, reward and prompts."""

    model: DiffusionModel
    reward: RewardFunction
    prompts: list[str]
    seed: int
    guidance_scale: float = 1.0

    def context(self, *, eta: float) -> SearchContext:
        sampler = Sampler(self.model.schedule(NUM_STEPS), partial(ddim, eta=eta), self.guidance_scale)
        return SearchContext(self.model, self.reward, sampler=sampler, microbatch_size=128)

    def generators(self, num: int) -> list[torch.Generator]:
        return [generator_for(self.seed, SAMPLE, p, i) for p in range(len(self.prompts)) for i in range(num)]

    def reward_std(self) -> float:
        prompts = list(dict.fromkeys(self.prompts))
        calibration = [generator_for(self.seed, CALIBRATE, i) for i in range(4 * len(prompts))]
        return measure_reward_std(self.context(eta=1.0), prompts, generators=calibration)

    def steered(
        self, num: int, *, reward_std: float, potential: PotentialName, ess_threshold: float = 1.0
    ) -> Candidates:
        return fk_steering(
            self.context(eta=1.0), self.prompts, strength=STRENGTH, reward_std=reward_std, potential=potential,
            resample_after=RESAMPLE_AFTER, ess_threshold=ess_threshold, generators=self.generators(num),
            resampling=[generator_for(self.seed, RESAMPLE, p) for p in range(len(self.prompts))],
        ).candidates  # fmt: skip

    def outcome(self, candidates: Candidates) -> Outcome:
        """Return the scores of the selected images and the cost per search."""
        count, cost = len(self.prompts), candidates.cost
        reward = candidates.scores.reward.gather(1, candidates.selected[:, None])
        passed = oracle.oracle_scores(candidates.best, self.prompts).passed.float().mean().item()
        return Outcome(
            cost.denoiser_calls / count, cost.reward_calls / count, cost.seconds / count, reward.mean().item(), passed
        )

    def curve(self, num: int, *, eta: float) -> dict[int, Outcome]:
        """Return best-of-n for n = 1, 2, 4 ... up to `num`, from one run."""
        candidates = best_of_n(self.context(eta=eta), self.prompts, generators=self.generators(num))
        texts = [prompt for prompt in self.prompts for _ in range(num)]
        passed = oracle.oracle_scores(candidates.images.flatten(0, 1), texts).passed.float().unflatten(0, (-1, num))
        reward, cost, count = candidates.scores.reward, candidates.cost, num * len(self.prompts)
        rewards, passes = expected_best(reward).mean(0), expected_best(reward, passed).mean(0)

        def outcome(n: int) -> Outcome:
            return Outcome(
                denoiser_calls=cost.denoiser_calls * n / count,
                reward_calls=cost.reward_calls * n / count,
                seconds=cost.seconds * n / count,
                reward=rewards[n - 1].item(),
                passed=passes[n - 1].item(),
            )

        return {n: outcome(n) for n in (1, 2, 4, 8, 16, 32) if n <= num}


def methods(bench: Bench) -> dict[str, Outcome]:
    """Return the outcome of every method with one seed."""
    rows: dict[str, Outcome] = {}
    for eta in (0.0, 1.0):
        rows |= {f"best of {n}, eta {eta:g}": outcome for n, outcome in bench.curve(16, eta=eta).items()}
    for num, keep in ((16, {2: 8, 4: 4}), (16, {1: 8, 2: 4, 4: 2}), (32, {2: 16, 4: 8})):
        pruned = pruned_best_of_n(bench.context(eta=0.0), bench.prompts, keep=keep, generators=bench.generators(num))
        rounds = ", ".join(f"{kept} after {after}" for after, kept in keep.items())
        rows[f"pruned best of {num}: {rounds}"] = bench.outcome(pruned.candidates)
    reward_std = bench.reward_std()
    for num in (8, 16):
        for potential in POTENTIALS:
            rows[f"FK, {num} particles, {potential}"] = bench.outcome(
                bench.steered(num, reward_std=reward_std, potential=potential)
            )
    adaptive = bench.steered(16, reward_std=reward_std, potential="difference", ess_threshold=0.5)
    rows["FK, 16 particles, difference, adaptive"] = bench.outcome(adaptive)
    context = partial(bench.context, eta=0.0)
    for similarity in (0.0, 0.8, 0.95):
        candidates = neighbourhood_search(
            context(), bench.prompts, num_rounds=4, similarity=similarity, generators=bench.generators(4)
        )
        rows[f"noise search, 4 rounds of 4, similarity {similarity:g}"] = bench.outcome(candidates)
    candidates = gradient_search(
        context(), bench.prompts, num_rounds=8, learning_rate=5.0, generators=bench.generators(1)
    )
    rows["noise search by gradient, 8 rounds"] = bench.outcome(candidates)
    return rows


def guided(benches: dict[str, Bench]) -> dict[str, float]:
    """Return the pass rate of one plain sample and of FK steering with each reward."""
    plain = next(iter(benches.values()))
    rows = {"no reward model": plain.curve(1, eta=1.0)[1].passed}
    for name, bench in benches.items():
        candidates = bench.steered(NUM_GUIDED_PARTICLES, reward_std=bench.reward_std(), potential="max")
        rows[name] = bench.outcome(candidates).passed
    return rows


def cell(values: Sequence[float]) -> str:
    """Return the mean, lowest and highest value in percent."""
    low, mean, high = (100 * value for value in (min(values), sum(values) / len(values), max(values)))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def print_methods(seeds: Sequence[dict[str, Outcome]]) -> None:
    """Print the first table."""
    one, sixteen = ([seed[f"best of {n}, eta 0"].passed for seed in seeds] for n in (1, 16))
    gain = sum(sixteen) - sum(one)
    sys.stdout.write("| | denoiser calls | reward calls | seconds | reward | oracle passes | gain of best of 16 |\n")
    sys.stdout.write(f"|{'---|' * 7}\n")
    for name in seeds[0]:
        rows = [seed[name] for seed in seeds]
        first, num = rows[0], len(rows)
        seconds, reward = sum(row.seconds for row in rows) / num, sum(row.reward for row in rows) / num
        fraction = (sum(row.passed for row in rows) - sum(one)) / gain if gain else float("nan")
        sys.stdout.write(
            f"| {name} | {first.denoiser_calls:.0f} | {first.reward_calls:.0f} | {seconds:.2f} | {reward:.2f} "
            f"| {cell([row.passed for row in rows])} | {100 * fraction:.0f} % |\n"
        )


def main() -> None:
    """Search with every method and every seed, and print both tables."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="searches for each prompt and seed")
    parser.add_argument("--prompts", type=int, default=17, help="number of held-out prompts, from the first one")
    parser.add_argument("--reward", default="llava_reward", help="reward of the first table")
    parser.add_argument(
        "--rewards", nargs="+", default=["LLaVA-Reward=llava_reward"], metavar="NAME=REWARD",
        help="rewards of the second table",
    )  # fmt: skip
    tables = ["methods", "guidance"]
    parser.add_argument("--tables", nargs="+", default=tables, choices=tables, help="tables to print")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_policy(TOY_MODEL, device=torch.device("cpu"))
    prompts = load_prompts(TOY_PROMPTS, held_out=True)[: arguments.prompts] * arguments.images_per_prompt
    seeds = range(arguments.seeds)
    if "methods" in arguments.tables:
        reward = load_rewards(arguments.reward, finite=False)
        print_methods([methods(Bench(model, reward, prompts, seed)) for seed in seeds])
        sys.stdout.write("\n")
    if "guidance" in arguments.tables:
        named = (argument.partition("=") for argument in arguments.rewards)
        rewards = {name: load_rewards(reward, finite=False) for name, _, reward in named}
        pass_rates = {
            scale: [
                guided({name: Bench(model, reward, prompts, seed, scale) for name, reward in rewards.items()})
                for seed in seeds
            ]
            for scale in GUIDANCE_SCALES
        }
        sys.stdout.write(f"| guidance | {' | '.join(pass_rates[1.0][0])} |\n|{'---|' * (len(rewards) + 2)}\n")
        for scale, rows in pass_rates.items():
            cells = [cell([row[name] for row in rows]) for name in rows[0]]
            sys.stdout.write(f"| {scale:g} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
