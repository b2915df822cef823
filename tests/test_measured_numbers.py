"""No table, report or card has a number that was not measured."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reward_model.benchmarks.domains import accuracy_by_domain
from reward_model.benchmarks.metrics import Metric, gap_metrics, label_metrics, pair_metrics, to_rows, to_table
from reward_model.benchmarks.report import render_report
from reward_model.benchmarks.rules import comparison_metrics, scored_pairs
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from rlhf_t2i.annotation.agreement import kappa_estimate
from rlhf_t2i.hub.model_card import policy_results, reward_model_results, reward_rows
from rlhf_t2i.output.text_table import align
from rlhf_t2i.report.charts import charts
from rlhf_t2i.report.checks import check_diversity
from rlhf_t2i.report.comparison import side_by_side, write_comparison
from rlhf_t2i.report.page import write_report
from rlhf_t2i.search.records import formatted
from rlhf_t2i.training.changes import before_after, compare, diversity_change, headline
from rlhf_t2i.training.evaluation import Evaluation
from rlhf_t2i.training.metrics import Row, rate_text
from tests.publications import two_evaluations
from tests.report_files import add_grids, run_folder, train

# --- images ---------------------------------------------------------------------------------------


def evaluation_of(prompts: list[str]) -> Evaluation:
    images = torch.rand(len(prompts), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Evaluation(prompts, list(range(len(prompts))), images, {"oracle": torch.arange(float(len(prompts)))})


def rows_of(prompts: list[str]) -> list[Row]:
    """Two evaluations of these prompts, as a run without a measured diversity or error has them."""
    summary = evaluation_of(prompts).summary()
    first, last = (
        {"kind": "evaluation", "step": i, "num_images": len(prompts), **summary, "elapsed": 1.0} for i in (0, 1)
    )
    return json.loads(json.dumps([first, train(1, elapsed=1.0), last]))


def test_one_image_a_prompt_has_no_diversity() -> None:
    """It was 0.000, which reads as a collapse to one image."""
    evaluation = evaluation_of(["a fox", "a hen"])
    assert evaluation.summary().keys() == {"oracle", "oracle/standard_error"}
    assert "diversity" not in evaluation.text()
    rows = rows_of(["a fox", "a hen"])
    assert "diversity" not in before_after(rows)
    assert diversity_change(rows) is None
    assert "diversity" not in {chart.title for chart in charts(rows)}
    finding = check_diversity(rows, {})
    assert (finding.state, "two images of the same prompt" in finding.observed) == ("unknown", True)


def test_one_image_has_no_standard_error() -> None:
    """It was nan, with a warning of torch."""
    evaluation = evaluation_of(["a fox"])
    assert evaluation.summary() == {"oracle": 0.0, "oracle/standard_error": None}
    assert evaluation.text() == "oracle 0.000"
    rows = rows_of(["a fox"])
    assert "nan" not in before_after(rows) + headline(rows)
    assert re.search(r"oracle +0\.000 +0\.000 +\+0\.000  unknown\n", before_after(rows))


def test_pages_of_unmeasured_numbers_have_none(tmp_path: Path) -> None:
    rows = rows_of(["a fox"])
    folder = run_folder(tmp_path, rows, config="learning_rate: 0.001\nlora_rank: 4\nseed: 3\n")
    add_grids(folder, [("a fox", 0)], ["step_000000.png", "step_000001.png"], columns=1)
    page = write_report(folder).read_text()
    write_comparison(side_by_side([folder]), tmp_path / "comparison.html")
    for text in (page, (tmp_path / "comparison.html").read_text()):
        shown = re.sub(r"<style>.*?</style>|<svg.*?</svg>|url\([^)]*\)", "", text, flags=re.S)
        assert not re.search(r"\bnan\b|<(td|th)>diversity<", shown, re.IGNORECASE)


def test_a_card_of_unmeasured_numbers_has_none() -> None:
    run = two_evaluations(trained=0.3, held_out=0.0)
    rows: list[Row] = [
        {key: None if key.endswith("/standard_error") else value for key, value in row.items()} for row in run.rows
    ]
    run = replace(run, rows=rows, config={"evaluation_prompts": "p.txt"})
    assert {row["interval"] for row in reward_rows(run)} == {"unknown"}
    assert [result.metric_args for result in policy_results(run)] == [{"num_images": 100}] * 2


# --- negative zeros, columns, rates ---------------------------------------------------------------


def test_no_number_is_minus_zero() -> None:
    change = compare("r", {"r": 0.00001, "r/standard_error": 0.5}, {"r": -0.00001, "r/standard_error": 0.5})
    assert (change.before, change.after, change.difference) == ("0.00 ± 0.50", "0.00 ± 0.50", "+0.00")
    assert change.z_text == "0.0 (within noise)"
    assert formatted(-0.0001, 0.5) == "0.000 ± 0.500"
    metric = Metric("pearson", -0.00001, -0.00002, 0.5, 3, "")
    for text in (to_table([metric]), render_report("mine", {"x": [metric]}, {"x": []})):
        assert "0.0000" in text
        assert "-0.0000" not in text
    rows = two_evaluations(trained=-0.00001, held_out=0.0).rows
    assert not re.search(r"[-\N{MINUS SIGN}]0\.0+\b(?!\d)", before_after(rows) + headline(rows))
    [trained, _] = reward_rows(two_evaluations(trained=0.098, held_out=0.0))
    assert trained["interval"] == "+0.000 to +0.196"


def test_columns_do_not_run_together() -> None:
    name = "llava_reward:/somewhere/with/a/long/name/reward_model"
    rows = json.loads(json.dumps(two_evaluations(trained=0.3, held_out=0.0).rows).replace("llava_reward", name))
    table = before_after(rows).split("\n")[:4]
    assert all(len(re.split(r"  +", line.strip())) == 5 for line in table[1:3])
    assert len({line.index("±") for line in table[1:3]}) == 1
    assert align([("", "a"), ("long name", "1")]) == ["           a", "long name  1"]


@pytest.mark.parametrize(
    ("images", "seconds", "texts"),
    [(1, 40.0, ["0.025 images/s"]), (64, 1.0, ["64 images/s"]), (50_000, 2.0, ["25,000 images/s"]), (8, 0.0, [])],
)
def test_a_rate_has_three_digits_or_is_left_out(images: int, seconds: float, texts: list[str]) -> None:
    """It was "0 images/s" for less than half an image a second, and 8,000,000,000 without a time."""
    assert rate_text(images, seconds) == texts


def test_one_search_has_no_standard_error() -> None:
    assert formatted(0.5, math.nan) == "0.500"
    assert formatted(math.nan, math.nan) == "not finite"


# --- intervals ------------------------------------------------------------------------------------


def by_name(metrics: list[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


WILSON_2_OF_2 = (0.3424, 1.0)
"""1 / (1 + z^2 / 2) with z = 1.96."""


def test_two_right_pairs_do_not_prove_that_all_are() -> None:
    """The bootstrap, which can only draw right ones, said 1.0 .. 1.0."""
    found = by_name(pair_metrics([1.0, 2.0], [1, 1], num_resamples=20))
    for name in ("accuracy_ties_wrong", "accuracy_ties_dropped"):
        assert (found[name].low, found[name].high) == pytest.approx(WILSON_2_OF_2, abs=1e-4)
        assert "Wilson's interval" in found[name].note
    assert found["accuracy_ties_wrong"].value == 1
    wrong = by_name(pair_metrics([-1.0, -2.0], [1, 1], num_resamples=20))["accuracy_ties_wrong"]
    assert (wrong.low, wrong.high) == pytest.approx((0, 1 - WILSON_2_OF_2[0]), abs=1e-4)


def test_fractions_of_labels_count_their_own_images() -> None:
    """3 images are good, 2 are bad, all are predicted so."""
    labels = [1, 1, 1, 0, 0]
    found = by_name(label_metrics([2.0, 2, 2, -2, -2], labels, np.array([0.9, 0.9, 0.9, 0.1, 0.1]), num_resamples=20))
    assert found["recall_bad"].low == found["precision_bad"].low == pytest.approx(WILSON_2_OF_2[0], abs=1e-4)
    assert found["recall_good"].low == pytest.approx(3 / (3 + 1.96**2), abs=1e-3)
    for name in ("f1_good", "auroc"):
        assert (found[name].low, found[name].high) == (None, None)
        assert "no interval: all resamples give the same value" in found[name].note


def test_a_correlation_of_two_pairs_has_no_interval() -> None:
    found = by_name(gap_metrics([1.0, 2.0], [1.0, 3.0], num_resamples=20))
    assert (found["pearson"].value, found["pearson"].low) == (pytest.approx(1), None)


def test_intervals_over_prompts_count_prompts() -> None:
    """4 right pairs of 2 prompts are 2 trials."""
    pairs = scored_pairs([1.0, 2, 3, 4], [1, 1, 1, 1], ["a", "a", "b", "b"])
    found = by_name(comparison_metrics(pairs, num_resamples=20))
    for name in ("accuracy_ties_wrong", "accuracy_per_prompt", "agreement_per_prompt"):
        assert (found[name].low, found[name].high) == pytest.approx(WILSON_2_OF_2, abs=1e-4)
    items = [Item(Path(f"{i}"), "a fox", group=str(i // 2)) for i in range(4)]
    benchmark = Benchmark(name="x", rule="", items=items, comparisons=[Comparison(0, 1, 1), Comparison(2, 3, 1)])
    [domain, *_] = accuracy_by_domain(benchmark, np.ones(2), num_resamples=20)
    assert (domain.accuracy.low, domain.accuracy.high) == pytest.approx(WILSON_2_OF_2, abs=1e-4)


def test_agreement_on_all_of_a_few_questions_has_no_interval() -> None:
    """It was 1.00 [1.00, 1.00] after two answers."""
    assert str(kappa_estimate(np.array([[1, 0], [0, 1]]))) == "1.00"
    assert str(kappa_estimate(np.array([[5, 1], [1, 5]]))).startswith("0.67 [")


def test_an_undefined_metric_is_no_nan_on_a_page_or_in_json() -> None:
    undefined = Metric("auroc", math.nan, None, None, 3, "undefined: one class")
    assert json.dumps(to_rows([undefined]), allow_nan=False)
    page = render_report("mine", {"test": [undefined]}, {"test": []})
    assert "nan" not in page.partition("<table>")[2]
    run: Any = replace(two_evaluations(trained=0.0, held_out=None), reward_metrics={"test": to_rows([undefined])})
    assert reward_model_results(run) == []
