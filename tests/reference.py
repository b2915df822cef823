"""Slow references of the formulas: loops over Python floats, with nothing shared with the tested code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Rows = Sequence[Sequence[float]]


def ddim(
    clean: np.ndarray,
    noise: np.ndarray,
    alpha: Sequence[float],
    sigma: Sequence[float],
    next_alpha: Sequence[float],
    next_sigma: Sequence[float],
    *,
    eta: float,
) -> tuple[np.ndarray, list[float]]:
    """Return mean and std of a DDIM step (arXiv:2010.02502, Eq. 12 and 16)."""
    mean, stds = np.zeros(clean.shape, dtype=np.float64), []
    for b in range(len(clean)):
        variance = (next_sigma[b] ** 2 / sigma[b] ** 2) * (1 - alpha[b] ** 2 / next_alpha[b] ** 2)
        std = eta * math.sqrt(max(variance, 0.0))
        direction = math.sqrt(max(next_sigma[b] ** 2 - std**2, 0.0))
        for index in np.ndindex(clean.shape[1:]):
            mean[(b, *index)] = next_alpha[b] * float(clean[(b, *index)]) + direction * float(noise[(b, *index)])
        stds.append(std)
    return mean, stds


def mean_log_prob(x: np.ndarray, mean: np.ndarray, std: Sequence[float]) -> list[float]:
    """Return log N(x; mean, std^2), averaged over dimensions; 0 without noise."""
    result = []
    for b in range(len(x)):
        if std[b] == 0:
            result.append(0.0)
            continue
        total, count = 0.0, 0
        for value, middle in zip(x[b].ravel(), mean[b].ravel(), strict=True):
            total += math.log(
                math.exp(-((float(value) - float(middle)) ** 2) / (2 * std[b] ** 2)) / (std[b] * math.sqrt(2 * math.pi))
            )
            count += 1
        result.append(total / count)
    return result


def mean_kl(mean: np.ndarray, other_mean: np.ndarray, std: Sequence[float]) -> list[float]:
    """Return KL(N(mean, std^2) || N(other_mean, std^2)), averaged over dimensions; 0 without noise."""
    result = []
    for b in range(len(mean)):
        if std[b] == 0:
            result.append(0.0)
            continue
        total, count = 0.0, 0
        for p, q in zip(mean[b].ravel(), other_mean[b].ravel(), strict=True):
            total += (float(p) - float(q)) ** 2 / (2 * std[b] ** 2)
            count += 1
        result.append(total / count)
    return result


def clipped_surrogate(
    log_prob: Sequence[float], old_log_prob: Sequence[float], advantage: Sequence[float], *, clip_range: float
) -> float:
    """Return PPO's clipped surrogate loss (arXiv:1707.06347, Eq. 7)."""
    total = 0.0
    for new, old, a in zip(log_prob, old_log_prob, advantage, strict=True):
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
        total += min(ratio * a, clipped * a)
    return -total / len(log_prob)


def standardised(values: Sequence[float], among: Sequence[float]) -> list[float]:
    """Return each value's distance from the mean of `among` in standard deviations; 0 if those are all equal."""
    mean = math.fsum(among) / len(among)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in among) / len(among))
    return [0.0 if std < 1e-6 else (value - mean) / std for value in values]


def group_relative(rewards: Rows) -> list[list[float]]:
    """Standardise each row by itself."""
    return [standardised(row, row) for row in rewards]


def whole_batch(rewards: Rows) -> list[list[float]]:
    """Standardise each row by all rows."""
    everything = [value for row in rewards for value in row]
    return [standardised(row, everything) for row in rewards]


def per_prompt_history(
    steps: Sequence[tuple[Sequence[str], Rows]], *, size: int, min_count: int
) -> list[list[list[float]]]:
    """Return DDPO's advantages of each step, each computed from all steps so far without stored state."""
    result = []
    for now, (prompts, rewards) in enumerate(steps):
        advantages = whole_batch(rewards)
        for index, prompt in enumerate(prompts):
            past = [
                value
                for step_prompts, step_rewards in steps[: now + 1]
                for other, row in zip(step_prompts, step_rewards, strict=True)
                if other == prompt
                for value in row
            ]
            recent = past[-size:]
            if len(recent) >= min_count:
                advantages[index] = standardised(rewards[index], recent)
        result.append(advantages)
    return result


def log_potentials(rewards: Sequence[float], *, potential: str, strength: float) -> list[float]:
    """Return the log-potentials of a particle (arXiv:2501.06848); its last reward is that of the finished image."""
    result = []
    for t in range(len(rewards) - 1):
        if potential == "difference":
            value = rewards[t] - (rewards[t - 1] if t else 0.0)
        elif potential == "max":
            value = max(rewards[: t + 1])
        else:
            value = sum(rewards[: t + 1])
        result.append(strength * value)
    return [*result, strength * rewards[-1] - sum(result)]


def effective_sample_size(log_weights: Sequence[float]) -> float:
    """Return 1 / sum of squared normalised weights."""
    weights = [math.exp(value - max(log_weights)) for value in log_weights]
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)


def systematic_resample(log_weights: Sequence[float], offset: float) -> list[int]:
    """Return the parent of each of K children: the particle at which the running weight passes (k + offset) / K."""
    weights = [math.exp(value - max(log_weights)) for value in log_weights]
    parents, particle, upto = [], 0, weights[0]
    for k in range(len(weights)):
        while not (k + offset) / len(weights) * sum(weights) < upto:
            particle += 1
            upto += weights[particle]
        parents.append(particle)
    return parents


def expected_best(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Return the mean, over all sets of n images, of the value of the image with the highest score."""
    sets = list(itertools.combinations(range(len(scores)), n))
    return sum(values[max(chosen, key=lambda i: scores[i])] for chosen in sets) / len(sets)


def mean_squared_error(predicted: np.ndarray, target: np.ndarray) -> list[float]:
    """Return the squared difference of each image, averaged over dimensions."""
    result = []
    for p, q in zip(predicted, target, strict=True):
        squares = [(float(a) - float(b)) ** 2 for a, b in zip(p.ravel(), q.ravel(), strict=True)]
        result.append(math.fsum(squares) / len(squares))
    return result


def diffusion_dpo(
    winner: Sequence[float],
    loser: Sequence[float],
    reference_winner: Sequence[float],
    reference_loser: Sequence[float],
    *,
    beta: float,
    dpop_weight: float = 0.0,
) -> float:
    """Return the Diffusion-DPO loss (arXiv:2311.12908, Eq. 14, with the factor 1/2), plus DPO-Positive's penalty."""
    total = 0.0
    for w, l, rw, rl in zip(winner, loser, reference_winner, reference_loser, strict=True):  # noqa: E741
        penalty = dpop_weight * max(0.0, w - rw)
        inside = -0.5 * beta * (((w - l) - (rw - rl)) + penalty)
        total += math.log(1 / (1 + math.exp(-inside)))
    return -total / len(winner)


def ancestral(
    clean: np.ndarray,
    noise: np.ndarray,
    alpha: Sequence[float],
    sigma: Sequence[float],
    next_alpha: Sequence[float],
    next_sigma: Sequence[float],
    *,
    eta: float,
) -> tuple[np.ndarray, list[float]]:
    """Return mean and std of a step with eta times the noise of q(x' | x, clean), from that posterior's variance."""
    mean, stds = np.zeros(clean.shape, dtype=np.float64), []
    for b in range(len(clean)):
        step_alpha = alpha[b] / next_alpha[b]
        added = sigma[b] ** 2 - step_alpha**2 * next_sigma[b] ** 2
        # The precision of x' adds that of its level and that of x = step_alpha x' + noise.
        variance = 1 / (1 / next_sigma[b] ** 2 + step_alpha**2 / added) if next_sigma[b] else 0.0
        std = eta * math.sqrt(variance)
        direction = math.sqrt(max(next_sigma[b] ** 2 - std**2, 0.0))
        for index in np.ndindex(clean.shape[1:]):
            mean[(b, *index)] = next_alpha[b] * float(clean[(b, *index)]) + direction * float(noise[(b, *index)])
        stds.append(std)
    return mean, stds


def flow_sde(
    x: np.ndarray,
    velocity: np.ndarray,
    sigma: Sequence[float],
    next_sigma: Sequence[float],
    *,
    noise_scale: float,
    sigma_cap: float,
) -> tuple[np.ndarray, list[float]]:
    """Return mean and std of Flow-GRPO's step as in the authors' code, with a negative dt."""
    mean, stds = np.zeros(x.shape, dtype=np.float64), []
    for b in range(len(x)):
        dt = next_sigma[b] - sigma[b]
        std_t = noise_scale * math.sqrt(sigma[b] / (1 - (sigma_cap if sigma[b] == 1 else sigma[b])))
        for index in np.ndindex(x.shape[1:]):
            at, v = float(x[(b, *index)]), float(velocity[(b, *index)])
            mean[(b, *index)] = (
                at * (1 + std_t**2 / (2 * sigma[b]) * dt) + v * (1 + std_t**2 * (1 - sigma[b]) / (2 * sigma[b])) * dt
            )
        stds.append(std_t * math.sqrt(-dt))
    return mean, stds


def cps(
    x: np.ndarray,
    velocity: np.ndarray,
    sigma: Sequence[float],
    next_sigma: Sequence[float],
    *,
    noise_scale: float,
) -> tuple[np.ndarray, list[float]]:
    """Return mean and std of a coefficients-preserving step, from latents and velocity."""
    mean, stds = np.zeros(x.shape, dtype=np.float64), []
    for b in range(len(x)):
        std = next_sigma[b] * math.sin(noise_scale * math.pi / 2)
        for index in np.ndindex(x.shape[1:]):
            at, v = float(x[(b, *index)]), float(velocity[(b, *index)])
            clean, noise = at - sigma[b] * v, at + (1 - sigma[b]) * v
            mean[(b, *index)] = (1 - next_sigma[b]) * clean + math.sqrt(next_sigma[b] ** 2 - std**2) * noise
        stds.append(std)
    return mean, stds


def globally_scaled(rewards: Rows) -> list[list[float]]:
    """Return the distance from the mean of a row, in standard deviations of all values; a row of equals gets zeros."""
    everything = [r for row in rewards for r in row]
    middle = sum(everything) / len(everything)
    std = math.sqrt(sum((r - middle) ** 2 for r in everything) / len(everything))
    return [[0.0 if len({*row}) == 1 else (r - sum(row) / len(row)) / std for r in row] for row in rewards]


def negative_aware(
    new: np.ndarray, old: np.ndarray, clean: np.ndarray, optimality: Sequence[float], *, beta: float
) -> float:
    """Return the DiffusionNFT loss (arXiv:2509.16117, Eq. 5), each error divided by its mean absolute value."""
    total = 0.0
    for n, o, c, r in zip(new, old, clean, optimality, strict=True):
        for guess, weight in ((beta * n + (1 - beta) * o, r), ((1 + beta) * o - beta * n, 1 - r)):
            errors = [float(a) - float(b) for a, b in zip(guess.ravel(), c.ravel(), strict=True)]
            squared, absolute = (sum(g(e) for e in errors) / len(errors) for g in (lambda e: e * e, abs))
            total += weight * squared / max(absolute, 1e-5) / beta
    return total / len(new)
