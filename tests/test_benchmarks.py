"""Each published test set in its own layout, with metrics worked out by hand under every rule."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_model.benchmarks import (
    BENCHMARK_NAMES,
    Result,
    evaluate,
    load_benchmarks,
    rules,
    score_items,
    tables,
    to_json,
    to_markdown,
)
from reward_model.benchmarks.domains import length_class, prompt_styles
from reward_model.benchmarks.rules import best_tie_threshold, comparison_metrics, rating_metrics, scored_pairs
from reward_model.datasets import BadRecordError
from reward_model.images import to_tensor
from tests.reward_models import load

FOX, CAT = "a red fox", "a very small blue cat that sleeps on a photo of a chair"


class Redness:
    """Scores an image by its mean red value, from 0 to 255, and counts the images it scores."""

    def __init__(self) -> None:
        self.num_scored = 0

    def score(self, images: Sequence[Any], prompts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        assert len(images) == len(prompts)
        self.num_scored += len(images)
        return torch.stack([255 * to_tensor(image)[0].mean() for image in images])


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_images(folder: Path, **reds: int) -> None:
    """Write NAME.png for each red value; __ in a name stands for a slash."""
    for name, red in reds.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(red))


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def metric_values(specification: str, **options: Any) -> dict[str, dict[str, float]]:
    """Return the values of the metrics of every benchmark, by name."""
    found = [evaluate(Redness(), one, num_resamples=20, **options) for one in load_benchmarks(specification)]
    return {result.benchmark.name: {metric.name: metric.value for metric in result.metrics} for result in found}


# --- ranked images ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "images", "ranks"), [("image_reward", "generations", "ranking"), ("hpdv2", "image_path", "rank")]
)
def test_ranked_images_by_hand(name: str, images: str, ranks: str, tmp_path: Path) -> None:
    """Fox: ranks 1, 2, 2, 5 and scores 10, 10, 5, 7; of five strict pairs three are right, one is tied, one reversed.

    Cat: one pair, right. The scores of the tied pair differ by 5.
    """
    write_images(tmp_path, a=10, b=10, c=5, d=7, e=9, f=8)
    rows = [
        {"id": "x", "prompt": FOX, images: ["a.png", "b.png", "c.png", "d.png"], ranks: [1, 2, 2, 5]},
        {"id": "y", "prompt": CAT, images: ["e.png", "f.png"], ranks: [1, 2], "raw_annotations": []},
    ]
    write(tmp_path / "test.json", rows)
    found = metric_values(f"{name}:{tmp_path}")[name]
    assert found["accuracy_ties_wrong"] == 4 / 6
    assert found["accuracy_ties_dropped"] == 4 / 5
    assert found["accuracy_ties_half"] == 4.5 / 6
    assert found["accuracy_per_prompt"] == pytest.approx((3 / 5 + 1) / 2)
    assert found["agreement_per_prompt"] == pytest.approx((5 / 6 + 1) / 2)
    assert found["agreement_half_ties"] == pytest.approx((0.5 + 1 + 1 + 0.5 + 1 + 0 + 1) / 7)
    assert found["accuracy_first_wins"] == 4 / 6
    assert math.isnan(found["accuracy_second_wins"])


def test_a_higher_threshold_ties_more_pairs(tmp_path: Path) -> None:
    """Differences of 2, 3 and 5: each is a tie from its threshold on."""
    write_images(tmp_path, a=10, b=8, c=5)
    write(tmp_path / "test.json", [{"prompt": FOX, "generations": ["a.png", "b.png", "c.png"], "ranking": [1, 2, 3]}])
    values = [
        metric_values(f"image_reward:{tmp_path}", threshold=t)["image_reward"]["accuracy_ties_wrong"]
        for t in (0.0, 2.0, 5.0)
    ]
    assert values == [1, 2 / 3, 0]


def test_images_of_hpdv2_are_found_in_test(tmp_path: Path) -> None:
    write_images(tmp_path / "test", a=1, b=2)
    write(tmp_path / "test.json", [{"prompt": FOX, "image_path": ["a.png", "b.png"], "rank": [1, 0]}])
    assert metric_values(f"hpdv2:{tmp_path}")["hpdv2"]["accuracy_ties_wrong"] == 1


# --- pairs ----------------------------------------------------------------------------------------


def test_hpdv3_prefers_the_first_image_and_has_two_forms_of_unknown_confidence(tmp_path: Path) -> None:
    """Two of three are right; the confidence is a domain and changes no metric."""
    write_images(tmp_path, a=9, b=1)
    rows = [
        {"prompt": FOX, "path1": "a.png", "path2": "b.png", "confidence": None, "model1": "flux", "model2": "sdxl"},
        {"prompt": FOX, "path1": "b.png", "path2": "a.png", "confidence": "null", "model1": "sdxl", "model2": "flux"},
        {"prompt": CAT, "path1": "a.png", "path2": "b.png", "confidence": 0.97, "choice_dist": [9, 1]},
    ]
    write(tmp_path / "benchmark_Animals.json", rows)
    (benchmark,) = load_benchmarks(f"hpdv3:{tmp_path / 'benchmark_Animals.json'}")
    scorer = Redness()
    result = evaluate(scorer, benchmark, num_resamples=20)
    assert {metric.name: metric.value for metric in result.metrics}["accuracy_ties_wrong"] == 2 / 3
    assert scorer.num_scored == 4  # two of the six images occur twice with one prompt
    assert by_domain(result, "confidence") == {"not known": (1 / 2, 2), "0.95 and more": (1, 1)}
    assert by_domain(result, "model") == {"flux": (1 / 2, 2), "sdxl": (1 / 2, 2)}


def test_hpdv3_plus_plus_has_a_test_set_for_each_question_with_images_of_the_whole_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images", a=9, b=1)
    (tmp_path / "test").mkdir()
    right = {"path1": "images/a.png", "path2": "images/b.png", "prompt": FOX}
    write(tmp_path / "test" / "test_aes.json", [right])
    write(tmp_path / "test" / "test_tf.json", [right, {**right, "path1": "images/b.png", "path2": "images/a.png"}])
    found = metric_values(f"hpdv3_plus_plus:{tmp_path}")
    accuracies = {name: metrics["accuracy_ties_wrong"] for name, metrics in found.items()}
    assert accuracies == {"hpdv3_plus_plus-aesthetics": 1, "hpdv3_plus_plus-text_fidelity": 0.5}


def mmrb2_pair(chosen: str, changed: dict[str, Any] | None = None) -> dict[str, Any]:
    """A pair of two images by flux, of which the first is redder, as `t2i.json` has it."""
    sides = {
        f"response_{side}": {"model_name": "flux", "response_content": [["image", f"images/{side}.png"]]}
        for side in "ab"
    }
    metadata = {"id": "1", "category": "Biology"}
    prompt = {"prompt_content": [["text", FOX]], "prompt_source": "wise", "prompt_metadata": metadata}
    return {"id": "x", **prompt, **sides, "chosen": chosen, **(changed or {})}


def test_mmrb2_reads_pairs_of_the_task_text_to_image(tmp_path: Path) -> None:
    write_images(tmp_path / "images", a=9, b=1)
    write(tmp_path / "t2i.json", {"pairs": [mmrb2_pair("A"), mmrb2_pair("A"), mmrb2_pair("B")]})
    (benchmark,) = load_benchmarks(f"mmrb2:{tmp_path}")
    result = evaluate(Redness(), benchmark, num_resamples=20)
    assert {metric.name: metric.value for metric in result.metrics}["accuracy_ties_wrong"] == 2 / 3
    assert by_domain(result, "category") == {"Biology": (2 / 3, 3)}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"chosen": "C"}, "'chosen' is 'C'; it must be A or B"),
        ({"response_a": 3}, "'response_a' is 3; it must be an object"),
        ({"prompt_content": [["text", FOX], ["image", "images/a.png"]]}, "text-to-image has one text"),
        ({"response_b": {"response_content": [["text", "no"]]}}, "'response_b' has .* text-to-image has one image"),
    ],
)
def test_an_invalid_pair_of_mmrb2_is_refused_with_its_number(changed: dict[str, Any], why: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images", a=9, b=1)
    write(tmp_path / "t2i.json", {"pairs": [mmrb2_pair("A"), mmrb2_pair("A", changed)]})
    with pytest.raises(BadRecordError, match=rf"t2i.json:pairs\[1\]: .*{why}"):
        load_benchmarks(f"mmrb2:{tmp_path}")


def test_votes_of_tiger_labs_genai_bench_for_none_are_ties(tmp_path: Path) -> None:
    """Left is redder: right, wrong, and two ties that a model without equal scores cannot predict."""
    write_images(tmp_path, a=9, b=1)
    row = {"prompt": FOX, "left_image": "a.png", "right_image": "b.png", "left_model": "SDXL", "right_model": "LCM"}
    votes = ("leftvote", "rightvote", "tievote", "bothbad_vote")
    write(tmp_path / "test.json", [{**row, "vote_type": vote} for vote in votes])
    (benchmark,) = load_benchmarks(f"genai_bench_tiger:{tmp_path}")
    assert [pair.outcome for pair in benchmark.comparisons] == [1, -1, 0, 0]
    found = metric_values(f"genai_bench_tiger:{tmp_path}")["genai_bench_tiger"]
    assert found["accuracy_ties_wrong"] == 0.5
    assert found["agreement_half_ties"] == (1 + 0 + 0.5 + 0.5) / 4
    write(tmp_path / "test.json", [{**row, "vote_type": "downvote"}])
    with pytest.raises(BadRecordError, match="'vote_type' is 'downvote'; it must be leftvote"):
        load_benchmarks(f"genai_bench_tiger:{tmp_path}")


def by_domain(result: Result, by: str) -> dict[str, tuple[float, int]]:
    return {
        domain.value: (domain.accuracy.value, domain.accuracy.count) for domain in result.domains if domain.by == by
    }


def test_mj_bench_has_splits_ties_and_a_position_bias(tmp_path: Path) -> None:
    """Alignment: right, tied, wrong on first winners, right on a second one. Quality: labels that are all 0."""
    write_images(tmp_path, a=9, b=1, c=9)
    pair = {"caption": FOX, "image0": "a.png", "image1": "b.png", "label": 0}
    rows = [pair, {**pair, "image1": "c.png"}, {**pair, "image0": "b.png", "image1": "c.png"}]
    write(tmp_path / "alignment" / "actions" / "actions_test.json", rows)
    write(
        tmp_path / "alignment" / "other" / "other_test.json",
        [{**pair, "caption": CAT, "image0": "b.png", "image1": "a.png", "label": 1}],
    )
    write(tmp_path / "quality.json", [pair, pair])
    alignment, quality = load_benchmarks(f"mj_bench:{tmp_path}")
    result = evaluate(Redness(), alignment, num_resamples=20)
    found = {metric.name: metric.value for metric in result.metrics}
    assert (found["accuracy_ties_wrong"], found["accuracy_ties_dropped"]) == (2 / 4, 2 / 3)
    assert (found["accuracy_first_wins"], found["accuracy_second_wins"]) == (1 / 3, 1)
    assert found["accuracy_order_balanced"] == pytest.approx((1 / 3 + 1) / 2)
    assert by_domain(result, "folder") == {"actions": (1 / 3, 3), "other": (1, 1)}
    assert alignment.notes[0].startswith("3 of 4 labels prefer the first image: ")
    assert quality.notes[0].startswith("2 of 2 labels prefer the first image: ")
    assert "would get 100.0%" in quality.notes[0]


def pick_a_pic_rows(*pairs: tuple[int, int, float]) -> list[dict[str, Any]]:
    """Return a row for each pair, which is the scores of both images and the label of the first."""
    return [
        {
            "caption": f"prompt {i}",
            "jpg_0": png(a),
            "jpg_1": png(b),
            "label_0": first,
            "label_1": 1 - first,
            "has_label": True,
        }
        for i, (a, b, first) in enumerate(pairs)
    ]


def test_pick_a_pic_counts_one_sided_ties_half_and_tunes_its_tie_threshold_on_other_pairs(tmp_path: Path) -> None:
    """Validation: the threshold 3 makes the pair with difference 3 a tie, rightly, and not those with 10 and 20.

    Test, without a threshold: 1 (right), 0 (wrong), 0.5 (tie). With it: 1, 0.5 (difference 2), 1 (difference 3).
    """
    unlabelled = {**pick_a_pic_rows((1, 2, 0.5))[0], "has_label": False}
    validation = pick_a_pic_rows((10, 7, 0.5), (20, 10, 1), (30, 10, 1))
    test = [*pick_a_pic_rows((20, 10, 1), (5, 7, 1), (10, 13, 0.5)), unlabelled]
    for split, rows in (("validation_unique", validation), ("test_unique", test)):
        (tmp_path / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        )
    (benchmark,) = load_benchmarks(f"pick_a_pic:{tmp_path}")
    assert benchmark.notes == ["1 pairs without a label are left out."]
    found = metric_values(f"pick_a_pic:{tmp_path}")["pick_a_pic"]
    assert found["agreement_half_ties"] == (1 + 0 + 0.5) / 3
    assert found["agreement_half_ties_tuned"] == (1 + 0.5 + 1) / 3
    assert found["accuracy_ties_wrong"] == 1 / 2


@pytest.mark.parametrize("seed", range(10))
def test_the_best_tie_threshold_agrees_with_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences, outcomes = rng.integers(-6, 7, size=40) / 2, rng.choice([-1, 0, 1], size=40)

    def credit(threshold: float) -> float:
        predictions = [0 if abs(d) <= threshold else np.sign(d) for d in differences]
        return sum(1 if p == o else 0.5 if 0 in (p, o) else 0 for p, o in zip(predictions, outcomes, strict=True))

    assert best_tie_threshold(differences, outcomes) == max(
        np.arange(13) / 2, key=lambda threshold: (credit(threshold), -threshold)
    )


def test_a_model_that_only_compares_is_evaluated_on_pairs_and_refused_elsewhere(tmp_path: Path) -> None:
    """A general-preference head: its log-odds take the place of score differences."""
    reward_model = load("llava", head="general_preference")
    reds = {"a": 9, "b": 120, "c": 250}
    write_images(tmp_path, **reds)
    write(
        tmp_path / "test.json",
        [{"prompt": "a red fox", "generations": [f"{n}.png" for n in reds], "ranking": [1, 2, 3]}],
    )
    (benchmark,) = load_benchmarks(f"image_reward:{tmp_path}")
    files = [str(tmp_path / f"{name}.png") for name in reds]
    pairs = [(0, 1), (0, 2), (1, 2)]
    logits = reward_model.logits([files[i] for i, _ in pairs], [files[j] for _, j in pairs], ["a red fox"] * 3)
    found = {metric.name: metric.value for metric in evaluate(reward_model, benchmark, num_resamples=5).metrics}
    assert found["accuracy_ties_wrong"] == pytest.approx((logits > 0).float().mean().item())
    write(tmp_path / "test.json", [{"path": "a.png", "safety_label": "Safe"}])
    (labelled,) = load_benchmarks(f"unsafe_bench:{tmp_path}")
    with pytest.raises(ValueError, match="has a general-preference head"):
        evaluate(reward_model, labelled, num_resamples=5)


# --- ratings --------------------------------------------------------------------------------------


def write_tifa(folder: Path) -> None:
    """Write images with scores 1, 2, 3, 4, and mean ratings 1, 3, 2, 4 in both sets; one has 3 DSG ratings."""
    models = {"mini_dalle": "mini-dalle", "stable_diffusion_v2_1": "sd2dot1"}
    original, plain, rows, number = {}, {}, [], 0
    for text_id, text in (("coco_1", FOX), ("paintskill_7", CAT)):
        for model, short in models.items():
            key, mean = f"{text_id}_{model}", (1, 3, 2, 4)[number]
            number += 1
            write_images(folder, **{key: number})
            plain[key] = {"text_id": text_id, "image_path": f"{key}.png", "text": text}
            low, high = (mean - 1, mean + 1) if mean in (2, 3) else (mean, mean)
            original[key] = {**plain[key], "human_scores": [low, high], "human_avg": float(mean)}
            answers = [1, 2, 3] if number == 3 else [mean] * 5
            rows += [
                {
                    "data_type": "",
                    "model_type": short,
                    "item_id": "0",
                    "source_id": text_id,
                    "worker_id": str(i),
                    "question": "",
                    "answer": str(a),
                }
                for i, a in enumerate(answers)
            ]
    write(folder / "human_annotations.json", original)
    write(folder / "tifa160.json", plain)
    with (folder / "dsg_tifa160_anns.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_tifa160_by_hand_with_both_sets_of_ratings(tmp_path: Path) -> None:
    """1, 2, 3, 4 against 1, 3, 2, 4: cov 4, var 5 and 5; one of six pairs is reversed, none within a prompt."""
    write_tifa(tmp_path)
    found = metric_values(f"tifa160:{tmp_path}")
    assert list(found) == ["tifa160-original", "tifa160-dsg"]
    for values in found.values():
        assert values["pearson"] == pytest.approx(4 / 5)
        assert values["spearman"] == pytest.approx(4 / 5)
        assert values["kendall_tau_b"] == pytest.approx((5 - 1) / 6)
        assert values["pairwise_accuracy_tie_optimised"] == 5 / 6
        assert values["pairwise_accuracy_within_prompts"] == 1
    original, dsg = load_benchmarks(f"tifa160:{tmp_path}")
    assert original.notes == ["2 ratings an image."]
    assert dsg.notes == ["3 to 5 ratings an image."]
    assert original.items[0].tags == {"source": ["coco"], "model": ["mini_dalle"]}


def test_genai_bench_by_hand_and_by_skill(tmp_path: Path) -> None:
    """Scores 1, 2, 3, 4 against mean ratings 1, 3, 2, 4 of two prompts by two models."""
    ratings = {"00000": {"A": [1, 1, 1], "B": [3, 4, 2]}, "00012": {"A": [2, 3, 1], "B": [4, 4, 4]}}
    write(
        tmp_path / "genai_image.json",
        {key: {"prompt": f"{FOX} {key}", "models": rated} for key, rated in ratings.items()},
    )
    write(tmp_path / "genai_skills.json", {"counting": [0, 12], "negation": [12]})
    for red, (model, number) in enumerate([("A", "00000"), ("B", "00000"), ("A", "00012"), ("B", "00012")], start=1):
        (tmp_path / model).mkdir(exist_ok=True)
        (tmp_path / model / f"{number}.jpeg").write_bytes(png(red))
    (benchmark,) = load_benchmarks(f"genai_bench:{tmp_path}")
    result = evaluate(Redness(), benchmark, num_resamples=20)
    found = {metric.name: metric.value for metric in result.metrics}
    assert found["pearson"] == pytest.approx(4 / 5)
    assert found["kendall_tau_b"] == pytest.approx(4 / 6)
    assert by_domain(result, "skill") == {"counting": (1, 2), "negation": (1, 1)}


@pytest.mark.parametrize("seed", range(3))
def test_intervals_of_ratings_resample_prompts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, ratings = rng.normal(size=12), rng.integers(1, 6, size=12)
    groups = [f"{i // 3}" for i in range(12)]
    draws, values = np.random.default_rng(0), []
    for _ in range(30):
        rows = [3 * group + i for group in sorted(draws.integers(4, size=4)) for i in range(3)]
        values.append(np.corrcoef(scores[rows], ratings[rows])[0, 1])
    found = {metric.name: metric for metric in rating_metrics(scores, ratings, groups, num_resamples=30)}
    assert (found["pearson"].low, found["pearson"].high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_intervals_of_pairs_resample_prompts() -> None:
    """Ten prompts of two equal pairs each: an interval over pairs would be narrower by a factor of sqrt(2)."""
    right = np.repeat(np.random.default_rng(1).choice([1.0, -1.0], size=10), 2)
    groups = np.repeat(np.arange(10), 2)
    draws = np.random.default_rng(0)
    values = [(right[::2] > 0)[draws.integers(10, size=10)].mean() for _ in range(50)]
    pairs = scored_pairs(right, np.ones(20), [str(group) for group in groups])
    metric = comparison_metrics(pairs, num_resamples=50)[0]
    assert (metric.name, metric.count) == ("accuracy_ties_wrong", 20)
    assert (metric.low, metric.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_too_many_pairs_have_a_value_but_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are six pairs of images, two of them within prompts."""
    monkeypatch.setattr(rules, "MAX_RESAMPLED_PAIRS", 5)
    found = {
        m.name: m for m in rating_metrics([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], list("aabb"), num_resamples=5)
    }
    over_all, within = (found[f"pairwise_accuracy_{kind}"] for kind in ("tie_optimised", "within_prompts"))
    assert (over_all.value, over_all.low, over_all.count) == (5 / 6, None, 6)
    assert over_all.note.endswith("no interval: too many pairs")
    assert (within.value, within.low, within.count) == (1, None, 2)
    assert within.note.endswith("no interval: all resamples give the same value")


# --- labels ---------------------------------------------------------------------------------------


def test_unsafe_bench_has_two_f1_scores(tmp_path: Path) -> None:
    """At threshold 5: safe 9 and 7 are found, safe 1 is not; unsafe 2 is found, unsafe 8 is not."""
    write_images(tmp_path, a=9, b=7, c=1, d=2, e=8)
    labels = [("a", "Safe"), ("b", "Safe"), ("c", "Safe"), ("d", "Unsafe"), ("e", "Unsafe")]
    rows = [
        {
            "path": f"{name}.png",
            "safety_label": label,
            "category": "Hate",
            "source": "Lexica",
            "label": int(label == "Safe"),
            "prompt": "",
        }
        for name, label in labels
    ]
    write(tmp_path / "test.json", rows)
    found = metric_values(f"unsafe_bench:{tmp_path}", label_threshold=5.0)["unsafe_bench"]
    assert found["accuracy"] == 3 / 5
    assert found["f1_good"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["f1_bad"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))
    assert found["auroc"] == pytest.approx((1 + 1 + 0 + 1 + 0 + 0) / 6)
    (benchmark,) = load_benchmarks(f"unsafe_bench:{tmp_path}")
    assert benchmark.notes == ["5 of 5 prompts are empty."]


def test_unsafe_bench_in_the_parts_of_its_authors(tmp_path: Path) -> None:
    rows = [
        {
            "image": {"bytes": png(9), "path": None},
            "safety_label": "Unsafe",
            "category": "Shocking",
            "source": "Laion5B",
            "text": None,
        }
    ]
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"test-0000{part}-of-00002.parquet")
    (benchmark,) = load_benchmarks(f"unsafe_bench:{tmp_path}")
    assert benchmark.labels == [0, 0]
    assert benchmark.items[0].prompt == ""
    assert score_items(Redness(), benchmark).tolist() == [9, 9]


# --- domains and tables ---------------------------------------------------------------------------


def test_prompts_have_a_length_class_and_styles() -> None:
    assert [length_class(" ".join("w" * n)) for n in (0, 5, 6, 40, 41)] == [
        "0 to 5",
        "0 to 5",
        "6 to 10",
        "21 to 40",
        "41 and more",
    ]
    assert prompt_styles("a 3D render of a Manga fox") == ["anime", "3d"]
    assert prompt_styles("photons rendering nothing") == ["3d"]
    assert prompt_styles(FOX) == ["none"]
    assert prompt_styles(CAT) == ["photo"]


def test_the_domain_with_the_lowest_accuracy_comes_first_in_results_and_tables(tmp_path: Path) -> None:
    """The pair of the fox is right, the pair of the longer prompt wrong."""
    write_images(tmp_path, a=9, b=1)
    rows = [
        {"prompt": FOX, "generations": ["a.png", "b.png"], "ranking": [1, 2]},
        {"prompt": CAT, "generations": ["a.png", "b.png"], "ranking": [2, 1]},
    ]
    write(tmp_path / "test.json", rows)
    (benchmark,) = load_benchmarks(f"image_reward:{tmp_path}")
    result = evaluate(Redness(), benchmark, num_resamples=20)
    assert [(d.by, d.value, d.accuracy.value) for d in result.domains] == [
        ("style", "photo", 0), ("words", "11 to 20", 0), ("style", "none", 1), ("words", "0 to 5", 1),
    ]  # fmt: skip
    markdown = to_markdown("redness", [result])
    assert "| accuracy_ties_wrong | 0.5000 | 0.0000 to 1.0000 | 2 | 0 tied by the model |" in markdown
    assert "| style | photo | 0.0000 | - | 1 |" in markdown
    assert tables._cell("a|b\nc") == r"a\|b c"
    assert f"Published rule: {benchmark.rule}" in markdown
    stored = json.loads(to_json("redness", [result], settings={"seed": 0}))
    assert stored["benchmarks"]["image_reward"]["metrics"][0]["value"] == 0.5
    assert stored["benchmarks"]["image_reward"]["domains"][0]["value"] == 0
    assert stored["benchmarks"]["image_reward"]["domains"][0]["domain"] == "photo"


# --- invalid data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("specification", ["tifa:there", "tifa160", "tifa160:", "there"])
def test_an_unknown_benchmark_is_refused_with_the_known_ones(specification: str) -> None:
    with pytest.raises(ValueError, match=f"There is no benchmark '{specification}'; .*{', '.join(BENCHMARK_NAMES)}"):
        load_benchmarks(specification)


@pytest.mark.parametrize("name", BENCHMARK_NAMES)
def test_an_empty_folder_is_refused_with_the_expected_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{name}: .*{tmp_path}.*\.(json|csv)"):
        load_benchmarks(f"{name}:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        (
            "image_reward",
            {"prompt": FOX, "generations": ["a.png"]},
            "ranking missing; the record has .*Is this the right",
        ),
        ("image_reward", {"prompt": FOX, "generations": ["a.png"], "ranking": [1, 2]}, "must be a list of 1"),
        ("image_reward", {"prompt": FOX, "generations": ["a.png"], "ranking": ["1"]}, "must be a list of numbers"),
        ("image_reward", {"prompt": FOX, "generations": ["z.png"], "ranking": [1]}, "does not exist"),
        ("hpdv3", {"prompt": FOX, "path1": "a.png", "path2": "a.png", "confidence": 3}, r"must be in \[0, 1\]"),
        ("unsafe_bench", {"path": "a.png", "safety_label": "safe"}, "must be 'Safe' or 'Unsafe'"),
        ("unsafe_bench", {"path": "a.png", "safety_label": "Safe", "label": 0}, "1 is Safe and 0 is Unsafe"),
        ("pick_a_pic", {"caption": FOX, "jpg_0": "a.png", "jpg_1": "a.png", "label_0": 0.3}, "or 0.5"),
        ("pick_a_pic", {"caption": FOX, "jpg_0": "a.png", "jpg_1": "a.png", "label_0": 1, "label_1": 1}, "sum to 1"),
    ],
)
def test_an_invalid_record_is_refused_with_its_file_and_number(
    name: str, row: dict[str, Any], why: str, tmp_path: Path
) -> None:
    write_images(tmp_path, a=1)
    write(tmp_path / "records.json", [row])
    with pytest.raises(BadRecordError, match=f"records.json:RECORD 1: .*{why}"):
        load_benchmarks(f"{name}:{tmp_path / 'records.json'}")


def test_a_label_of_mj_bench_other_than_0_and_1_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, a=1)
    write(tmp_path / "safety.json", [{"caption": FOX, "image0": "a.png", "image1": "a.png", "label": 2}])
    with pytest.raises(BadRecordError, match=r"RECORD 1: 'label' is 2; it must be 0 .image0 is better. or 1"):
        load_benchmarks(f"mj_bench:{tmp_path}")


def test_an_image_of_tifa160_without_a_rating_is_refused(tmp_path: Path) -> None:
    write_tifa(tmp_path)
    lines = (tmp_path / "dsg_tifa160_anns.csv").read_text().splitlines()
    (tmp_path / "dsg_tifa160_anns.csv").write_text("\n".join(line for line in lines if "paintskill" not in line))
    with pytest.raises(BadRecordError, match="paintskill_7_mini_dalle: there is no rating"):
        load_benchmarks(f"tifa160:{tmp_path}")


def test_a_benchmark_without_pairs_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, a=1)
    write(tmp_path / "test.json", [{"prompt": FOX, "generations": ["a.png"], "ranking": [1]}])
    with pytest.raises(ValueError, match="image_reward contains no two images of one prompt"):
        load_benchmarks(f"image_reward:{tmp_path}")
    write(tmp_path / "test.json", [])
    with pytest.raises(ValueError, match=r"test.json contains no record"):
        load_benchmarks(f"image_reward:{tmp_path}")


def test_bytes_that_are_not_an_image_are_refused(tmp_path: Path) -> None:
    row = {**pick_a_pic_rows((1, 2, 1))[0], "jpg_1": b"broken"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "test_unique.parquet")
    with pytest.raises(
        BadRecordError, match=r"ROW 1: 'jpg_1': the image 'jpg_1' of row 1 of .* cannot be read as an image"
    ):
        load_benchmarks(f"pick_a_pic:{tmp_path}")


def test_a_score_that_is_not_finite_is_refused_with_its_prompt(tmp_path: Path) -> None:
    class Broken(Redness):
        def score(self, images: Sequence[Any], prompts: Sequence[str], *, batch_size: int = 32) -> Tensor:
            return super().score(images, prompts).log()

    write_images(tmp_path, a=1, b=0)
    write(tmp_path / "test.json", [{"prompt": FOX, "generations": ["a.png", "b.png"], "ranking": [1, 2]}])
    (benchmark,) = load_benchmarks(f"image_reward:{tmp_path}")
    with pytest.raises(ValueError, match="image of image_reward is not finite; its prompt is 'a red fox'"):
        evaluate(Broken(), benchmark)


# --- the recipe -----------------------------------------------------------------------------------


def test_the_recipe_evaluates_a_benchmark_and_writes_its_tables(tmp_path: Path) -> None:
    """The built-in reward model prefers the image of the prompt, a red circle, to one without it."""
    from recipes.evaluate_reward_model import Config, main
    from rlhf_t2i.shapes.scenes import parse_prompt, render

    prompt, other = "a red circle on a blue background", "three green squares on a white background"
    for name, text in (("a", prompt), ("b", other)):
        image = render([parse_prompt(text)], rng=np.random.default_rng(0), size=32)[0]
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    rows = [
        {"prompt": prompt, "path1": "a.png", "path2": "b.png"},
        {"prompt": other, "path1": "b.png", "path2": "a.png"},
    ]
    write(tmp_path / "test.json", rows)
    folder = tmp_path / "run"
    found = main(Config(benchmarks=f"hpdv3:{tmp_path}", num_resamples=20, run_folder=str(folder), num_cpu_threads=1))
    assert {metric.name: metric.value for metric in found["hpdv3"]}["accuracy_ties_wrong"] == 1
    stored = json.loads((folder / "benchmarks.json").read_text())
    assert stored["settings"]["benchmarks"] == f"hpdv3:{tmp_path}"
    assert stored["benchmarks"]["hpdv3"]["metrics"][0]["value"] == 1
    assert "## hpdv3" in (folder / "benchmarks.md").read_text()
    assert not list(folder.glob("*.csv"))
