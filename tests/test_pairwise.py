"""The reward that counts the pairs an image wins: by hand, by all pairs, in whole groups everywhere, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes import ddpo
from rlhf_t2i.rewards.async_reward import AsyncReward
from rlhf_t2i.rewards.gradient import require_gradient
from rlhf_t2i.rewards.load import as_weighted_sum, load_reward, load_rewards
from rlhf_t2i.rewards.pairwise import PairwiseReward, win_shares
from rlhf_t2i.rewards.trial import try_rewards
from rlhf_t2i.search.context import SearchContext, Veto
from tests.policies import policy_of, sampler_of
from tests.reward_models import load, random_image, reward_model_folder
from tests.runs import REDNESS, as_for_toy_models, redness, rows
from tests.servers import served

PROMPTS = ["a red fox"] * 4 + ["cat"] * 3
IMAGES = torch.stack([random_image(28, 28, seed=seed) for seed in range(7)])


@pytest.fixture(scope="module")
def name() -> str:
    return f"pairwise:{reward_model_folder('llava', head='general_preference')}"


def ranks(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward of one's own that needs whole groups: the rank of each image by redness, and the size of the group."""
    assert len(set(prompts)) == 1
    return redness(images, list(prompts)).argsort().argsort() + 100.0 * len(images)


ranks.needs_groups = True  # type: ignore[attr-defined]


# --- the score ------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    """A circle of three, the last of four, and a tie."""
    circle = torch.tensor([[0.0, 2.0, -1.0], [-2.0, 0.0, 0.5], [1.0, -0.5, 0.0]])
    assert win_shares(circle).tolist() == [0.5, 0.5, 0.5]
    ordered = torch.tensor([3.0, 1.0, 1.0, 0.0])
    shares = win_shares(ordered[:, None] - ordered)
    assert shares.tolist() == pytest.approx([1, 0.5, 0.5, 0])


@pytest.mark.parametrize("head", ["general_preference", "scalar"])
def test_the_reward_is_the_share_of_pairs_that_the_model_decides_for_an_image(head: Any) -> None:
    """Pair by pair, in both orders, by the model's comparison of two images."""
    model = load("llava", head=head)
    expected = torch.zeros(7)
    for group in (range(4), range(4, 7)):
        for i in group:
            for j in (j for j in group if j != i):
                probability = model.compare(IMAGES[i : i + 1], IMAGES[j : j + 1], [PROMPTS[i]])
                expected[i] += (probability > 0.5).float().item() / (len(group) - 1)
    reward = PairwiseReward(reward_model_folder("llava", head=head), batch_size=3)
    assert reward(IMAGES, PROMPTS).tolist() == pytest.approx(expected.tolist())
    assert len(set(expected[:4].tolist())) > 1


def test_scores_are_the_same_for_a_group_alone_in_a_batch_of_groups_and_over_http(name: str) -> None:
    alone = torch.cat([load_reward(name)(IMAGES[part], PROMPTS[part]) for part in (slice(4), slice(4, 7))])
    for reward in (load_rewards(name), load_rewards(f"{name}(batch_size=2, device='cpu')")):
        for sizes in ({}, {"batch_size": 2}):
            assert torch.equal(reward(IMAGES, PROMPTS, **sizes)[0], alone)
    with AsyncReward(load_rewards(name), batch_size=2) as scoring:
        for part in torch.arange(7).split(3):
            scoring.submit(IMAGES[part], [PROMPTS[int(i)] for i in part])
        assert torch.equal(scoring.results()[0], alone)
    with served(load_rewards(name)) as address:
        remote = load_rewards(address)
        try_rewards(remote, PROMPTS)
        assert torch.equal(remote(IMAGES, PROMPTS, batch_size=2)[0], alone)
        with ThreadPoolExecutor(8) as clients:  # requests of one prompt do not share a group
            answers = clients.map(lambda _: remote(IMAGES[4:], PROMPTS[4:])[0], range(8))
            assert all(torch.equal(answer, alone[4:]) for answer in answers)
        with pytest.raises(RuntimeError, match="One image of the prompt 'cat' has nothing to be compared with"):
            load_reward(address)(IMAGES[4:5], ["cat"])


def test_two_groups_of_one_prompt_are_kept_apart_by_their_size() -> None:
    reward = as_weighted_sum(ranks)
    prompts = ["a fox"] * 6
    together, apart = reward(IMAGES[:6], prompts)[0], reward(IMAGES[:6], prompts, group_size=3)[0]
    assert sorted(together.tolist()) == [600 + rank for rank in range(6)]
    assert sorted(apart.tolist()) == [300, 300, 301, 301, 302, 302]


# --- training, and what refuses it -----------------------------------------------------------------


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> ddpo.Config:
    return ddpo.Config(
        **as_for_toy_models(
            model=str(tiny_sd), prompts_per_step=2, images_per_prompt=4, num_denoising_steps=2, microbatch_size=3,
            rewards=f"tests.test_pairwise:ranks,{REDNESS}=0.5", evaluation_rewards=REDNESS, num_steps=1,
            num_evaluation_images=2, num_minibatches=1, evaluate_every=0, num_cpu_threads=1,
            run_folder=str(tmp_path / "run"),
        )
    )  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_hands_over_whole_groups_and_leaves_the_reward_out_of_evaluations(
    config: ddpo.Config, asynchronous: bool
) -> None:
    """Whatever the microbatch size, and also when scoring waits for no one."""
    folder = ddpo.main(replace(config, async_reward=asynchronous))
    (row,) = rows(folder, "train")
    assert row["rewards/tests.test_pairwise:ranks"] == 401.5
    assert all("ranks" not in key for key in rows(folder, "evaluation")[0])


def test_a_run_that_could_measure_nothing_else_is_refused(config: ddpo.Config) -> None:
    only = replace(config, rewards="tests.test_pairwise:ranks", evaluation_rewards="tests.test_pairwise:ranks")
    with pytest.raises(ValueError, match=r"test_pairwise:ranks' compares the images .* set evaluation_rewards"):
        ddpo.main(only)
    with pytest.raises(ValueError, match=r"test_pairwise:ranks' compares the images .* early_stop_reward needs"):
        ddpo.main(replace(config, early_stop_reward="tests.test_pairwise:ranks", evaluate_every=1))


def test_what_scores_images_one_by_one_refuses_it_by_name(tiny_sd: Path) -> None:
    reward, model = as_weighted_sum(ranks), policy_of(tiny_sd)
    sampler = sampler_of(model, eta=0.0)
    refused = pytest.raises(
        ValueError, match="The reward 'ranks' compares the images of one prompt with one another, but"
    )
    with refused:
        require_gradient(reward, prompt="a fox")
    with refused:
        SearchContext(model, reward, sampler=sampler)
    with refused:
        SearchContext(model, redness, sampler=sampler, veto=Veto(ranks, 0.5))
