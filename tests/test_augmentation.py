"""Random changes of preference pairs: how often they come, and that they are a function of their address alone."""

from __future__ import annotations

import pytest

from rlhf_t2i.data.augmentation import Augmentation, PairChanges

ROWS = range(2000)


def test_nothing_changes_by_default() -> None:
    assert {Augmentation().changes(step, row) for step in range(3) for row in range(20)} == {PairChanges()}


def test_both_images_of_a_pair_flip_together_or_each_on_its_own() -> None:
    """As often as probability says: four standard errors of 2,000 draws."""
    together = [Augmentation("pair").changes(0, row) for row in ROWS]
    assert all(changes.flip_winner == changes.flip_loser for changes in together)
    alone = [Augmentation("image").changes(0, row) for row in ROWS]
    for flips in ([c.flip_winner for c in together], [c.flip_winner for c in alone], [c.flip_loser for c in alone]):
        assert sum(flips) / len(ROWS) == pytest.approx(0.5, abs=0.045)
    assert sum(c.flip_winner and c.flip_loser for c in alone) / len(ROWS) == pytest.approx(0.25, abs=0.04)


def test_a_fraction_of_the_prompts_is_empty_whatever_flips() -> None:
    flipped, plain = Augmentation("image", 0.2), Augmentation(proportion_empty_prompts=0.2)
    empty = [plain.changes(3, row).empty_prompt for row in ROWS]
    assert sum(empty) / len(ROWS) == pytest.approx(0.2, abs=0.036)
    assert empty == [flipped.changes(3, row).empty_prompt for row in ROWS]
    assert all(Augmentation(proportion_empty_prompts=1.0).changes(0, row).empty_prompt for row in ROWS)


def test_changes_depend_on_seed_step_and_row_alone() -> None:
    first = [Augmentation("image", 0.5, seed=1).changes(2, row) for row in range(20)]
    assert first == [Augmentation("image", 0.5, seed=1).changes(2, row) for row in reversed(range(20))][::-1]
    assert first != [Augmentation("image", 0.5, seed=2).changes(2, row) for row in range(20)]
    assert first != [Augmentation("image", 0.5, seed=1).changes(3, row) for row in range(20)]
