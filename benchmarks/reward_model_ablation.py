"""Ablation of the built-in reward model, with several seeds: `python benchmarks/reward_model_ablation.py`.

Each row of the table changes one option of recipes/configs/reward_shapes.yaml with the published architecture
(`--readout last_token`); all rows have as many steps. Prints Markdown: the accuracy on held-out pairs, as the mean over
the seeds and their range.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf_t2i.shapes.names import toy_pairs_folder

ROOT = Path(__file__).parent.parent
VARIANTS: dict[str, dict[str, str]] = {
    "last token with SkipCA": {},
    "without SkipCA": {"skip_ca": "false"},
    "likelihood of the prompt, as shipped": {"readout": "prompt_likelihood"},
    "LoRA only, as published": {"lora_only": "true"},
    "general preference": {"loss": "general_preference"},
    "cross-entropy": {"loss": "cross_entropy"},
    "without generated pairs": {"train_data": "{pairs}/train_drawn.jsonl"},
    "without drawn pairs": {"train_data": "{pairs}/train_generated.jsonl"},
}
SETS = {"test_drawn": "drawings", "test_generated": "generated images", "test_relation": "relations"}


def train(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train with the recipe in a process of its own, unless that is done; return the accuracy in % on each test set."""
    folder = arguments.output_folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    pairs = arguments.pairs
    options = {
        "config": ROOT / "recipes" / "configs" / "reward_shapes.yaml",
        "readout": "last_token",
        "train_data": f"{pairs}/train_drawn.jsonl,{pairs}/train_generated.jsonl",
        "validation_data": f"{pairs}/validation.jsonl",
        "test_data": ",".join(f"{pairs}/{test}.jsonl" for test in SETS),
        "num_steps": arguments.num_steps,
        "num_cpu_threads": 1,
        "seed": seed,
        "run_folder": folder,
        **{key: value.format(pairs=pairs) for key, value in VARIANTS[name].items()},
    }
    if arguments.backbone:
        options["backbone"] = arguments.backbone
    if not (folder / "metrics.json").is_file():
        command = [sys.executable, str(ROOT / "recipes" / "train_reward_model.py")]
        command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        command += ["--resume"] if (folder / "config.yaml").is_file() else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        arguments.output_folder.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("a") as log:
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    metrics = json.loads((folder / "metrics.json").read_text())
    values = {test: {row["name"]: row["value"] for row in rows} for test, rows in metrics.items()}
    return {words: 100 * values[test]["accuracy_ties_wrong"] for test, words in SETS.items()}


def main() -> None:
    """Train all variants, `--jobs` at a time, and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, default=toy_pairs_folder(0), help="toy pairs, made if they are not there")
    parser.add_argument("--backbone", default="", help="folder or Hub id of another backbone")
    parser.add_argument("--output_folder", type=Path, default=Path("runs/reward_model_ablation"), help="folder of runs")
    parser.add_argument("--num_steps", type=int, default=300, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="rows")
    arguments = parser.parse_args()
    if not (arguments.pairs / "test_generated.jsonl").is_file():
        from rlhf_t2i.shapes.pairs import write_pairs

        write_pairs(arguments.pairs)
    chosen: list[str] = arguments.variants
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = {(n, s): pool.submit(train, n, s, arguments) for s in range(arguments.seeds) for n in chosen}
    sys.stdout.write(f"| | {' | '.join(SETS.values())} |\n|---|{'---|' * len(SETS)}\n")
    for name in chosen:
        found = [jobs[name, seed].result() for seed in range(arguments.seeds)]
        cells = []
        for words in SETS.values():
            values = [each[words] for each in found]
            cells.append(f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
