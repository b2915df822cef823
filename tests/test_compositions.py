"""Compositions: images show their prompts, near misses are wrong in one respect; captions read no held-out prompt."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from rlhf_t2i.shapes.composition_oracle import composition_scores
from rlhf_t2i.shapes.composition_pairs import (
    CompositionPairs,
    graded_pairs,
    strict_pairs,
    tied_pairs,
    with_wrong_labels,
)
from rlhf_t2i.shapes.compositions import (
    TIERS,
    Composition,
    Tier,
    detailed_caption,
    near_miss,
    random_composition,
    random_layout,
    true_statements,
)
from rlhf_t2i.shapes.domains import DOMAINS, restyle
from rlhf_t2i.shapes.scenes import Thing

RED, GREEN = Thing("red", "circle"), Thing("green", "square")


def scores(pairs: CompositionPairs) -> tuple[np.ndarray, np.ndarray]:
    winners, losers = (composition_scores(side, pairs.prompts).numpy() for side in (pairs.winners, pairs.losers))
    return winners, losers


def test_prompts_by_hand() -> None:
    assert Composition((RED, GREEN), "blue").prompt == "a red circle and a green square on a blue background"
    assert Composition((RED,) * 4, "blue").prompt == "four red circles on a blue background"
    relation = Composition((RED, GREEN), "blue", "left of", negated=True)
    assert relation.prompt == "a red circle not left of a green square on a blue background"


def test_the_oracle_passes_winners_and_no_loser_in_every_tier() -> None:
    pairs = strict_pairs(20 * len(TIERS), "held-out", seed=0)
    right, wrong = scores(pairs)
    assert (right == 1).mean() > 0.95
    assert (wrong < 1).all()
    assert all(prompt.held_out for prompt in pairs.prompts)


@pytest.mark.parametrize("tier", ["binding", "binding3", "relation"])
def test_a_bag_of_words_cannot_tell_a_loser_of_a_harder_tier(tier: Tier) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        prompt = random_composition(tier, rng)
        miss = near_miss(prompt, tier, rng)
        if tier != "relation":
            assert Counter(prompt.prompt.split()) == Counter(miss.prompt.split())
        assert Counter(thing.colour for thing in prompt.things) == Counter(thing.colour for thing in miss.things)
        assert Counter(thing.shape for thing in prompt.things) == Counter(thing.shape for thing in miss.things)
        assert miss.held_out == prompt.held_out


def test_true_statements_hold_by_the_oracle_and_are_read_in_training_only() -> None:
    rng = np.random.default_rng(1)
    prompts = {one.prompt for one in (random_composition(tier, rng, split="held-out") for tier in TIERS * 200)}
    for tier in ("attribute", "binding3", "count", "relation"):
        for _ in range(50):
            found = true_statements(random_composition(tier, rng, split="training"))
            assert found
            assert not prompts & set(found)
    scene = Composition((RED, GREEN), "blue", "left of")
    assert "a green square not above a red circle on a blue background" in true_statements(scene)
    assert "a red circle not left of a green square on a blue background" not in true_statements(scene)


def test_a_detailed_caption_names_the_place_of_each_thing() -> None:
    layout = np.array([[0.1, 0.1, 0.1], [0.9, 0.5, 0.1]])
    found = detailed_caption(Composition((RED, GREEN), "blue"), layout, np.random.default_rng(0))
    parts = found.removesuffix(" on a blue background").split(" and ")
    assert sorted((sorted(part.split()) for part in parts), reverse=True) == [
        sorted(["green", "square", "middle", "right"]),
        sorted(["red", "circle", "top", "left"]),
    ]


def test_ties_are_two_right_images_and_graded_pairs_two_wrong_ones() -> None:
    right, also_right = scores(tied_pairs(14, "held-out", seed=0))
    assert (right == also_right).mean() > 0.9
    better, worse = scores(graded_pairs(20, "held-out", seed=0))
    assert (better > worse).mean() > 0.9
    assert (better < 1).all()


def test_wrong_labels_exchange_exactly_the_fraction_asked_for() -> None:
    pairs = strict_pairs(20, "training", seed=0)
    wrong = with_wrong_labels(pairs, 0.25, seed=0)
    exchanged = (wrong.winners == pairs.losers).flatten(1).all(1)
    assert exchanged.sum() == 5
    assert torch.equal(wrong.losers[exchanged], pairs.winners[exchanged])
    assert torch.equal(wrong.winners[~exchanged], pairs.winners[~exchanged])


def test_a_domain_changes_the_rendering_by_its_seed_and_stays_in_range() -> None:
    images = strict_pairs(7, "held-out", seed=0).winners
    for domain in DOMAINS:
        one, two = (restyle(images, domain, rng=np.random.default_rng(3)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.min() >= 0
        assert one.max() <= 1
        assert torch.equal(one, images) == (domain == "flat")


def test_turned_hues_keep_gray_and_the_names_of_colours() -> None:
    gray = torch.full((2, 3, 8, 8), 0.5)
    torch.testing.assert_close(restyle(gray, "rotated", rng=np.random.default_rng(0)), gray)
    pairs = strict_pairs(70, "held-out", seed=0)
    turned = restyle(pairs.winners, "rotated", rng=np.random.default_rng(0))
    assert (composition_scores(turned, pairs.prompts) == 1).float().mean() > 0.8


def test_things_that_are_counted_have_one_size_whatever_their_number() -> None:
    rng = np.random.default_rng(0)
    radii = [random_layout(Composition((RED,) * n, "blue"), rng)[:, 2] for n in (1, 2, 5) for _ in range(30)]
    assert min(map(np.min, radii)) >= 0.125
    assert max(map(np.max, radii)) <= 0.135
