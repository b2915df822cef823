"""Evaluate a reward model: its scores against human preferences and labels.

    accelerate launch recipes/evaluate_reward_model.py --reward PATH --test_data pairs.jsonl
    accelerate launch recipes/evaluate_reward_model.py --reward PATH --benchmarks hpdv2:data/HPDv2

PATH is the folder that recipes/train_reward_model.py wrote, such as runs/reward_model-DATE/reward_model.

Prints a table for each data file (accuracy under three rules for ties, calibration, F1 of both classes, AUROC, each
with a 95 % interval) and writes it as CSV, with a page of where the model fails: accuracy by tag, kind of prompt and
rating gap, calibration, scores, and the most confident mistakes with maps of the model's attention, or with what each
token of the prompt contributed to its likelihood. Published benchmarks (docs/benchmarks.md) are evaluated under every
rule that papers use, and written as Markdown and JSON.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.evaluate_reward_model import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from reward_model.attention import why_no_map
from reward_model.benchmarks import Result, evaluate, load_benchmarks, to_json, to_markdown
from reward_model.benchmarks.breakdown import Breakdown, break_down
from reward_model.benchmarks.evaluation import (
    Mistake,
    record_metrics,
    score_in_parts,
    with_explanations,
    worst_mistakes,
)
from reward_model.benchmarks.metrics import Metric, to_csv, to_table
from reward_model.benchmarks.report import render_report
from reward_model.datasets import load_records
from reward_model.datasets.formats import source_name
from reward_model.datasets.table import RecordTable
from reward_model.datasets.usable import usable_records
from reward_model.scorers import PointwiseScorer, is_known, load_scorer
from reward_model.scoring import LlavaReward
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import BENCHMARK_RESULTS, BENCHMARK_TABLES, REPORT, reward_model_of
from rlhf_t2i.settings.lists import names
from rlhf_t2i.shapes.names import TOY_PAIRS, toy_pairs_folder
from rlhf_t2i.training.claim import keep_folder
from rlhf_t2i.training.run import Run, start_run


def main(config: Config) -> dict[str, list[Metric]]:
    """Evaluate on all data and benchmarks; print and write the metrics, and return them by name of the set."""
    run = start_run(
        {**asdict(config), "resume": False, "trackers": "", "keep_checkpoints": 0}, recipe="reward_model_evaluation"
    )
    if run.num_processes > 1:
        raise ValueError(
            f"A reward model is evaluated in one process, not in {run.num_processes}; "
            f"launch with accelerate_configs/single.yaml."
        )
    reward = load_reward(config, run)
    metrics: dict[str, list[Metric]] = {}
    if config.test_data or not config.benchmarks:
        metrics |= evaluate_on_data(reward, config, run.folder)
    if config.benchmarks:
        for result in evaluate_on_benchmarks(reward, config, run.folder):
            metrics[result.benchmark.name] = list(result.metrics)
    run.close()
    return metrics


def load_reward(config: Config, run: Run) -> LlavaReward | PointwiseScorer:
    """Load the reward model on the device of the run."""
    if is_known(config.reward):
        if config.quantization:
            raise ValueError(f"quantization is {config.quantization}; it must be null for {config.reward!r}.")
        return load_scorer(config.reward).to(run.device)
    dtype = run.dtype if config.mixed_precision else None
    return LlavaReward.from_pretrained(
        reward_model_of(config.reward), dtype=dtype, quantization=config.quantization, device=run.device
    )


def evaluate_on_data(reward: LlavaReward | PointwiseScorer, config: Config, folder: Path) -> dict[str, list[Metric]]:
    """Evaluate on each data file; write NAME.csv and the report."""
    metrics: dict[str, list[Metric]] = {}
    mistakes: dict[str, list[Mistake]] = {}
    breakdowns: dict[str, Breakdown] = {}
    for name, records in load_data(config, folder).items():
        skipped = folder / "skipped.jsonl" if config.on_bad_record == "skip" else None
        backbone = reward.model.backbone if isinstance(reward, LlavaReward) else None
        usable = partial(usable_records, backbone=backbone, skipped=skipped)
        scores = score_in_parts(reward, records, batch_size=config.microbatch_size, usable=usable)
        metrics[name], breakdowns[name] = record_metrics(scores), break_down(scores)
        keep_folder(folder)
        write_atomically(folder / f"{name}.csv", to_csv(metrics[name]))
        mistakes[name] = with_explanations(reward, worst_mistakes(scores, count=config.num_shown))
        tqdm.write(f"{name}\n{to_table(metrics[name])}\n")
    write_atomically(
        folder / REPORT, render_report(config.reward, metrics, mistakes, breakdowns, no_map=why_no_map(reward))
    )
    tqdm.write(f"tables    {folder}/*.csv\nreport    {folder / REPORT}")
    return metrics


def evaluate_on_benchmarks(reward: LlavaReward | PointwiseScorer, config: Config, folder: Path) -> list[Result]:
    """Evaluate on each published test set; write benchmarks.md and benchmarks.json.

    All test sets are loaded and checked before the first image is scored.
    """
    root = Path(config.image_root) if config.image_root else None
    benchmarks = [one for name in names(config.benchmarks) for one in load_benchmarks(name, image_root=root)]
    results: list[Result] = []
    keep_folder(folder)
    for benchmark in benchmarks:
        result = evaluate(
            reward, benchmark, threshold=config.tie_threshold, label_threshold=config.label_threshold,
            batch_size=config.microbatch_size, num_resamples=config.num_resamples, seed=config.seed,
        )  # fmt: skip
        results.append(result)
        tqdm.write(f"{benchmark.name}\n{to_table(result.metrics)}\n")
    write_atomically(folder / BENCHMARK_TABLES, to_markdown(config.reward, results))
    write_atomically(folder / BENCHMARK_RESULTS, to_json(config.reward, results, settings=asdict(config)))
    tqdm.write(f"benchmarks    {folder / BENCHMARK_TABLES}, {BENCHMARK_RESULTS}")
    return results


def load_data(config: Config, folder: Path) -> dict[str, RecordTable]:
    """Load the records of each data file, by its name; those of the toy world if none is given."""
    sources = names(config.test_data or "")
    if config.test_data in (None, TOY_PAIRS):
        from rlhf_t2i.shapes.pairs import TESTS, write_pairs

        pairs = write_pairs(toy_pairs_folder(config.seed), seed=config.seed)
        sources = [str(pairs / f"{name}.jsonl") for name in TESTS]
    by_name = {source_name(source): source for source in sources}
    if len(by_name) < len(sources) or not by_name:
        raise ValueError(f"test_data is {config.test_data!r}; give one or more files with different names.")
    no_preference = Counter[str]()
    records = {
        name: load_records(
            source, image_root=config.image_root, image_prefix=config.image_prefix,
            on_bad_record=config.on_bad_record, skipped=folder / "skipped.jsonl", without_preference=no_preference,
            streaming=config.streaming,
        )
        for name, source in by_name.items()
    }  # fmt: skip
    for reason, count in no_preference.items():
        tqdm.write(f"{count:,} rows state no preference: {reason}")
    return records


if __name__ == "__main__":
    run_command(main, config)
