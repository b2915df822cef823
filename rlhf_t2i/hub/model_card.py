"""The model card, README.md: metadata for the Hub, and text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rlhf_t2i.hub.base import Base
from rlhf_t2i.hub.licence import Licence
from rlhf_t2i.hub.usage import TEMPLATES, diffusers_usage, reward_model_usage
from rlhf_t2i.report import Chart
from rlhf_t2i.shapes.names import TOY_PROMPTS
from rlhf_t2i.training.changes import headline, reward_changes, reward_hacking_gap
from rlhf_t2i.training.finished_run import FinishedRun
from rlhf_t2i.training.metrics import Row

_Z_95 = 1.96
"""Half-width of a 95 % confidence interval in standard errors."""


def write_card(
    run: FinishedRun,
    base: Base,
    licence: Licence,
    folder: Path,
    *,
    repo: str | None,
    revision: str | None,
    full_pipeline: bool,
    curves: Sequence[tuple[str, Chart]],
    datasets: Sequence[str],
) -> None:
    """Write README.md into the folder of a publication; its code loads `repo`, or the folder if that is None."""
    name = repo or folder.name
    metadata = _metadata(
        run, base, licence, title=name.rpartition("/")[2], full_pipeline=full_pipeline, datasets=datasets
    )
    text = _text(run, base, licence, name=name, revision=revision, full_pipeline=full_pipeline, curves=curves)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _metadata(
    run: FinishedRun, base: Base, licence: Licence, *, title: str, full_pipeline: bool, datasets: Sequence[str]
) -> ModelCardData:
    is_reward_model = run.kind == "reward_model"
    is_lora = run.kind == "lora" and not full_pipeline
    kind = ["reward-model", "llava-reward"] if base.family is None else [base.family.tag, "reinforcement-learning"]
    results = reward_model_results(run) if is_reward_model else policy_results(run)
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name="rlhf-t2i" if is_reward_model else "diffusers",
        pipeline_tag="image-text-to-text" if is_reward_model else "text-to-image",
        base_model=base.hub_id,
        tags=["rlhf-t2i", run.info["recipe"], *kind, *(["lora"] if is_lora else [])],
        datasets=list(datasets) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=title,
        eval_results=results,
    )
    if base.hub_id is not None:
        data["base_model_relation"] = "adapter" if is_reward_model or is_lora else "finetune"
    return data


def policy_results(run: FinishedRun) -> list[EvalResult]:
    """Return the mean rewards of a run's last evaluation in the Hub's format."""
    prompts, last = run.config["evaluation_prompts"] or "held-out prompts", run.evaluations[-1]
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name="built-in held-out prompts" if prompts == TOY_PROMPTS else Path(prompts).name,
            metric_type=name,
            metric_name=f"{name} ({'trained on' if name in run.trained_on else 'held out'})",
            metric_value=last[name],
            metric_args={"standard_error": last[key], "num_images": last["num_images"]},
        )
        for key in last
        if (name := key.removesuffix("/standard_error")) != key and math.isfinite(last[name])
    ]


def reward_model_results(run: FinishedRun) -> list[EvalResult]:
    """Return the metrics of a reward model on each of its data sets in the Hub's format."""
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="preferences",
            dataset_name=name,
            dataset_config=name,
            metric_type=metric["name"],
            metric_value=metric["value"],
            metric_args={key: metric[key] for key in ("low", "high", "count") if metric[key] is not None},
        )
        for name, metrics in run.reward_metrics.items()
        for metric in metrics
        if math.isfinite(metric["value"])
    ]


def _text(
    run: FinishedRun,
    base: Base,
    licence: Licence,
    *,
    name: str,
    revision: str | None,
    full_pipeline: bool,
    curves: Sequence[tuple[str, Chart]],
) -> str:
    """Return the card below its metadata; `name` is what its code loads, a Hub id or a folder."""
    arguments: dict[str, Any] = {
        "title": name.rpartition("/")[2],
        "run": run,
        "base": base,
        "is_reward_model": run.kind == "reward_model",
        "needs_package": base.hub_id is None and not full_pipeline,
        "curves": curves,
        "warnings": licence.warnings,
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True).strip(),
    }
    if run.kind == "reward_model":
        arguments |= {
            "summary": _reward_model_summary(run),
            "usage": reward_model_usage(run, name, revision=revision),
        }
    else:
        usage, first_image = diffusers_usage(run, base, name, revision=revision, full_pipeline=full_pipeline)
        arguments |= {
            "summary": headline(run.rows),
            "usage": usage,
            "first_image": first_image,
            "rows": reward_rows(run),
            "diversity": [run.evaluations[i]["diversity"] for i in (0, -1)],
            "held_out_summary": held_out_summary(run),
            "num_images": run.evaluations[-1]["num_images"],
        }
    return TEMPLATES.get_template("model_card.md.jinja").render(arguments)


def reward_rows(run: FinishedRun) -> list[Row]:
    """Return a table row for each reward, with the 95 % confidence interval of its change.

    interval = change ± 1.96 * sqrt(before_error^2 + after_error^2), which treats the evaluations as independent
    """
    first, last = run.evaluations[0], run.evaluations[-1]
    rows: list[Row] = []
    for change in reward_changes(run.rows):
        difference, decimals = last[change.name] - first[change.name], len(change.difference.partition(".")[2])
        half_width = _Z_95 * math.hypot(*(row[f"{change.name}/standard_error"] for row in (first, last)))
        rows.append(
            {
                "change": change,
                "role": "trained on" if change.name in run.trained_on else "held out",
                "interval": f"{difference - half_width:+.{decimals}f} to {difference + half_width:+.{decimals}f}",
            }
        )
    return rows


def held_out_summary(run: FinishedRun) -> str:
    """Return sentences that compare the gain of a reward that was trained on with that of a held-out reward."""
    gap = reward_hacking_gap(run.rows)
    if gap is None:
        return (
            "No held-out reward was evaluated, so it is unknown how much of the gain is real: training on a learned "
            "reward can exploit its errors."
        )
    (_, trained, error), (_, held_out, _) = gap.trained_gains[-1], gap.held_out_gains[-1]
    if not abs(trained) > 3 * error > 0:
        conclusion = f"The change of {gap.trained} is within noise, so the comparison says little."
    elif trained > 0:
        conclusion = (
            f"{gap.held_out} confirms {held_out / trained:.0%} of the gain of {gap.trained}; the rest may be reward "
            f"hacking."
        )
    else:
        conclusion = f"{gap.trained} fell, although it was trained on."
    return f"{gap.sentence}. {conclusion}"


def _reward_model_summary(run: FinishedRun) -> str:
    results = [
        f"{rows[0]['name']} {rows[0]['value']:.3f} on {name}" for name, rows in run.reward_metrics.items() if rows
    ]
    return f"A LLaVA-Reward reward model: it scores how well an image fits a prompt. {', '.join(results)}"


def _cell(value: Any) -> str:
    """Return text that is safe in a cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


TEMPLATES.filters["cell"] = _cell
