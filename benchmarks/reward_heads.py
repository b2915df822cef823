"""Compare heads of a reward model on one frozen backbone: `python benchmarks/reward_heads.py train`.

Every head (`reward_heads_variants.py`) is trained with the same LoRA and projector on the same preference pairs of
compositions (`rlhf_t2i.shapes.compositions`), with as many steps, and tested on prompts that neither it nor the
captioner has read, also in renderings without new labels. The frozen vision tower's outputs are computed once an image.

    tune     trains each head with each learning rate and keeps its accuracy on new images of training prompts
    train    trains each head with its best learning rate and tests it
    policy   trains each head that has scores, and a policy by DDPO on them
    table    prints Markdown, `plot` draws

The first three append one row for each trained model to a JSONL file and skip those that are there; they can be stopped
and started again.
"""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from benchmarks.reward_heads_data import Encoded, ceiling, encode, encode_pairs, samples, test_sets
from benchmarks.reward_heads_policy import train_policy
from benchmarks.reward_heads_scores import (
    attention_on_things,
    candidate_scores,
    log_odds,
    pair_log_odds,
    rightly_ordered,
)
from benchmarks.reward_heads_table import print_tables
from benchmarks.reward_heads_variants import VARIANTS, WITHOUT_SCORES, SkipCa, Variant
from reward_model.backbones.load import load_backbone
from reward_model.benchmarks.classification import auroc, pair_calibration_error
from reward_model.config import RewardModelConfig
from reward_model.losses import preference_losses
from reward_model.model import RewardModel
from reward_model.types import Backbone
from rlhf_t2i.search.candidates import expected_best
from rlhf_t2i.shapes.composition_pairs import CompositionPairs, strict_pairs, with_wrong_labels
from rlhf_t2i.shapes.compositions import TIERS
from rlhf_t2i.shapes.names import TOY_BACKBONE_FOLDER

STEPS = {0: 0, 500: 300, 2_000: 600, 8_000: 1_200}
"""Optimiser steps by number of pairs; with none a head is tested untrained."""
BATCH = 32
"""Pairs in a step."""
LEARNING_RATES = [1e-3, 4e-4, 2e-3]
"""Tried by `tune`; the first is the default."""
LORA_RANK = 16
TUNING_SEED, VALIDATION_SEED = 1_000, 1_001
NUM_VALIDATION = 350
"""Pairs by which a learning rate is chosen."""


def fit(
    model: RewardModel, variant: Variant, data: Encoded, *, num_steps: int, learning_rate: float, seed: int
) -> None:
    """Train LoRA, projector and head by Bradley-Terry on the pairs, in random order; cosine schedule with warm-up."""
    model.set_trainable(("lora", "projector"))
    parameters = [p for p in (*model.parameters(), *variant.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = max(1, round(0.03 * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / num_steps)) / 2
    )
    rng, order, num_pairs = np.random.default_rng([seed, 5]), list[int](), len(data.prompts) // 2
    for _ in range(num_steps):
        if len(order) < BATCH:
            order += rng.permutation(num_pairs).tolist()
        rows, order = torch.tensor(order[:BATCH]), order[BATCH:]
        logits = log_odds(model, variant, data, rows, rows + num_pairs)
        loss = preference_losses(logits, torch.zeros(len(rows), dtype=torch.bool)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@dataclass(frozen=True, slots=True)
class Tests:
    """What every model is tested on, encoded by one backbone."""

    pairs: dict[str, tuple[CompositionPairs, Encoded]]
    candidates: Encoded
    passed: Bool[Tensor, "P 16"]


def make_tests(backbone: Backbone) -> Tests:
    """Encode the test sets and the candidates."""
    found = samples()
    pairs = {name: (pairs, encode_pairs(backbone, pairs)) for name, pairs in test_sets()}
    return Tests(pairs, encode(backbone, found.images, found.prompts), found.passed)


def evaluate(model: RewardModel, variant: Variant, tests: Tests) -> dict[str, Any]:
    """Return the counts of right pairs by domain and tier, the pass rate of best of 16, and the other measures."""
    model.eval()
    variant.eval()
    start = time.process_time()
    odds = {name: pair_log_odds(model, variant, data) for name, (_, data) in tests.pairs.items()}
    seconds = time.process_time() - start
    candidates = candidate_scores(model, variant, tests.candidates)
    best = expected_best(candidates, tests.passed.float()).mean(dim=0)
    right: dict[str, dict[str, list[int]]] = {}
    for name, (pairs, _) in tests.pairs.items():
        if name != "ties":
            hits = {tier: (odds[name] > 0)[np.array([t == tier for t in pairs.tiers])] for tier in TIERS}
            right[name] = {tier: [int(hit.sum()), len(hit)] for tier, hit in hits.items() if len(hit)}
    strict, tied = np.abs(odds["flat"]), np.abs(odds["ties"])
    labels = np.concatenate([np.ones(len(strict), int), np.zeros(len(tied), int)])
    probe: dict[str, Any] = {}
    if isinstance(variant, SkipCa):
        pairs, data = tests.pairs["flat"]
        probe["attention_on_things"], probe["area_of_things"] = attention_on_things(
            model, variant, data, torch.cat([pairs.winners, pairs.losers])
        )
    return {
        **probe,
        "right": right,
        "bits": np.packbits(odds["flat"] > 0).tobytes().hex(),
        "calibration_error": round(float(pair_calibration_error(odds["flat"])), 4),
        "auroc_strict_from_ties": round(float(auroc(np.concatenate([strict, tied]), labels)), 4),
        "samples": round(rightly_ordered(candidates, tests.passed), 4),
        "best_of": [round(float(rate), 4) for rate in best],
        "ms_per_score": round(500 * seconds / sum(len(pairs) for pairs, _ in tests.pairs.values()), 3),
    }


def trained(cell: dict[str, Any], folder: Path, training: Callable[[], Encoded]) -> tuple[RewardModel, Variant, float]:
    """Return a trained model with its head, and the CPU seconds of its training."""
    torch.manual_seed(cell["seed"])
    model = RewardModel(load_backbone(str(folder)))
    width, kind = model.backbone.width, model.model.config.model_type
    config = RewardModelConfig(
        backbone=str(folder), model_type=kind, width=width, skip_ca=False, lora_rank=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
    )  # fmt: skip
    model.add(config, seed=cell["seed"])
    variant = VARIANTS[cell["head"]](model.backbone)
    data = training() if cell["pairs"] else None
    start = time.process_time()
    model.train()
    if data is not None:
        steps, rate = STEPS[cell["pairs"]], cell["learning_rate"]
        fit(model, variant, data, num_steps=steps, learning_rate=rate, seed=cell["seed"])
    return model, variant, time.process_time() - start


def tune(arguments: argparse.Namespace) -> None:
    """Train each head with each learning rate, and test it on new images of training prompts."""
    num_pairs = arguments.pairs[0]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for (name, folder), number in product(backbones(arguments), seeds):
        seed = TUNING_SEED + 10 * number
        backbone = load_backbone(str(folder))
        training = partial(encode_pairs, backbone, strict_pairs(num_pairs, "training", seed=seed))
        validation = encode_pairs(backbone, strict_pairs(NUM_VALIDATION, "training", seed=VALIDATION_SEED))
        for head, rate in product(arguments.heads, arguments.learning_rates):
            cell = {**name, "head": head, "pairs": num_pairs, "learning_rate": rate, "seed": seed}
            if is_new(cell, arguments.tuning):
                model, variant, _ = trained(cell, folder, training)
                model.eval()
                variant.eval()
                right = float((pair_log_odds(model, variant, validation) > 0).mean())
                append({**cell, "steps": STEPS[num_pairs], "accuracy": round(right, 4)}, arguments.tuning)


def train(arguments: argparse.Namespace) -> None:
    """Train all models that are asked for and have no row yet; test each, and DDPO with it if that is asked for."""
    in_policy = arguments.action == "policy"
    noises: list[float] = arguments.noise
    for (name, folder), noise in product(backbones(arguments), noises):

        @cache
        def tests(folder: Path = folder) -> Tests:
            return make_tests(load_backbone(str(folder)))

        for count, seed in product(
            arguments.pairs, range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        ):

            @cache
            def training(folder: Path = folder, count: int = count, noise: float = noise, seed: int = seed) -> Encoded:
                pairs = with_wrong_labels(strict_pairs(count, "training", seed=seed), noise, seed=seed)
                return encode_pairs(load_backbone(str(folder)), pairs)

            for head in (head for head in arguments.heads if not (in_policy and head in WITHOUT_SCORES)):
                cell = {**name, "head": head, "pairs": count, "wrong_labels": noise, "seed": seed}
                untuned = arguments.learning_rates[0] if arguments.untuned else None
                cell["learning_rate"] = untuned or best_rate(arguments.tuning, name, head)
                if is_new(cell, path := arguments.policies if in_policy else arguments.rows):
                    model, variant, seconds = trained(cell, folder, training)
                    found = train_policy(model, variant, seed=seed) if in_policy else evaluate(model, variant, tests())
                    num = sum(p.numel() for p in variant.parameters())
                    more = {"head_parameters": num, "steps": STEPS[count], "cpu_seconds": round(seconds, 1)}
                    append({**cell, **found, **more}, path)


def backbones(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield name and mark of each backbone with its folder."""
    folders = {"built-in": str(TOY_BACKBONE_FOLDER)} if arguments.built_in else {}
    for name, folder in {**folders, **dict(one.split("=", 1) for one in arguments.backbones)}.items():
        weights = hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()[:12]
        yield {"backbone": name, "weights": weights}, Path(folder)


def best_rate(tuning: Path, backbone: dict[str, Any], head: str) -> float:
    """Return the learning rate with the best mean accuracy of a head, or of SkipCA for a head that was not tuned."""
    rows = [row for row in read_rows(tuning) if backbone.items() <= row.items()]
    own = [row for row in rows if row["head"] == head] or [row for row in rows if row["head"] == "SkipCA"]
    found: dict[float, list[float]] = {rate: [] for rate in LEARNING_RATES[:1]}
    for row in own:
        found.setdefault(row["learning_rate"], []).append(row["accuracy"])
    return max(found, key=lambda rate: np.mean(found[rate] or [0.0]))


def rate_of(row: dict[str, Any], tuning: Path) -> float:
    """Return the learning rate that was chosen for the head of a row."""
    return best_rate(tuning, {key: row[key] for key in ("backbone", "weights")}, row["head"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def is_new(cell: dict[str, Any], path: Path) -> bool:
    """Return True if a file has no row of this cell."""
    return not any(cell.items() <= row.items() for row in read_rows(path))


def append(row: dict[str, Any], path: Path) -> None:
    """Add a row to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    sys.stderr.write(f"{', '.join(f'{key} {row[key]}' for key in ('backbone', 'head', 'pairs', 'seed'))}: done\n")


def main() -> None:
    """Train or print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    actions = ["tune", "train", "policy", "table", "plot", "ceiling"]
    parser.add_argument("action", choices=actions, help="what to do")
    for name, what in (("rows", "trained heads"), ("tuning", "learning rates"), ("policies", "trained policies")):
        file = Path(__file__).with_name(f"reward_heads_{name}.jsonl")
        parser.add_argument(f"--{name}", type=Path, default=file, help=f"file of the {what}")
    parser.add_argument("--backbones", nargs="*", default=["captioner=runs/captioner"], help="NAME=FOLDER of backbones")
    parser.add_argument("--built_in", action="store_true", help="also the built-in reward model's backbone")
    parser.add_argument("--heads", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="heads")
    parser.add_argument("--pairs", nargs="+", type=int, default=[2_000], choices=list(STEPS), help="training pairs")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0], help="fractions of wrong labels")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first_seed", type=int, default=0, help="first seed")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=LEARNING_RATES, help="those that tune tries")
    parser.add_argument("--untuned", action="store_true", help="train with the first of --learning_rates")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="folder of the plots")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    match arguments.action:
        case "tune":
            tune(arguments)
        case "train" | "policy":
            train(arguments)
        case "table":
            print_tables(read_rows(arguments.rows), read_rows(arguments.policies))
        case "plot":
            from benchmarks.reward_heads_plots import plot_all

            rows = [row for row in read_rows(arguments.rows) if row["learning_rate"] == rate_of(row, arguments.tuning)]
            plot_all(rows, read_rows(arguments.policies), arguments.plots, pairs=arguments.pairs[0])
        case _:
            sys.stdout.write(json.dumps(ceiling(), indent=1) + "\n")


if __name__ == "__main__":
    main()
