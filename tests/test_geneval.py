"""GenEval: its rows, its folders, and its score of scenes of rendered objects, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.rewards import geneval
from rlhf_t2i.rewards.geneval import Detection, GenevalReward, graded_score, meets_all, objects_by_class, relations
from rlhf_t2i.rewards.geneval_models import ColorClassifier, Detector, on_grey
from rlhf_t2i.rewards.geneval_rows import CLASSES, COLORS, ObjectCondition, parse_row
from rlhf_t2i.rewards.load import load_reward
from rlhf_t2i.rewards.rows import check_prompts
from rlhf_t2i.search.geneval import rows_to_write, write_metadata
from tests.geneval_files import LINES, make_detector, make_geneval_models, write_prompts

PALETTE = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
Box = tuple[int, int, int, int]
Thing = tuple[str, Box, str]
"""Class, box and colour of an object of a scene of 40 x 40 pixels."""


def rendered(*things: Thing, score: float = 0.95) -> tuple[Tensor, list[Detection]]:
    """A black image with boxes, and what a perfect detector finds in it."""
    image, found = torch.zeros(3, 40, 40), list[Detection]()
    for name, (left, top, right, bottom), color in things:
        mask = torch.zeros(40, 40, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        image[:, mask] = torch.tensor(PALETTE[color])[:, None]
        found.append(Detection(name, score, (left, top, right, bottom), mask))
    return image, found


class Renderings:
    """A detector and a classifier of colours that know how the scenes were rendered."""

    def __init__(self, *scenes: Sequence[Thing], score: float = 0.95) -> None:
        self.images, self.found = zip(*[rendered(*scene, score=score) for scene in scenes], strict=True)

    def detector(self, images: Tensor, *, threshold: float) -> list[list[Detection]]:
        return list(self.found)

    def classifier(self, image: Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        means = [image[:, each.mask].mean(1) for each in objects]
        return [color for mean in means for color, rgb in PALETTE.items() if torch.equal(mean, torch.tensor(rgb))]

    def score(self, row: dict[str, Any], **options: bool) -> list[float]:
        reward = object.__new__(GenevalReward)
        vars(reward).update({"graded": False, "exact_count": False, "device": None, **options})
        vars(reward).update(detector=self.detector, classifier=self.classifier)
        rows = [{"tag": "two_object", "prompt": "a photo", **row}] * len(self.images)
        return reward(torch.stack(self.images), ["a photo"] * len(rows), rows).tolist()


def dog(left: int, top: int = 10, *, color: str = "red", name: str = "dog") -> Thing:
    return (name, (left, top, left + 8, top + 8), color)


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
SCENES: list[tuple[dict[str, Any], list[Thing], float, float, float]] = [
    # The row, the scene, the strict score with at least and with exactly the count, and the graded score.
    ({"include": [DOG]}, [dog(0)], 1, 1, 1),
    ({"include": [DOG]}, [], 0, 0, 0),
    ({"include": [DOG]}, [dog(0), dog(20)], 1, 0, 0),  # 1 - |1 - 2| / 1
    ({"include": [{"class": "dog", "count": 3}]}, [dog(0), dog(20)], 0, 0, 2 / 3),
    ({"include": [{"class": "dog", "count": 3}]}, [dog(0)] * 7, 1, 0, 0),  # never below 0
    ({"include": [DOG], "exclude": [{"class": "dog", "count": 2}]}, [dog(0), dog(20)], 0, 0, 0),
    ({"include": [DOG], "exclude": [CAT]}, [dog(0), dog(20, name="cat")], 0, 0, 1),
    ({"include": [DOG, CAT]}, [dog(0)], 0, 0, 1 / 2),
    ({"include": [{**DOG, "color": "red"}]}, [dog(0)], 1, 1, 1),
    ({"include": [{**DOG, "color": "blue"}]}, [dog(0)], 0, 0, 1 / 2),  # the count, not the colour
    ({"include": [{**DOG, "color": "red"}]}, [dog(0), dog(20)], 1, 0, 0),  # a colour counts with the right number only
    ({"include": [{"class": "dog", "count": 2, "color": "red"}]}, [dog(0), dog(20, color="blue")], 0, 0, 3 / 4),
    ({"include": [{"class": "dog", "count": 4, "color": "red"}]}, [dog(0), dog(20, color="blue")], 0, 0, 1 / 4),
    ({"include": [DOG, {**CAT, "position": ["right of", 0]}]}, [dog(0), dog(20, name="cat")], 1, 1, 1),
    ({"include": [DOG, {**CAT, "position": ["left of", 0]}]}, [dog(0), dog(20, name="cat")], 0, 0, 2 / 3),
    ({"include": [DOG, {**CAT, "position": ["below", 0]}]}, [dog(0), dog(0, 30, name="cat")], 1, 1, 1),
    ({"include": [DOG, {**CAT, "position": ["right of", 0]}]}, [dog(20, name="cat")], 0, 0, 1 / 3),
    (
        {"include": [{**DOG, "color": "blue"}, {**CAT, "position": ["right of", 0]}]},
        [dog(0), dog(20, name="cat")], 0, 0, 1 / 2,  # no position of a dog of another colour
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "scene", "strict", "exact", "graded"), SCENES)
def test_scenes_have_the_scores_by_hand(
    row: dict[str, Any], scene: list[Thing], strict: float, exact: float, graded: float
) -> None:
    world = Renderings(scene)
    assert world.score(row) == [strict]
    assert world.score(row, exact_count=True) == [exact]
    assert world.score(row, graded=True) == pytest.approx([graded])


def test_a_scene_scores_alone_as_in_a_batch() -> None:
    world = Renderings([dog(0)], [], [dog(0), dog(20, color="blue")])
    assert world.score({"include": [{**DOG, "color": "red"}]}) == [1, 0, 1]


def test_counting_needs_more_confidence_and_sixteen_objects_of_a_class_are_kept() -> None:
    row = {"include": [DOG]}
    assert Renderings([dog(0)], score=0.5).score(row) == [1]
    assert Renderings([dog(0)], score=0.5).score({**row, "tag": "counting"}) == [0]
    assert Renderings([dog(0)], score=0.3).score(row) == [0]
    _, many = rendered(*[dog(0)] * 20, dog(0, name="cat"))
    objects = objects_by_class(many, tag="counting")
    assert (len(objects["dog"]), len(objects["cat"]), len(objects["bench"])) == (16, 1, 0)


def test_the_most_confident_objects_must_have_the_colour() -> None:
    (_, (blue,)), (_, (red,)) = rendered(dog(0, color="blue"), score=0.8), rendered(dog(20), score=0.9)
    prompt = parse_row({"tag": "colors", "prompt": "a dog", "include": [{**DOG, "color": "blue"}]})
    objects = objects_by_class([blue, red], tag="colors")

    def colors_of(found: Sequence[Detection], name: str) -> list[str]:
        return ["red" if each is red else "blue" for each in found]

    assert not meets_all(prompt, objects, colors_of, exact_count=False)
    assert graded_score(prompt, objects, colors_of) == 0


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}),  # (-20 + 2) / 20
        ((20, 0, 30, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (20, 20, 30, 30), {"left of", "above"}),  # (-20 + 2) / 28.3 = -0.64
        ((20, 20, 30, 30), (0, 0, 10, 10), {"right of", "below"}),
        ((0, 0, 10, 10), (20, 40, 30, 50), {"above"}),  # 0.40 and 0.85
        ((0, 0, 10, 10), (1, 0, 11, 10), set()),  # nearer than a tenth of both sizes
        ((0, 0, 10, 10), (3, 0, 13, 10), set()),  # (-3 + 2) / 3 = -0.33
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_positions_by_hand(
    one: tuple[int, int, int, int], other: tuple[int, int, int, int], expected: set[str]
) -> None:
    mask = torch.zeros(1, 1, dtype=torch.bool)
    a, b = (Detection("dog", 1.0, box, mask) for box in (one, other))
    assert relations(a, b) == expected


# --- rows -------------------------------------------------------------------------------------------


def test_every_kind_of_row_is_read() -> None:
    one, count, place, colour = map(parse_row, LINES)
    assert (one.tag, one.include) == ("single_object", (ObjectCondition("bench", 1),))
    assert count.exclude == (ObjectCondition("clock", 4),)
    assert place.include[1] == ObjectCondition("tie", 1, None, ("right of", 0))
    assert [condition.color for condition in colour.include] == ["red", "blue"]


def test_metadata_is_the_unchanged_line(tmp_path: Path) -> None:
    rows = rows_to_write(load_prompts(str(write_prompts(tmp_path, LINES))))
    write_metadata(tmp_path / "00002", rows[2])
    assert json.loads((tmp_path / "00002" / "metadata.jsonl").read_text()) == LINES[2]
    assert (tmp_path / "00002" / "samples").is_dir()


def test_rows_of_a_table_are_those_of_the_file(tmp_path: Path) -> None:
    """A table has nulls for fields that other rows have; a relation and an index in one list fit into none."""
    lines = [line for line in LINES if line["tag"] != "position"]
    pd.DataFrame(lines).to_parquet(tmp_path / "prompts.parquet")
    assert rows_to_write(load_prompts(str(tmp_path / "prompts.parquet"))) == lines


def test_other_prompts_have_only_their_text_as_metadata(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    assert rows_to_write(load_prompts(str(tmp_path / "prompts.txt"))) == [{"prompt": "a fox"}]
    assert rows_to_write(["a red circle"]) == [{"prompt": "a red circle"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"include": "bench"},
            r"it is not a line of GenEval, which has tag, prompt and a list of objects under",
        ),
        ({"include": []}, r"it is not a line of GenEval"),
        ({"tag": None}, r"it is not a line of GenEval"),
        ({"include": [{"class": "dog"}]}, r"include 0 is .*; it needs a class and a count of at least 1"),
        ({"include": [{"class": "dog", "count": 0}]}, r"a count of at least 1"),
        (
            {"include": [{"class": "fox", "count": 1}]},
            r"include 0 has the class 'fox'; GenEval's classes are person",
        ),
        ({"exclude": [{"count": 4}]}, r"exclude 0 is"),
        ({"exclude": "cat"}, r"it has 'cat' under exclude; it must be a list"),
        (
            {"include": [{"class": "dog", "count": 1, "color": "teal"}]},
            r"has the color 'teal'; it must be one of red",
        ),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, r"the index of an earlier object"),
        ({"include": [{"class": "dog", "count": 1, "position": "left"}]}, r"has the position 'left'"),
    ],
)
def test_a_bad_row_is_named_by_the_reward_and_by_a_search(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prompts = load_prompts(str(write_prompts(tmp_path, [LINES[0], {**LINES[0], **change}])))
    with pytest.raises(ValueError, match=f"jsonl:2: the reward 'geneval:graded' cannot use this row: .*{message}"):
        check_prompts("geneval:graded", prompts)
    with pytest.raises(ValueError, match=f"jsonl:2 cannot be scored by GenEval: .*{message}"):
        rows_to_write(prompts)


# --- the models, at a tiny size -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """detector/ and clip/ with random weights."""
    folder = tmp_path_factory.mktemp("geneval")
    make_geneval_models(folder)
    return folder


def test_a_detector_finds_the_same_objects_alone_and_in_a_batch(models: Path) -> None:
    detect, images = Detector(str(models / "detector"), batch_size=2), torch.rand(3, 3, 24, 40)
    together = detect(images, threshold=0.0)
    alone = [found for image in images for found in detect(image[None], threshold=0.0)]
    assert [[each.name for each in found] for found in together] == [[each.name for each in found] for found in alone]
    for one, other in zip(chain(*together), chain(*alone), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert one.name in CLASSES
        left, top, right, bottom = map(int, one.box)
        inside = one.mask[top:bottom, left:right]
        assert one.mask.shape == (24, 40)
        assert inside.sum() == one.mask.sum()
        assert all(inside.any(dim)[[0, -1]].all() for dim in (0, 1))  # the box is tight
    assert sum(map(len, together)) > 0
    assert detect(images, threshold=1.0) == [[], [], []]


def test_a_detector_without_a_class_is_refused(tmp_path: Path) -> None:
    make_detector(tmp_path, classes=[name for name in CLASSES if name != "tv remote"])
    with pytest.raises(ValueError, match=r"has no class remote; it must be trained on COCO"):
        Detector(str(tmp_path), batch_size=1)


def test_an_object_is_cut_out_of_its_image() -> None:
    image, (found,) = rendered(dog(4, 6))
    found.mask[6, 4] = False
    crop = on_grey(image, found)
    assert crop.size == (8, 8)
    assert (crop.getpixel((0, 0)), crop.getpixel((1, 0))) == ((0x99, 0x99, 0x99), (255, 0, 0))


def test_a_colour_is_that_of_the_nearest_texts(models: Path) -> None:
    """The mean of the templates' unit vectors, by hand."""
    classify = ColorClassifier(str(models / "clip"), batch_size=1)
    image, found = rendered(dog(4), dog(20, color="blue"))
    directions = []
    for color in ("red", "white"):
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        inputs = classify.tokenizer(texts, padding=True, return_tensors="pt")
        features = classify.model.get_text_features(**inputs).pooler_output
        mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
        directions.append(mean / mean.norm())
    colors = list(COLORS)
    weights = classify._weights_of("dog")  # pyright: ignore[reportPrivateUsage]
    assert_close(weights[[colors.index("red"), colors.index("white")]], torch.stack(directions))
    pixels = classify.processor([on_grey(image, each) for each in found], return_tensors="pt")
    nearest = (classify.model.get_image_features(**pixels).pooler_output @ weights.T).argmax(1)
    assert classify(image, found, "dog") == [colors[i] for i in nearest]


def test_the_rewards_of_the_table_load_both_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geneval, "DETECTOR", str(models / "detector"))
    monkeypatch.setattr(geneval, "CLIP", str(models / "clip"))
    prompts, images = load_prompts(str(write_prompts(models, LINES))), torch.rand(4, 3, 32, 32)
    strict, graded = load_reward("geneval")(images, prompts), load_reward("geneval:graded")(images, prompts)
    assert set(strict.tolist()) <= {0.0, 1.0}
    assert all(0 <= score <= 1 for score in graded.tolist())
