"""The prompts of the toy world, and the prompts of each step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rlhf_t2i.data.prompts import load_prompts, prompts_of_step
from rlhf_t2i.shapes.scenes import all_scenes


def test_training_and_held_out_prompts_of_the_built_in_world_are_disjoint() -> None:
    training, held_out = load_prompts("shapes"), load_prompts("shapes", held_out=True)
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(scene.prompt for scene in all_scenes("one"))


# --- the prompts of a step ------------------------------------------------------------------------

PROMPTS = [f"prompt {i}" for i in range(10)]


@pytest.mark.parametrize("num_prompts", [1, 3, 10, 16])
def test_every_prompt_occurs_once_in_each_pass(num_prompts: int) -> None:
    """Also if the prompts of a step do not divide a pass."""
    steps = [prompts_of_step(PROMPTS, step, num_prompts=num_prompts, seed=0) for step in range(40)]
    assert all(len(step) == num_prompts for step in steps)
    sequence = [prompt for step in steps for prompt in step]
    for start in range(0, len(sequence) - 9, 10):
        assert Counter(sequence[start : start + 10]) == Counter(PROMPTS)


def test_the_prompts_of_a_step_depend_on_the_arguments_only() -> None:
    forward = [prompts_of_step(PROMPTS, step, num_prompts=4, seed=5) for step in range(12)]
    torch.manual_seed(1)
    backward = [prompts_of_step(PROMPTS, step, num_prompts=4, seed=5) for step in reversed(range(12))]
    assert forward == backward[::-1]


def test_each_pass_and_each_seed_has_another_order() -> None:
    passes = [tuple(prompts_of_step(PROMPTS, step, num_prompts=10, seed=seed)) for step in range(6) for seed in (0, 1)]
    assert len(set(passes)) == 12


def test_every_prompt_is_first_about_equally_often() -> None:
    """In 100 passes each of 10 prompts is expected 10 times; 30 is more than six standard deviations above that."""
    first = Counter(prompts_of_step(PROMPTS, step, num_prompts=10, seed=0)[0] for step in range(100))
    assert set(first) == set(PROMPTS)
    assert max(first.values()) < 30


def test_repeated_prompts_occur_as_often_as_they_are_listed() -> None:
    assert Counter(prompts_of_step(["a", "a", "b"], 0, num_prompts=6, seed=0)) == {"a": 4, "b": 2}


def test_the_global_generator_and_the_list_are_unchanged() -> None:
    before, prompts = torch.get_rng_state(), list(PROMPTS)
    prompts_of_step(prompts, 3, num_prompts=4, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert prompts == PROMPTS
