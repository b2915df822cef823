"""Perspectives that read an image alike share one pass of the language model, and no others do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from reward_model.model import RewardModel
from reward_model.scoring import LlavaReward
from tests.reward_models import FAMILIES, facts_of, fresh_backbone, random_image

PROMPTS = ["a red fox", "a blue cat on a fox", "cat"]
NAMES = ("alignment", "fidelity", "safety")


def judge_of(family: str) -> LlavaReward:
    """Three perspectives of which only SkipCA and head were trained, as `learn(("skip_ca", "head"))` leaves them."""
    model = RewardModel(fresh_backbone(family))
    for seed, name in enumerate(NAMES):
        model.add(facts_of(family, perspective=name), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for group in ("skip_ca", "head"):
            for parameter in model.groups(name)[group].values():
                parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return LlavaReward(model)


def passes(judge: LlavaReward, run: Callable[[], object]) -> int:
    """How often the language model runs."""
    calls: list[nn.Module] = []
    handle = judge.model.backbone.language_model.register_forward_hook(lambda module, *_: calls.append(module))
    run()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_gives_the_scores_that_each_perspective_gives_alone(family: str) -> None:
    judge = judge_of(family)
    shown = [random_image(60, 60, seed=seed) for seed in range(3)]
    alone = {name: judge.score(shown, PROMPTS, perspective=name) for name in NAMES}
    assert min((alone[a] - alone[b]).abs().max() for a in NAMES for b in NAMES if a < b) > 0.05
    assert passes(judge, lambda: judge.score_all(shown, PROMPTS)) == 1
    for name, scores in judge.score_all(shown, PROMPTS).items():
        assert torch.equal(scores, alone[name])
    some = judge.score_all(shown, PROMPTS, perspectives=["safety", "fidelity"])
    assert list(some) == ["safety", "fidelity"]
    assert torch.equal(some["safety"], alone["safety"])
    with pytest.raises(KeyError, match="no perspective 'quality'"):
        judge.score_all(shown, PROMPTS, perspectives=["quality"])


def test_the_gradient_of_a_shared_pass_is_the_sum_of_all() -> None:
    judge = judge_of("llava")
    gradients = []
    for names in (NAMES, *((name,) for name in NAMES)):
        pixels = random_image(28, 28).requires_grad_()
        scores = judge.score_all([pixels], ["a fox"]) if len(names) > 1 else None
        parts = scores.values() if scores else [judge.score([pixels], ["a fox"], perspective=names[0])]
        torch.cat(list(parts)).sum().backward()
        assert pixels.grad is not None
        gradients.append(pixels.grad)
    torch.testing.assert_close(gradients[0], sum(gradients[1:]), rtol=1e-4, atol=1e-6)


def change_lora(model: RewardModel) -> None:
    next(t for key, t in model.groups("fidelity")["lora"].items() if "lora_B" in key).data[0, 0] = 0.5


def change_projector(model: RewardModel) -> None:
    next(iter(model.groups("fidelity")["projector"].values())).data.view(-1)[0] += 0.5


@pytest.mark.parametrize("change", [change_lora, change_projector])
def test_a_perspective_that_reads_otherwise_has_a_pass_of_its_own(change: Callable[[RewardModel], None]) -> None:
    judge = judge_of("llava")
    change(judge.model)
    shown = [random_image(28, 28)]
    assert passes(judge, lambda: judge.score_all(shown, PROMPTS[:1])) == 2
    everything = judge.score_all(shown, PROMPTS[:1])
    for name in NAMES:
        assert torch.equal(everything[name], judge.score(shown, PROMPTS[:1], perspective=name))


@pytest.mark.parametrize(("alpha", "alike"), [(4.0, True), (8.0, False)])
def test_equal_loras_read_alike_if_they_are_scaled_alike(alpha: float, alike: bool) -> None:
    """Rank 2 and alpha 4; the same weights at another alpha are another LoRA."""
    model = RewardModel(fresh_backbone("llava"))
    model.add(facts_of("llava", perspective="alignment", lora_alpha=4.0))
    model.add(facts_of("llava", perspective="safety", lora_alpha=alpha))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.groups("alignment")["lora"].items():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        model.groups("safety")["lora"][key].data = parameter.data.clone()
    assert model.reads_alike("alignment", "safety") is alike
