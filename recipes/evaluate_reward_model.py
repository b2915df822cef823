"""How good is a judge? Its answers against what people preferred.

    accelerate launch recipes/evaluate_reward_model.py --reward runs/reward_model-DATE/reward_model --test_data pairs.jsonl
    accelerate launch recipes/evaluate_reward_model.py --reward runs/reward_model-DATE/reward_model --benchmarks hpdv2:data/HPDv2

Prints a table for each data file (accuracy under three rules for ties, calibration, F1 of both classes, AUROC, each
with a 95 % interval), and writes it as CSV beside a page that shows the pairs the judge got most wrong. Published test
sets (`docs/benchmarks.md`) are measured under every rule in use; their tables are written as Markdown and as JSON.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.evaluate_reward_model import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from rlhf_t2i.config import names

if TYPE_CHECKING:
    from reward_model.benchmarks import Result
    from reward_model.benchmarks.evaluation import Mistake, RecordScores
    from reward_model.benchmarks.metrics import Metric
    from reward_model.scorers import PointwiseScorer
    from reward_model.scoring import LlavaReward
    from reward_model.types import Record
    from rlhf_t2i.training.run import Run


def main(config: Config) -> dict[str, list[Metric]]:
    """Ask the judge about every record, measure, print and write."""
    from rlhf_t2i.training.run import start_run

    run = start_run(
        {**asdict(config), "resume": False, "trackers": "", "keep_checkpoints": 0}, recipe="reward_model_evaluation"
    )
    if run.num_processes > 1:
        raise ValueError(f"A judge is measured by one process; there are {run.num_processes}. Launch with single.yaml.")
    judge = load_reward_model(config, run)
    found: dict[str, list[Metric]] = {}
    if config.test_data or not config.benchmarks:
        found |= measure_data(judge, config, run.folder)
    if config.benchmarks:
        for result in measure_benchmarks(judge, config, run.folder):
            found[result.benchmark.name] = list(result.metrics)
    run.close()
    return found


def load_reward_model(config: Config, run: Run) -> LlavaReward | PointwiseScorer:
    """The judge that the config names, on the run's device."""
    from reward_model import scorers

    if scorers.is_known(config.reward):
        return scorers.load_scorer(config.reward).to(run.device)
    from reward_model.scoring import LlavaReward
    from rlhf_t2i.shapes.names import TOY_REWARD_MODEL_FOLDER

    source = TOY_REWARD_MODEL_FOLDER if config.reward == "shapes" else config.reward
    return LlavaReward.from_pretrained(source, dtype=run.dtype if config.mixed_precision else None, device=run.device)


def measure_data(judge: LlavaReward | PointwiseScorer, config: Config, folder: Path) -> dict[str, list[Metric]]:
    """Our own metrics of each data file, as CSV and on a page with the worst mistakes."""
    from reward_model.benchmarks.evaluation import record_metrics, score_records, worst_mistakes  # these take seconds
    from reward_model.benchmarks.metrics import to_csv, to_table
    from reward_model.benchmarks.report import render_report

    found: dict[str, list[Metric]] = {}
    wrong: dict[str, list[Mistake]] = {}
    for name, records in load(config, folder).items():
        answers: RecordScores = score_records(judge, records, batch_size=config.microbatch_size)
        found[name], wrong[name] = record_metrics(answers), worst_mistakes(answers, count=config.num_shown)
        (folder / f"{name}.csv").write_text(to_csv(found[name]))
        tqdm.write(f"{name}\n{to_table(found[name])}\n")
    report = folder / "report.html"
    report.write_text(render_report(config.reward, found, wrong), encoding="utf-8")
    tqdm.write(f"tables    {folder}/*.csv\nreport    {report}")
    return found


def measure_benchmarks(judge: LlavaReward | PointwiseScorer, config: Config, folder: Path) -> list[Result]:
    """Every rule on each published test set, as Markdown and as JSON; all are read before the first is judged."""
    from reward_model.benchmarks import evaluate, load_benchmarks, to_json, to_markdown
    from reward_model.benchmarks.metrics import to_table

    root = Path(config.image_root) if config.image_root else None
    wanted = [one for name in names(config.benchmarks) for one in load_benchmarks(name, image_root=root)]
    results: list[Result] = []
    for benchmark in wanted:
        result = evaluate(
            judge, benchmark, threshold=config.tie_threshold, label_threshold=config.label_threshold,
            batch_size=config.microbatch_size, num_resamples=config.num_resamples, seed=config.seed,
        )  # fmt: skip
        results.append(result)
        tqdm.write(f"{benchmark.name}\n{to_table(result.metrics)}\n")
    (folder / "benchmarks.md").write_text(to_markdown(config.reward, results), encoding="utf-8")
    (folder / "benchmarks.json").write_text(to_json(config.reward, results, settings=asdict(config)), encoding="utf-8")
    tqdm.write(f"benchmarks    {folder}/benchmarks.md, benchmarks.json")
    return results


def load(config: Config, folder: Path) -> dict[str, list[Record]]:
    """The records of each data file, by its name."""
    from reward_model.datasets import load_records
    from reward_model.datasets.formats import source_name

    sources = names(config.test_data or "")
    if config.test_data in (None, "shapes"):
        from rlhf_t2i.shapes.pairs import TESTS, write_pairs

        made = write_pairs(Path("runs") / f"shapes-pairs-{config.seed}", seed=config.seed)
        sources = [str(made / f"{name}.jsonl") for name in TESTS]
    named = {source_name(source): source for source in sources}
    if len(named) < len(sources) or not named:
        raise ValueError(f"test_data is {config.test_data!r}; name one or more files with names of their own.")
    no_preference = Counter[str]()
    found = {
        name: load_records(
            source, image_root=config.image_root, image_prefix=config.image_prefix, unpack_to=config.unpack_folder,
            on_bad_record=config.on_bad_record, skipped=folder / "skipped.jsonl", without_preference=no_preference,
        )
        for name, source in named.items()
    }  # fmt: skip
    for reason, count in no_preference.items():
        tqdm.write(f"{count:,} rows state no preference: {reason}")
    return found


if __name__ == "__main__":
    main(config)
