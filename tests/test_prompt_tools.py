"""The overlap of training and test prompts, and hard negatives that differ from a prompt in one thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reward_model.datasets.hard_negatives import hard_negatives, wrong_prompts
from reward_model.datasets.keys import normalise, prompt_key
from reward_model.datasets.overlap import overlap_table, prompt_keys, shared_prompts, without_prompts
from reward_model.types import LabelledImage, PreferencePair, Record

A, B = Path("a.png"), Path("b.png")


def pair(prompt: str, winner: Path = A, **options: bool) -> PreferencePair:
    return PreferencePair(winner, B if winner == A else A, prompt, prompt, **options)


# --- overlap --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A red  fox!", "a red fox", True),
        ("a fox, red", "a fox red", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("ＦＯＸ", "fox", True),
        ("Straße", "STRASSE", True),
        ("a red fox", "a red box", False),
        ("fox 2", "fox 3", False),
        ("का", "की", False),
        ("東京", "京都", False),
        ("🦊", "🐈", False),
        ("🦊", "", False),
        ("!?", "?!", False),
    ],
)
def test_prompts_are_equal_if_their_words_are(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same


def test_the_overlap_agrees_with_a_count_by_hand_and_can_be_excluded() -> None:
    training: list[Record] = [
        pair("a red fox"),
        pair("A red fox."),
        pair("a cat"),
        LabelledImage(A, "a dog", 1),
        PreferencePair(A, A, "a cow", "a dog!"),
        LabelledImage(A, "", 0),
    ]
    test: list[Record] = [pair("A RED FOX"), LabelledImage(A, "a dog", 1), pair("a bird"), LabelledImage(B, "", 0)]
    shared = shared_prompts(prompt_keys(training), prompt_keys(test))
    assert {*shared.tolist()} == {prompt_key("a red fox"), prompt_key("a dog")}
    assert without_prompts(training, shared) == [training[2], training[5]]
    assert overlap_table(training, {"test": test, "other": [pair("a bird")]}).splitlines() == [
        "test: 2 of 3 prompts occur in the training data, in 4 of 6 records, such as 'a dog'",
        "other: 0 of 1 prompts occur in the training data, in 0 of 6 records",
    ]


# --- hard negatives -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "among", "never"),
    [
        ("a red cube", {"a green cube", "an orange cube"}, {"a red cube", "a orange cube"}),
        ("an orange cat", {"a red cat"}, {"an red cat"}),
        ("Two dogs", {"Three dogs", "One dogs"}, {"two dogs"}),
        ("a cat on the left, a dog", {"a cat on the right, a dog"}, set()),
        ("a cup to the left of a plate", {"a cup to the right of a plate"}, set()),
        ("a red cube on a blue ball", {"a blue cube on a red ball", "a pink cube on a blue ball"}, set()),
        ("a red ball and a blue ball", {"a green ball and a blue ball"}, {"a blue ball and a red ball"}),
        ("a red and blue ball", {"a pink and blue ball"}, {"a blue and red ball"}),
        ("two big dogs and three cats", {"three big dogs and two cats", "two small dogs and three cats"}, set()),
        ("a grey wall", {"a red wall"}, {"a gray wall"}),
        ("A Red Cube", {"A Green Cube", "An Orange Cube"}, {"A green Cube"}),
    ],
)
def test_a_wrong_prompt_differs_in_one_thing(prompt: str, among: set[str], never: set[str]) -> None:
    found = {*wrong_prompts(prompt)}
    assert among <= found
    assert not found & (never | {prompt})


@pytest.mark.parametrize("prompt", ["", "a fox", "a reddish fox", "someone", "insideout", "東京"])
def test_a_prompt_without_such_a_word_has_no_wrong_prompt(prompt: str) -> None:
    assert list(wrong_prompts(prompt)) == []


def test_a_hard_negative_pairs_the_winner_with_itself_under_a_wrong_prompt() -> None:
    records: list[Record] = [
        pair("a red fox"),
        pair("a red fox"),  # the same image and prompt gives no second one
        pair("a red fox", winner=B),
        pair("a fox"),
        pair("a blue fox", tie=True),
        PreferencePair(A, B, "a green fox", "a pink fox"),
        LabelledImage(A, "a white fox", 1),
    ]
    found = hard_negatives(records, fraction=1.0, seed=0)
    assert [(record.winner, record.loser) for record in found] == [(A, A), (B, B)]
    for record in found:
        assert record.winner_prompt == "a red fox"
        assert record.loser_prompt in {*wrong_prompts("a red fox")}
        assert not record.tie
        assert record.where.startswith("hard negative of ")


def test_hard_negatives_depend_on_the_seed_and_not_on_the_other_records() -> None:
    records: list[Record] = [pair(f"a red fox and a blue cat, number {i}") for i in range(400)]
    some = hard_negatives(records, fraction=0.25, seed=1)
    assert len(some) == pytest.approx(100, abs=35)  # four standard deviations
    assert some == hard_negatives(records, fraction=0.25, seed=1)
    assert [*reversed(some)] == hard_negatives([*reversed(records)], fraction=0.25, seed=1)
    assert {one.loser_prompt for one in some} != {
        one.loser_prompt for one in hard_negatives(records, fraction=0.25, seed=2)
    }
    assert hard_negatives(records, fraction=0.0, seed=1) == []
    assert {one.winner_prompt for one in some} <= {
        one.winner_prompt for one in hard_negatives(records, fraction=0.5, seed=1)
    }


def test_held_out_prompts_are_no_hard_negatives() -> None:
    others = {prompt for prompt in wrong_prompts("a red fox") if prompt != "a pink fox"}
    held_out = prompt_keys([pair(prompt.upper()) for prompt in others])
    (only,) = hard_negatives([pair("a red fox")], fraction=1.0, seed=0, held_out=held_out)
    assert only.loser_prompt == "a pink fox"
    held_out = np.concatenate([held_out, prompt_keys([pair("A pink fox!")])])
    assert hard_negatives([pair("a red fox")], fraction=1.0, seed=0, held_out=held_out) == []


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction is {fraction}; it must be in"):
        hard_negatives([], fraction=fraction, seed=0)
