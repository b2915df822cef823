"""A generator is a pure function of its address."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rlhf_t2i.seeds import SAMPLE, UPDATE, generator_for, generators_for


def drawn(generator: torch.Generator) -> tuple[int, ...]:
    """Return a generator's first numbers; two generators give the same by chance with probability 2^-93."""
    return tuple(torch.randint(1 << 31, (3,), generator=generator).tolist())


def test_an_address_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    address = (3, SAMPLE, 7, 2)
    before = drawn(generator_for(*address))
    torch.randn(5)
    drawn(generator_for(1, UPDATE, 2))
    assert drawn(generator_for(*address)) == before


def test_different_addresses_give_different_numbers() -> None:
    addresses = list(product(range(5), (SAMPLE, UPDATE), range(20), range(10)))
    assert len({drawn(generator_for(*address)) for address in addresses}) == len(addresses)


@pytest.mark.parametrize("address", [(1, 2, 3, 4), (2, 1, 3, 4), (1, 2, 4, 3), (4, 3, 2, 1)])
def test_the_order_of_an_address_matters(address: tuple[int, ...]) -> None:
    assert drawn(generator_for(*address)) != drawn(generator_for(1, 3, 2, 4))


@pytest.mark.parametrize(
    ("one", "other"),
    [((3,), (3, 0)), ((3, 1), (3, 1, 0)), ((2**32 + 5, 7), (5, 1, 7))],
    ids=["one trailing zero", "another trailing zero", "a seed of more than 32 bits"],
)
def test_addresses_of_different_lengths_do_not_collide(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert drawn(generator_for(*one)) != drawn(generator_for(*other))


def test_the_numbers_of_a_prompt_do_not_depend_on_other_prompts() -> None:
    """So two processes with half of the prompts each draw the numbers that one process draws."""
    together = [drawn(generator) for generator in generators_for(0, SAMPLE, 5, range(6))]
    halves = [drawn(g) for prompts in (range(3), range(3, 6)) for g in generators_for(0, SAMPLE, 5, prompts)]
    alone = [drawn(generators_for(0, SAMPLE, 5, [prompt])[0]) for prompt in range(6)]
    assert together == halves == alone
    assert len(set(together)) == 6


def test_purposes_have_different_numbers() -> None:
    sample, update = (drawn(generators_for(0, purpose, 5, [1])[0]) for purpose in (SAMPLE, UPDATE))
    assert sample != update
