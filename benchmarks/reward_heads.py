"""Compare heads of a reward model on one frozen backbone: `python benchmarks/reward_heads.py train`.

Every head (`reward_heads_variants.py`) is trained with the same LoRA and projector on the same preference pairs of
compositions (`rlhf_t2i.shapes.compositions`), with as many steps, and tested on prompts that neither it nor the
captioner has read, also in renderings without new labels. The frozen vision tower's outputs are computed once an image.

`train` appends one row for each trained model to a JSONL file and skips those that are there, the most telling first;
it can be stopped and started again. `table` prints Markdown from the file.
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
from dataclasses import dataclass
from functools import cache
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
from benchmarks.reward_heads_judge import attention_on_things, judge_candidates, judge_pairs, log_odds
from benchmarks.reward_heads_table import print_table
from benchmarks.reward_heads_variants import VARIANTS, SkipCa, Variant
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

STEPS = {500: 60, 2_000: 120, 8_000: 240}
"""Optimiser steps by number of pairs."""
BATCH = 32
"""Pairs in a step."""
LEARNING_RATE = 2e-3
LORA_RANK = 16


def fit(model: RewardModel, variant: Variant, data: Encoded, *, num_steps: int, seed: int) -> None:
    """Train LoRA, projector and head by Bradley-Terry on the pairs, in random order; cosine schedule with warm-up."""
    model.set_trainable(("lora", "projector"))
    parameters = [p for p in (*model.parameters(), *variant.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
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
    odds = {name: judge_pairs(model, variant, data) for name, (_, data) in tests.pairs.items()}
    seconds = time.process_time() - start
    best = expected_best(judge_candidates(model, variant, tests.candidates), tests.passed.float()).mean(dim=0)
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
        "best_of": [round(float(rate), 4) for rate in best],
        "ms_per_score": round(500 * seconds / sum(len(pairs) for pairs, _ in tests.pairs.values()), 3),
    }


def run(cell: dict[str, Any], folder: Path, training: Encoded, tests: Tests) -> dict[str, Any]:
    """Train one model and return its row."""
    torch.manual_seed(cell["seed"])
    model = RewardModel(load_backbone(str(folder)))
    width, kind = model.backbone.width, model.model.config.model_type
    config = RewardModelConfig(
        backbone=str(folder), model_type=kind, width=width, skip_ca=False, lora_rank=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
    )  # fmt: skip
    model.add(config, seed=cell["seed"])
    variant = VARIANTS[cell["head"]](model.backbone)
    count = sum(p.numel() for p in variant.parameters())
    start = time.process_time()
    model.train()
    fit(model, variant, training, num_steps=STEPS[cell["pairs"]], seed=cell["seed"])
    seconds = time.process_time() - start
    found = evaluate(model, variant, tests)
    return {**cell, **found, "head_parameters": count, "steps": STEPS[cell["pairs"]], "cpu_seconds": round(seconds, 1)}


def train(arguments: argparse.Namespace) -> None:
    """Train all models that are asked for and have no row yet."""
    torch.set_num_threads(1)
    done = [json.loads(line) for line in read_lines(arguments.rows)]
    folders = {"built-in": TOY_BACKBONE_FOLDER, **dict(one.split("=", 1) for one in arguments.backbones)}
    marks = {name: weights_mark(Path(folder)) for name, folder in folders.items()}
    cells: Any = product(folders if arguments.built_in else list(folders)[1:], arguments.noise, arguments.pairs)
    for name, noise, count in cells:

        @cache
        def tests(folder: str = str(folders[name])) -> Tests:
            return make_tests(load_backbone(folder))

        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            training = None
            for head in arguments.heads:
                cell = {"backbone": name, "weights": marks[name], "head": head, "pairs": count, "wrong_labels": noise,
                        "seed": seed}  # fmt: skip
                if any(cell.items() <= row.items() for row in done):
                    continue
                if training is None:
                    pairs = with_wrong_labels(strict_pairs(count, "training", seed=seed), noise, seed=seed)
                    training = encode_pairs(load_backbone(str(folders[name])), pairs)
                row = run(cell, Path(folders[name]), training, tests())
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                total = [sum(column) for column in zip(*row["right"]["flat"].values(), strict=True)]
                sys.stderr.write(f"{cell}: {100 * total[0] / total[1]:.1f} % in {row['cpu_seconds']} s\n")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; none if it is not there."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def weights_mark(folder: Path) -> str:
    """Return the start of the SHA-256 of a backbone's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def main() -> None:
    """Train or print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("action", choices=["train", "table", "ceiling"], help="what to do")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="file of the rows")
    parser.add_argument("--backbones", nargs="*", default=["captioner=runs/captioner"], help="NAME=FOLDER of backbones")
    parser.add_argument("--built_in", action="store_true", help="also the built-in reward model's backbone")
    parser.add_argument("--heads", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="heads")
    parser.add_argument(
        "--pairs", nargs="+", type=int, default=[500, 2_000], choices=list(STEPS), help="training pairs"
    )
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0], help="fractions of wrong labels")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first_seed", type=int, default=0, help="first seed")
    arguments = parser.parse_args()
    match arguments.action:
        case "train":
            train(arguments)
        case "table":
            print_table([json.loads(line) for line in read_lines(arguments.rows)])
        case _:
            sys.stdout.write(json.dumps(ceiling(), indent=1) + "\n")


if __name__ == "__main__":
    main()
