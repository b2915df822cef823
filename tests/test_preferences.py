"""Preference pairs: selection, order and sharding, image sizes, and preference files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from reward_model.datasets import BadRecordError, load_records, load_same_prompt_pairs
from reward_model.images import to_tensor
from rlhf_t2i.data.image_pairs import fit
from rlhf_t2i.data.pair_shards import shard_pairs
from rlhf_t2i.data.preferences import (
    choose_pairs,
    implicit_preference,
    pairs_of_step,
    save_pairs,
)
from rlhf_t2i.seeds import generators_for
from rlhf_t2i.settings.lists import whole_numbers

CPU = torch.device("cpu")


# --- which pairs ------------------------------------------------------------------------------------

SCORES = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.5, 0.0, 0.5]])


def pairs_of(choice: str, scores: torch.Tensor = SCORES, seed: int = 0) -> list[tuple[int, int]]:
    generators = generators_for(seed, 1, 0, range(len(scores)))
    winners, losers = choose_pairs(scores, selection=choice, generators=generators)  # type: ignore[arg-type]
    return list(zip(winners.tolist(), losers.tolist(), strict=True))


def test_best_and_worst_by_hand() -> None:
    """The images of the second prompt have equal scores and make no pair."""
    assert pairs_of("best_worst") == [(1, 0), (6, 7)]


def test_all_pairs_by_hand() -> None:
    assert sorted(pairs_of("all")) == [(1, 0), (1, 2), (2, 0), (6, 7), (8, 7)]


def test_random_pairs_are_of_one_prompt_and_the_higher_score_wins() -> None:
    scores = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    drawn = pairs_of("random", scores)
    assert len(drawn) == 50
    for prompt, (winner, loser) in enumerate(drawn):
        assert winner // 4 == loser // 4 == prompt
        assert scores.flatten()[winner] > scores.flatten()[loser]
    assert len({(winner % 4, loser % 4) for winner, loser in drawn}) > 6, "different pairs are drawn"
    assert pairs_of("random", scores, seed=1) != drawn


def test_a_margin_of_zero_counts_as_half_an_agreement() -> None:
    assert implicit_preference(torch.tensor([0.2, -0.1, 0.0, 1e-9])).tolist() == [1.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "groups", [[range(1)], [range(2)], [range(7)], [range(12)], [[1], [3, 0, 4, 5, 7, 9], [2, 6, 8]], [[2], [0], [1]]]
)
def test_shards_cover_all_pairs_once_weigh_them_equally_and_have_equally_many_forward_passes(
    groups: list[Sequence[int]], num_processes: int
) -> None:
    count = sum(map(len, groups))
    values = torch.rand(count, generator=torch.Generator().manual_seed(0))
    shards = [shard_pairs(groups, rank=rank, num_processes=num_processes) for rank in range(num_processes)]
    sizes = [sum(map(len, shard.groups)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    rows, mean = list[int](), torch.zeros(())
    for shard in shards:
        passes = shard.microbatches(2)
        assert len(passes) == len(shards[0].microbatches(2))
        for group, own, weight in passes:
            taken = [shard.groups[group][int(i)] for i in own]
            assert any({*taken} <= {*whole} for whole in groups)
            rows += taken if weight else []
            mean += weight * values[taken].mean() / num_processes
    assert sorted(rows) == list(range(count))
    assert_close(mean, values.mean())


def test_each_epoch_takes_every_pair_once_in_a_new_order() -> None:
    taken = [index for step in range(10) for index in pairs_of_step(15, step, num_pairs=6, seed=3)]
    assert [sorted(taken[i : i + 15]) for i in range(0, 60, 15)] == [list(range(15))] * 4
    assert taken[:15] != taken[15:30]
    assert pairs_of_step(15, 0, num_pairs=6, seed=4) != taken[:6]


def test_a_step_with_more_pairs_than_there_are_repeats_them() -> None:
    assert sorted(pairs_of_step(2, 1, num_pairs=5, seed=0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3-5", [3, 4, 5]), ("249, 499", [249, 499]), ("7", [7]), ("5-3", []), ("", []), ("a-b", []), ("1-2-3", []),
     ("-1", []), ("1.5", [])],
)  # fmt: skip
def test_whole_numbers(text: str, expected: list[int]) -> None:
    assert whole_numbers(text) == expected


# --- images ---------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = torch.rand(3, 16, 16)
    assert torch.equal(fit(image, 16, 16), image)


def test_the_shorter_side_is_resized_and_the_centre_is_cropped() -> None:
    image = torch.zeros(3, 32, 96)
    image[:, :, 32:64] = 1.0
    fitted = fit(image, 16, 16)
    assert fitted.shape == (3, 16, 16)
    assert fitted[:, :, 1:-1].min() > 0.95
    assert fit(image.transpose(1, 2), 16, 16)[:, 1:-1].min() > 0.95


@pytest.mark.parametrize("size", [(5, 9), (17, 16), (16, 1000), (301, 299)])
def test_images_of_any_size_fit(size: tuple[int, int]) -> None:
    fitted = fit(torch.rand(3, *size), 16, 24)
    assert fitted.shape == (3, 16, 24)
    assert 0 <= fitted.min() <= fitted.max() <= 1


# --- files ------------------------------------------------------------------------------------------


def save_image(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def write(path: Path, *rows: dict[str, object]) -> Path:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        save_image(path.parent / name, seed=ord(name[0]))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


GOOD = {"prompt": "a fox", "winner": "a.png", "loser": "b.png"}
TIE = {"prompt": "a fox", "tie": ["a.png", "b.png"]}
NO_PAIRS = [
    ({"prompt": "a fox", "winner": "a.png", "loser": "a.png"}, "both sides are the image .*a.png with the prompt"),
    (
        {"winner_prompt": "a fox", "loser_prompt": "a cat", "winner": "a.png", "loser": "b.png"},
        "the two sides have different prompts, 'a fox' and 'a cat'; diffusion models are tuned on two images of one "
        "prompt",
    ),
    ({"winner_prompt": "a fox", "loser_prompt": "a cat", "image": "a.png"}, "the two sides have different prompts"),
    ({"prompt": "a fox", "image": "a.png", "label": 1}, "this is a label of one image"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), NO_PAIRS)
def test_a_record_that_is_not_a_pair_is_refused_with_its_line(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, row)
    with pytest.raises(BadRecordError, match=rf"pairs\.jsonl:2: {message}"):
        load_same_prompt_pairs([path], image_root=None, skipped=None)


def test_a_record_that_is_not_a_pair_is_skipped_and_logged(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", *[row for row, _ in NO_PAIRS], GOOD)
    (pair,) = load_same_prompt_pairs([path], image_root=None, skipped=tmp_path / "run" / "skipped.jsonl")
    assert pair.where.endswith(":5")
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["where"].rpartition(":")[2] for row in skipped) == ["1", "2", "3", "4"]
    assert all(row["reason"] for row in skipped)


def test_a_link_and_its_target_are_one_image(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {**GOOD, "winner": "link.png", "loser": "a.png"})
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(BadRecordError, match="both sides are the image"):
        load_same_prompt_pairs([path], image_root=None, skipped=None)


def test_ties_are_left_out_and_a_file_of_ties_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", TIE, GOOD)
    assert [pair.where for pair in load_same_prompt_pairs([path], image_root=None, skipped=None)] == [f"{path}:2"]
    path = write(tmp_path / "pairs.jsonl", TIE, TIE)
    with pytest.raises(ValueError, match=r"There is no pair of two images of one prompt .* in .*pairs\.jsonl"):
        load_same_prompt_pairs([path], image_root=None, skipped=None)


def test_saved_pairs_are_loaded_as_a_preference_file(tmp_path: Path) -> None:
    """Two processes write their own images and the first one the list; `load_records` loads both pairs."""
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[0.25, 1.0, 0.5], [2.0, -1.0, 0.0]])
    chosen = choose_pairs(scores, selection="best_worst", generators=generators_for(0, 1, 0, range(2)))
    path = tmp_path / "pairs" / "step_000001.jsonl"
    for first in (3, 0):
        save_pairs(path, images[first : first + 3], ["a fox", "a cat"], scores, chosen, first=first)

    one, two = load_records(path)
    assert (one.winner_prompt, two.winner_prompt) == ("a fox", "a cat")  # type: ignore[union-attr]
    assert (one.rating_gap, two.rating_gap) == (0.75, 3.0)  # type: ignore[union-attr]
    for record, (winner, loser) in ((one, (1, 0)), (two, (3, 4))):
        assert_close(to_tensor(record.winner), images[winner], rtol=0, atol=0.5 / 255 + 1e-6)  # type: ignore[union-attr]
        assert_close(to_tensor(record.loser), images[loser], rtol=0, atol=0.5 / 255 + 1e-6)  # type: ignore[union-attr]
    assert len(list(path.with_suffix("").iterdir())) == 4, "only images of pairs are saved"
    assert len(load_same_prompt_pairs([path.parent], image_root=None, skipped=None)) == 2
