"""The model card, README.md: metadata for the Hub, and text for people."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rlhf_t2i.data.prompt_files import HUB_PREFIX
from rlhf_t2i.hub.base import Base
from rlhf_t2i.hub.licence import Licence
from rlhf_t2i.hub.usage import TEMPLATES, diffusers_usage, reward_model_usage
from rlhf_t2i.report import Chart
from rlhf_t2i.shapes.names import TOY_PROMPT_SETS
from rlhf_t2i.training.changes import diversity_change, headline, reward_changes, reward_hacking_gap
from rlhf_t2i.training.finished_run import FinishedRun
from rlhf_t2i.training.metrics import ERROR, Row, number, reward_names

_Z_95 = 1.96
"""Half-width of a 95 % confidence interval in standard errors."""
_MARKUP = re.compile(r"[\x00-\x1f\x7f`<]")


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
    shown = prompts.removeprefix(HUB_PREFIX) if prompts.startswith(HUB_PREFIX) else Path(prompts).name
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name="built-in held-out prompts" if prompts in TOY_PROMPT_SETS else shown,
            metric_type=name,
            metric_name=f"{name} ({'trained on' if name in run.trained_on else 'held out'})",
            metric_value=last[name],
            metric_args={**_measured("standard_error", last[name + ERROR]), "num_images": last["num_images"]},
        )
        for name in reward_names([last])
        if math.isfinite(last[name])
    ]


def _measured(name: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {name: value}


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
        if metric["value"] is not None
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
        "command": shell_text(run.info["command"]),
        "config": yaml_text(run.config),
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
            "diversity": diversity_change(run.rows),
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
        half_width = _Z_95 * math.hypot(*(number(row, change.name + ERROR) for row in (first, last)))
        ends = (f"{end:+z.{decimals}f}" for end in (difference - half_width, difference + half_width))
        rows.append(
            {
                "change": change,
                "role": "trained on" if change.name in run.trained_on else "held out",
                "interval": " to ".join(ends) if half_width > 0 else "unknown",
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
            f"{gap.held_out} confirms {held_out / trained:z.0%} of the gain of {gap.trained}; the rest may be reward "
            f"hacking."
        )
    else:
        conclusion = f"{gap.trained} fell, although it was trained on."
    return f"{gap.sentence}. {conclusion}"


def _reward_model_summary(run: FinishedRun) -> str:
    firsts = {name: rows[0] for name, rows in run.reward_metrics.items() if rows and rows[0]["value"] is not None}
    results = [f"{first['name']} {first['value']:.3f} on {name}" for name, first in firsts.items()]
    return ". ".join(
        ["A LLaVA-Reward reward model: it scores how well an image fits a prompt", *filter(None, [", ".join(results)])]
    )


def shell_text(command: str) -> str:
    """Return a command in one line that neither ends a block of code nor starts a tag of HTML.

    Words with line breaks, other control characters, backticks or < are quoted as $'...', which shells read back.
    """
    if not _MARKUP.search(command):
        return command
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without its end
        words = [command]
    return " ".join(_ansi_quoted(word) if _MARKUP.search(word) else shlex.quote(word) for word in words)


def _ansi_quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _MARKUP.sub(lambda found: f"\\x{ord(found[0]):02x}", escaped) + "'"


def yaml_text(config: Mapping[str, Any]) -> str:
    """Return settings as YAML that neither ends a block of code nor starts a tag of HTML."""
    text = yaml.dump(dict(config), Dumper=_CardDumper, sort_keys=False, allow_unicode=True).strip()
    return text.replace("`", "\\x60").replace("<", "\\x3C")


class _CardDumper(yaml.SafeDumper):
    """Dump texts with backticks or < in double quotes, in which they can be escaped."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if re.search("[`<]", text) else None)


_CardDumper.add_representer(str, _represent_text)


def _inline(value: Any) -> str:
    """Return text that is safe within a line of Markdown."""
    return " ".join(str(value).split()).replace("<", "&lt;").replace("`", "'")


def _cell(value: Any) -> str:
    """Return text that is safe in a cell of a Markdown table."""
    return _inline(value).replace("|", "\\|")


TEMPLATES.filters |= {"cell": _cell, "inline": _inline}
