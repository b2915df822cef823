"""The heads of benchmarks/reward_heads.py: all of a head learns; SkipCA differs from mean pooling by its attention."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import reward_heads, reward_heads_data
from benchmarks.reward_heads_scores import attention_on_things, candidate_scores, rightly_ordered
from benchmarks.reward_heads_variants import VARIANTS, HeadInputs, LastToken, MeanPooled, SkipCa
from reward_model.backbones.load import load_backbone
from reward_model.model import RewardModel
from reward_model.types import Backbone
from rlhf_t2i.shapes.composition_pairs import strict_pairs
from rlhf_t2i.shapes.names import TOY_BACKBONE_FOLDER


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(str(TOY_BACKBONE_FOLDER))


def head_inputs(backbone: Backbone, prompt: str = "a red circle on a blue background") -> HeadInputs:
    """Four random images with one prompt."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = backbone.prepare(list(images), [prompt] * 4)
    last, middle = torch.rand(2, 4, 16, 96, generator=torch.Generator().manual_seed(1))
    return HeadInputs(backbone.forward(inputs), last, middle, inputs["input_ids"])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_head_gives_antisymmetric_log_odds_and_all_its_parameters_learn(name: str, backbone: Backbone) -> None:
    torch.manual_seed(0)
    variant = VARIANTS[name](backbone)
    given = head_inputs(backbone, "a red circle on a blue background" + variant.prompt_end)

    outputs = variant(given)
    first, second = outputs.chunk(2)
    logits = variant.logits(first, second)
    assert logits.shape == (2,)
    torch.testing.assert_close(variant.logits(second, first), -logits)
    assert torch.isfinite(logits).all()
    parameters = list(variant.parameters())
    if parameters:
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)


def test_skip_ca_without_a_query_is_mean_pooling(backbone: Backbone) -> None:
    skip, mean = SkipCa(backbone), MeanPooled(backbone)
    with torch.no_grad():
        skip.skip_ca.query.weight.zero_()
        mean.value.weight.copy_(skip.skip_ca.value.weight)
        mean.head.weight.copy_(skip.head.weight)
        given = head_inputs(backbone)
        torch.testing.assert_close(skip(given), mean(given))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few test pairs, candidates of one prompt, two steps."""
    for name, value in {"NUM_TEST": 2, "NUM_DOMAIN": 1, "NUM_OTHER": 2}.items():
        monkeypatch.setattr(reward_heads_data, name, value)
    monkeypatch.setattr(reward_heads_data, "unseen_prompts", lambda: ["a red circle on a blue background"])
    monkeypatch.setattr(reward_heads, "STEPS", {500: 2})
    reward_heads_data.samples.cache_clear()


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    files = [part for name in ("rows", "tuning", "policies") for part in (f"--{name}", str(folder / f"{name}.jsonl"))]
    more = ["--built_in", "--backbones", "--pairs", "500", "--seeds", "2", "--plots", str(folder)]
    monkeypatch.setattr(sys, "argv", ["reward_heads.py", *arguments, *files, *more])
    reward_heads.main()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_training_goes_on_where_it_stopped_and_the_table_pairs_heads_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, tmp_path, "tune", "--heads", "SkipCA", "--learning_rates", "0.001", "0.1")
    tuning = [json.loads(line) for line in (tmp_path / "tuning.jsonl").read_text().splitlines()]
    of = {rate: sum(row["accuracy"] for row in tuning if row["learning_rate"] == rate) for rate in (0.001, 0.1)}
    best = max(of, key=lambda rate: of[rate])

    command(monkeypatch, tmp_path, "train", "--heads", "last token")
    before = (tmp_path / "rows.jsonl").read_text()
    command(monkeypatch, tmp_path, "train", "--heads", "last token", "SkipCA")
    after = (tmp_path / "rows.jsonl").read_text()
    assert after.startswith(before)
    rows = [json.loads(line) for line in after.splitlines()]
    assert [(row["head"], row["seed"]) for row in rows] == [
        ("last token", 0), ("last token", 1), ("SkipCA", 0), ("SkipCA", 1),
    ]  # fmt: skip
    assert {row["learning_rate"] for row in rows} == {best}
    assert 0 < rows[2]["area_of_things"] < 1
    assert len(rows[0]["best_of"]) == 16

    capsys.readouterr()
    command(monkeypatch, tmp_path, "table")
    table = capsys.readouterr().out
    assert "| last token | 2 |" in table
    assert "| minus last token | all tiers |" in table
    command(monkeypatch, tmp_path, "plot")
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == [
        "reward_heads_best_of_n.svg", "reward_heads_tiers.svg",
    ]  # fmt: skip


@torch.no_grad()
def test_candidates_without_scores_are_ranked_by_their_mean_log_odds(backbone: Backbone) -> None:
    """A head whose log-odds are differences of scores ranks alike either way."""
    model = RewardModel(backbone)
    scored, compared = LastToken(backbone), LastToken(backbone)
    compared.load_state_dict(scored.state_dict())
    compared.kind = "general_preference"
    compared.logits = scored.logits
    images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = reward_heads_data.encode(backbone, images, ["a red circle on a blue background"] * 32)
    scores, log_odds = (candidate_scores(model, variant, data) for variant in (scored, compared))
    expected = (scores - scores.mean(dim=1, keepdim=True)) * 16 / 15 / 0.1
    torch.testing.assert_close(log_odds, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_uniform_attention_falls_on_things_by_their_area(backbone: Backbone) -> None:
    skip = SkipCa(backbone)
    skip.skip_ca.query.weight.zero_()
    pairs = strict_pairs(7, "held-out", seed=0)
    data = reward_heads_data.encode_pairs(backbone, pairs)
    share, area = attention_on_things(RewardModel(backbone), skip, data, torch.cat([pairs.winners, pairs.losers]))
    assert share == pytest.approx(area, rel=1e-5)
    assert 0.02 < area < 0.5


def test_samples_are_compared_within_their_prompt() -> None:
    """Of the first prompt one pair of two is right and one is tied; the second has no image that passes."""
    scores = torch.tensor([[3.0, 1.0, 3.0], [9.0, 0.0, 5.0]])
    passed = torch.tensor([[True, False, False], [False, False, False]])
    assert rightly_ordered(scores, passed) == 0.75
