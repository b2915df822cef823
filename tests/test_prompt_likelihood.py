"""The readout prompt_likelihood: log p(prompt | image) as transformers computes it, and what it cannot be used with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reward_model.benchmarks.evaluation import score_records
from reward_model.config import RewardModelConfig
from reward_model.losses import Objective
from reward_model.model import RewardModel
from reward_model.online import OnlineRewardModel
from reward_model.prompt_likelihood import prompt_log_likelihood, token_contributions
from reward_model.scorers.load import load_scorer
from reward_model.scoring import LlavaReward
from reward_model.types import LabelledImage
from rlhf_t2i.settings.train_reward_model import Config
from tests.reward_models import backbone_folder, config_of, fresh_backbone, fresh_model, reward_model_folder

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
OPTIONS = {"readout": "prompt_likelihood", "skip_ca": False}


def images(count: int = 2) -> list[Tensor]:
    return list(torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_it_is_the_loss_of_transformers(family: str, padding_side: str) -> None:
    """Of each row alone, unpadded, with labels on the tokens behind the image only."""
    backbone = fresh_backbone(family)
    backbone.prompt_tokenizer = replace(backbone.prompt_tokenizer, padding_side=padding_side)
    prompts = ["a red fox", "a fox in a red red fox"]
    batch = backbone.prepare(images(), prompts)
    ours = prompt_log_likelihood(backbone.forward(batch), batch["input_ids"], backbone)[:, 0]

    assert len({int(mask.sum()) for mask in batch["attention_mask"]}) == 2  # one row is padded
    for image, prompt, log_likelihood in zip(images(), prompts, ours, strict=True):
        inputs = backbone.prepare([image], [prompt])
        ids = inputs["input_ids"]
        last = int((ids[0] == backbone.prompt_tokenizer.image_token_id).nonzero().max())
        labels = ids.clone()
        labels[:, : last + 1] = -100
        if family.startswith("qwen"):
            inputs["mm_token_type_ids"] = (ids == backbone.prompt_tokenizer.image_token_id).int()
        loss = backbone.model(**inputs, labels=labels).loss
        torch.testing.assert_close(log_likelihood, -loss * (labels != -100).sum(), atol=1e-4, rtol=1e-4)


def test_a_score_is_the_temperature_times_it_and_a_difference_the_log_odds() -> None:
    reward_model = LlavaReward.from_pretrained(reward_model_folder("llava", **OPTIONS, temperature=0.1))
    backbone, batch = reward_model.model.backbone, images()
    inputs = backbone.prepare(batch, ["a red fox"] * 2)
    with torch.no_grad():
        expected = prompt_log_likelihood(backbone.forward(inputs), inputs["input_ids"], backbone)[:, 0]

    scores = reward_model.score(batch, ["a red fox"] * 2)
    torch.testing.assert_close(scores, 0.1 * expected)
    assert (scores < 0).all()
    probability = reward_model.compare(batch[:1], batch[1:], ["a red fox"])
    torch.testing.assert_close(probability, (expected[0] - expected[1]).sigmoid()[None])


@pytest.mark.parametrize("family", FAMILIES)
def test_its_parameters_are_lora_and_projector_and_both_learn(family: str) -> None:
    model = fresh_model(family, **OPTIONS)
    assert set(model.groups("alignment")) == {"lora", "projector"}
    model.set_trainable()
    model(**model.backbone.prepare(images(), ["a red fox"] * 2)).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_contributions_of_tokens_add_up_to_the_difference_of_two_images(family: str) -> None:
    """The images have different numbers of visual tokens; templates have tokens of white space."""
    backbone, prompt = fresh_backbone(family), "a red\nfox"
    pair = [torch.rand(3, 28, width, generator=torch.Generator().manual_seed(width)) for width in (28, 84)]
    batches = [backbone.prepare([image], [prompt]) for image in pair]
    first, second = (prompt_log_likelihood(backbone.forward(b), b["input_ids"], backbone).item() for b in batches)
    found = token_contributions(backbone, pair[0], pair[1], prompt)
    assert sum(nats for _, nats in found) == pytest.approx(first - second, abs=1e-4)
    texts = [text for text, _ in found]
    assert {"a", "red"} <= set(texts)
    assert all(text.strip() for text in texts)
    if family.startswith("qwen"):
        assert "Ċ" in texts  # a line break, by the name of its token


def test_it_is_differentiable_in_the_image() -> None:
    reward_model = LlavaReward.from_pretrained(reward_model_folder("llava", **OPTIONS))
    batch = torch.stack(images()).requires_grad_()
    reward_model.score(batch, ["a red fox"] * 2).sum().backward()
    assert batch.grad is not None
    assert batch.grad.abs().amax(dim=(1, 2, 3)).gt(0).all()


@pytest.mark.parametrize("changes", [{"skip_ca": True}, {"skip_ca": False, "head": "general_preference"}])
def test_a_config_with_skip_ca_or_a_comparing_head_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="readout is prompt_likelihood, with skip_ca"):
        config_of("llava", readout="prompt_likelihood", **changes)


def test_a_model_without_language_head_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a language-model head; Phi3V is loaded without one"):
        fresh_model("phi3_v", **OPTIONS)


def test_a_template_with_the_image_at_the_end_is_refused() -> None:
    model = fresh_model("llava", **OPTIONS)
    ids = torch.tensor([[1, model.backbone.prompt_tokenizer.image_token_id]])
    output = model.backbone.forward(model.backbone.prepare(images(1), ["a"]))
    output = replace(output, hidden=output.hidden[:, :2], hidden_mask=output.hidden_mask[:, :2])
    with pytest.raises(ValueError, match="needs a chat template with text behind the image"):
        model.score(output, ids, "alignment")


def test_votes_do_not_teach_it() -> None:
    model = fresh_model("llava", **OPTIONS)
    with pytest.raises(ValueError, match="readout is prompt_likelihood, which has no head"):
        OnlineRewardModel(
            model, num_members=1, groups=("head",), learning_rate=1e-3, batch_size=2, tie_width=0.0, seed=0
        )


def test_an_earlier_config_without_readout_reads_the_last_token() -> None:
    config = config_of("llava")
    earlier = config.to_json().replace(' "readout": "last_token",\n', "")
    assert "readout" not in earlier
    assert RewardModelConfig.from_json(earlier, where="x") == config


def test_before_training_it_is_the_backbones_own() -> None:
    backbone = fresh_backbone("llava")
    inputs = backbone.prepare(images(), ["a red fox"] * 2)
    with torch.no_grad():
        before = prompt_log_likelihood(backbone.forward(inputs), inputs["input_ids"], backbone)
        model = RewardModel(backbone)
        model.add(config_of("llava", **OPTIONS))
        torch.testing.assert_close(model.eval()(**inputs), 0.1 * before)


def test_visual_gpt_score_is_that_of_the_untrained_backbone() -> None:
    """Without the temperature of a reward model."""
    prompts = ["a red fox", "cat"]
    model = RewardModel(fresh_backbone("llava"))
    model.add(config_of("llava", **OPTIONS, temperature=0.1))
    with torch.no_grad():
        expected = 10 * model.eval()(**model.backbone.prepare(images(), prompts))[:, 0]
    score = load_scorer(f"visual_gpt_score:{backbone_folder('llava')}").score(torch.stack(images()), prompts)
    torch.testing.assert_close(score, expected)


def test_visual_gpt_score_needs_a_language_head() -> None:
    with pytest.raises(ValueError, match="needs a language-model head"):
        load_scorer(f"visual_gpt_score:{backbone_folder('phi3_v')}")


def test_a_loss_on_single_images_is_refused() -> None:
    with pytest.raises(
        ValueError, match="loss is cross_entropy; readout prompt_likelihood is trained by bradley_terry"
    ):
        Objective(loss="cross_entropy", readout="prompt_likelihood")


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("skip_ca", False, "true with readout prompt_likelihood, which has no SkipCA in any case"),
        ("skip_ca_heads", 2, "1 with readout prompt_likelihood, which has no SkipCA"),
        ("skip_ca_learning_rate", 1e-3, "null with readout prompt_likelihood, which has no SkipCA"),
        ("head_learning_rate", 1e-3, "null with readout prompt_likelihood, which has no head"),
    ],
)
def test_options_of_what_it_has_not_are_refused(option: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}; it must be {rule}"):
        Config(readout="prompt_likelihood", **{option: value})
    assert getattr(Config(**{option: value}), option) == value


def test_labels_are_not_evaluated_with_it() -> None:
    reward_model = LlavaReward.from_pretrained(reward_model_folder("llava", **OPTIONS))
    label = LabelledImage(Path("fox.png"), "a red fox", 1, "labels.jsonl:1")
    with pytest.raises(ValueError, match=r"labels\.jsonl:1 is a label; readout prompt_likelihood"):
        score_records(reward_model, [label], batch_size=1)
