"""How good is a judge? Its answers against what people preferred.

    accelerate launch recipes/evaluate_reward_model.py --judge runs/judge-DATE/judge --data pairs.jsonl

Prints a table for each data file (accuracy under three rules for ties, calibration, F1 of both classes, AUROC, each
with a 95 % interval), and writes it as CSV beside a page that shows the pairs the judge got most wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from rlhf_t2i.config import names, parse_config

if TYPE_CHECKING:
    from reward_model.measuring import Answers, Mistake
    from reward_model.metrics import Metric
    from reward_model.types import Record


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields in the order of the flow."""

    judge: str = "shapes"
    """A folder or Hub id of a LLaVA-Reward judge, or the built-in one (shapes)."""
    data: str = "shapes"
    """Comma-separated FORMAT:PLACE (docs/data.md); a file .jsonl is of our own format, .json as published with
    LLaVA-Reward. Or the built-in world's pairs (shapes)."""
    image_root: str | None = None
    """Where relative image paths start; null is each data file's own folder. No picture may lie outside of it."""
    image_prefix: str | None = None
    """OLD=NEW: image paths that start with the folder OLD are read as if they started with NEW."""
    unpack_folder: str = "runs/pictures"
    """Where pictures are written that lie within tables and archives."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Stop at a bad record, or leave it out and write it to skipped.jsonl in the run folder."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Of the backbone; null is what it had in training. Scores are float32."""
    batch_size: int = 64
    num_shown: int = 24
    """Pairs on the page: those that the judge got most wrong."""
    seed: int = 0
    """Of the built-in world's pairs."""
    run_folder: str | None = None
    """Null is runs/judge-evaluation-DATE."""
    num_cpu_threads: int = 0
    """On a CPU; 0 shares all cores among the processes."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        for name, least in (("batch_size", 1), ("num_shown", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def main(config: Config) -> dict[str, list[Metric]]:
    """Ask the judge about every record, measure, print and write."""
    from reward_model.measuring import ask, metrics_of, mistakes  # these take seconds
    from reward_model.metrics import table, to_csv
    from reward_model.report import page
    from reward_model.scoring import LlavaReward
    from rlhf_t2i.rewards.learned import BUILT_IN_JUDGE
    from rlhf_t2i.run import start_run

    run = start_run(
        {**asdict(config), "resume": False, "trackers": "", "keep_checkpoints": 0}, recipe="judge-evaluation"
    )
    if run.num_processes > 1:
        raise ValueError(f"A judge is measured by one process; there are {run.num_processes}. Launch with single.yaml.")
    source = BUILT_IN_JUDGE if config.judge == "shapes" else config.judge
    judge = LlavaReward.from_pretrained(source, dtype=run.dtype if config.mixed_precision else None, device=run.device)
    found: dict[str, list[Metric]] = {}
    wrong: dict[str, list[Mistake]] = {}
    for name, records in load(config, run.folder).items():
        answers: Answers = ask(judge, records, batch_size=config.batch_size)
        found[name], wrong[name] = metrics_of(answers), mistakes(answers, count=config.num_shown)
        (run.folder / f"{name}.csv").write_text(to_csv(found[name]))
        tqdm.write(f"{name}\n{table(found[name])}\n")
    report = run.folder / "report.html"
    report.write_text(page(str(source), found, wrong), encoding="utf-8")
    tqdm.write(f"tables    {run.folder}/*.csv\nreport    {report}")
    run.close()
    return found


def load(config: Config, folder: Path) -> dict[str, list[Record]]:
    """The records of each data file, by its name."""
    from reward_model.datasets import load_records
    from reward_model.datasets.formats import name_of

    sources = names(config.data)
    if config.data == "shapes":
        from rlhf_t2i.shapes.pairs import TESTS, write_pairs

        made = write_pairs(Path("runs") / f"shapes-pairs-{config.seed}", seed=config.seed)
        sources = [str(made / f"{name}.jsonl") for name in TESTS]
    named = {name_of(source): source for source in sources}
    if len(named) < len(sources) or not named:
        raise ValueError(f"data is {config.data!r}; name one or more files with names of their own.")
    unused = Counter[str]()
    found = {
        name: load_records(
            source, image_root=config.image_root, image_prefix=config.image_prefix, unpack_to=config.unpack_folder,
            on_bad_record=config.on_bad_record, skipped=folder / "skipped.jsonl", unused=unused,
        )
        for name, source in named.items()
    }  # fmt: skip
    for reason, count in unused.items():
        tqdm.write(f"{count:,} rows say nothing: {reason}")
    return found


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
