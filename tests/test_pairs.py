"""The pairs of the toy world: the winner has the higher oracle score, and training holds no held-out prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reward_model.datasets import load_records
from reward_model.images import to_tensor
from reward_model.types import PreferencePair
from rlhf_t2i.shapes.generated import generate_images
from rlhf_t2i.shapes.oracle import oracle_scores, recognise
from rlhf_t2i.shapes.pairs import MIN_GAP, near_misses, random_near_miss
from rlhf_t2i.shapes.scenes import Scene, Thing, all_prompts, all_scenes, parse_prompt, render
from tests.toy_pairs import write_toy_pairs

SMALL = {
    "num_drawn_pairs": 60,
    "num_generated_pairs": 20,
    "num_generated_images": 220,
    "num_validation_pairs": 20,
    "num_test_pairs": 20,
}
FILES = ("train_drawn", "train_generated", "validation", "test_drawn", "test_relation", "test_generated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_pairs(tmp_path_factory.mktemp("pairs") / "pairs", **SMALL)


def pairs_of(folder: Path, name: str) -> list[PreferencePair]:
    records = load_records(folder / f"{name}.jsonl")
    assert all(isinstance(record, PreferencePair) for record in records)
    return [record for record in records if isinstance(record, PreferencePair)]


def differences(a: Scene, b: Scene) -> set[str]:
    """Return the respects in which two scenes differ."""
    respects = {"count"} if len(a.things) != len(b.things) else set()
    respects |= {"background"} if a.background != b.background else set()
    respects |= {"relation"} if a.relation != b.relation else set()
    for one, other in zip(a.things, b.things, strict=False):
        respects |= {"colour"} if one.colour != other.colour else set()
        respects |= {"shape"} if one.shape != other.shape else set()
    return respects


@pytest.mark.parametrize("tier", ["one", "count", "relation"])
def test_a_near_miss_differs_in_exactly_one_respect_and_has_a_prompt(tier: Any) -> None:
    for scene in all_scenes(tier)[::17]:
        for respect, misses in near_misses(scene).items():
            for miss in misses:
                assert differences(scene, miss) == ({"colour"} if respect == "swap" else {respect})
                assert parse_prompt(miss.prompt) == miss


@pytest.mark.parametrize("tier", ["one", "count", "relation"])
def test_the_oracle_passes_a_scene_and_not_its_near_miss(tier: Any) -> None:
    rng = np.random.default_rng(3)
    scenes = [all_scenes(tier)[i] for i in rng.integers(0, len(all_scenes(tier)), 100)]
    prompts = [scene.prompt for scene in scenes]
    right, wrong = render(scenes, rng=rng), render([random_near_miss(scene, rng) for scene in scenes], rng=rng)
    assert oracle_scores(right, prompts).passed.float().mean() >= 0.97
    assert oracle_scores(wrong, prompts).passed.float().mean() <= 0.02


def test_the_recognised_scene_is_the_drawn_one() -> None:
    rng = np.random.default_rng(4)
    scenes = all_scenes("one") + all_scenes("count")[::3]
    recognised = recognise(render(scenes, rng=rng))
    assert np.mean([a == b for a, b in zip(scenes, recognised, strict=True)]) >= 0.97


def test_a_gray_shape_is_no_thing_of_the_grammar() -> None:
    image = render([Scene((Thing("red", "circle"),), "white")], rng=np.random.default_rng(0))
    gray = torch.where(image[:, 1:2] < 0.5, 0.5, image)
    assert recognise(image) == [Scene((Thing("red", "circle"),), "white")]
    assert recognise(gray) == [None]


def test_every_file_has_the_requested_number_of_pairs(folder: Path) -> None:
    counts = {name: len(pairs_of(folder, name)) for name in FILES}
    assert counts == {
        "train_drawn": 60,
        "train_generated": 24,
        "validation": 22,
        "test_drawn": 20,
        "test_relation": 6,
        "test_generated": 20,
    }


def test_training_has_only_training_prompts_and_the_tests_only_held_out_prompts(folder: Path) -> None:
    held_out = set(all_prompts("held-out", ("one", "count", "relation")))
    for name in ("train_drawn", "train_generated", "validation"):
        for pair in pairs_of(folder, name):
            assert not {pair.winner_prompt, pair.loser_prompt} & held_out
    for name in ("test_drawn", "test_relation", "test_generated"):
        assert {pair.winner_prompt for pair in pairs_of(folder, name)} <= held_out


def test_training_and_test_share_no_image(folder: Path) -> None:
    used: dict[str, set[bytes]] = {}
    for name in FILES:
        used[name] = {path.read_bytes() for pair in pairs_of(folder, name) for path in (pair.winner, pair.loser)}
    for name in ("validation", "test_drawn", "test_generated"):
        assert not used[name] & (used["train_drawn"] | used["train_generated"])


def test_the_winner_of_a_generated_pair_has_the_higher_oracle_score(folder: Path) -> None:
    for pair in pairs_of(folder, "test_generated"):
        images = torch.stack([to_tensor(pair.winner), to_tensor(pair.loser)])
        better, worse = oracle_scores(images, [pair.winner_prompt] * 2).graded.tolist()
        assert better - worse > MIN_GAP
        assert pair.rating_gap == pytest.approx(better - worse, abs=1e-3)


@pytest.mark.slow
def test_pairs_are_reproducible_and_a_finished_folder_is_left_unchanged(folder: Path, tmp_path: Path) -> None:
    again = write_toy_pairs(tmp_path / "pairs", **SMALL)
    for name in FILES:
        assert (again / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()
    for image in folder.glob("images/*"):
        assert image.read_bytes() == (again / "images" / image.name).read_bytes()
    before = (again / "train_drawn.jsonl").stat().st_mtime_ns
    write_toy_pairs(again, **{**SMALL, "num_drawn_pairs": 1})
    assert (again / "train_drawn.jsonl").stat().st_mtime_ns == before


def test_too_few_generated_images_for_the_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64 generated images are too few for 900 pairs"):
        write_toy_pairs(
            tmp_path / "pairs",
            **{**SMALL, "num_drawn_pairs": 1, "num_generated_pairs": 900, "num_generated_images": 64},
        )


def test_generated_images_are_reproducible_and_labelled_by_the_oracle() -> None:
    prompts = all_prompts("training")[:2]
    one, other = (generate_images(prompts, seed=3) for _ in range(2))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.graded, oracle_scores(one.images, prompts).graded)


def test_rows_have_only_the_fields_of_the_format(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "train_generated.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "winner", "loser", "rating_gap"}
    assert set(rows[-1]) == {"winner_prompt", "loser_prompt", "image"}
