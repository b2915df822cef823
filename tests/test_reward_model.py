"""LlavaReward: dependence of its scores, trained parameters, checkpoints, comparisons and errors."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from reward_model import images
from reward_model.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_tensors,
    load_reward_model,
    read_config,
    save_adapter,
)
from reward_model.config import RewardModelConfig
from reward_model.losses import preference_losses
from reward_model.model import GROUPS, RewardModel, last_real_token, parameter_table
from reward_model.scoring import LlavaReward
from reward_model.types import LabelledImage, PreferencePair
from tests.reward_models import (
    ALL_FAMILIES,
    FAMILIES,
    WIDTH,
    backbone_folder,
    bytes_of,
    config_of,
    fresh_backbone,
    fresh_model,
    load,
    random_image,
    reward_model_folder,
    scatter,
)

PROMPTS = ["a red fox", "", "a blue cat on a red fox"]
SIZES = {
    "llava": [(28, 28), (40, 61), (90, 33)],
    "llava_next": [(56, 56), (112, 50), (61, 131)],
    "phi3_v": [(56, 56), (112, 50), (61, 131)],
    "qwen2_5_vl": [(56, 56), (112, 112), (61, 131)],
    "qwen3_vl": [(64, 64), (128, 128), (61, 131)],
}


def images_of(family: str) -> list[Tensor]:
    """Return images of three sizes; except for LLaVA, with different numbers of tokens."""
    return [random_image(*size, seed=i) for i, size in enumerate(SIZES[family])]


def assert_same(one: Tensor, other: Tensor) -> None:
    assert_close(one, other, rtol=0, atol=2e-5)


@contextmanager
def counting(module: torch.nn.Module) -> Iterator[list[int]]:
    """Count the calls of a module, as the length of a list."""
    calls: list[int] = []
    hook = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def vision_tower(reward_model: LlavaReward) -> torch.nn.Module:
    inner: Any = reward_model.model.backbone.model.model
    return inner.visual if hasattr(inner, "visual") else inner.vision_tower


# --- gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 56), (60, 81)])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_pixel_gradient_of_a_score_equals_finite_differences(family: str, size: tuple[int, int]) -> None:
    """Along five directions, through resizing, vision tower, projector, language model, SkipCA and head.

    In float32 (both families compute their norms in it), with images that stay clear of black and white.
    """
    reward_model, pixels = load(family), random_image(*size, low=0.35, high=0.65).requires_grad_()
    reward_model.score([pixels], ["a red fox"]).sum().backward()
    generator, step = torch.Generator().manual_seed(0), 5e-4 if family in ("llava_next", "qwen3_vl") else 2e-3
    for _ in range(5):
        # Smooth directions: white noise would mostly cancel where an image is downsampled.
        coarse = torch.randn(1, 3, 6, 6, generator=generator)
        direction = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0]
        ahead, behind = (pixels.detach() + sign * step * direction for sign in (1, -1))
        difference = reward_model.score([ahead, behind], ["a red fox"] * 2) @ torch.tensor([1.0, -1.0]) / (2 * step)
        pixel_gradient = (pixels.grad * direction).sum()
        assert_close(difference, pixel_gradient, rtol=0.02, atol=0.02 * pixels.grad.norm().item())
        assert pixel_gradient.abs() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_saturated_pixels_keep_their_gradient(family: str) -> None:
    """A policy that has reached black or white must be able to leave it."""
    reward_model = load(family)
    saturated = (random_image(56, 56) > 0.5).float()
    gradients = []
    for inset in (0.0, 1e-4):
        pixels = saturated.lerp(torch.tensor(0.5), inset).requires_grad_()
        reward_model.score([pixels], ["a red fox"]).sum().backward()
        gradients.append(pixels.grad)
    assert_close(*gradients, rtol=0.02, atol=1e-3 * gradients[0].abs().max().item())
    if family == "qwen2_5_vl":  # nothing is resized, so no two pixels' gradients can cancel
        assert torch.all(gradients[0] != 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_beyond_black_and_white_score_as_if_clamped(family: str) -> None:
    """Also where an image is resized: the processors of both families resize images of 8 bits."""
    wild = [random_image(*size, seed=i, low=-0.7, high=1.8) for i, size in enumerate(SIZES[family])]
    reward_model = load(family)
    assert_same(reward_model.score(wild, PROMPTS), reward_model.score([one.clamp(0, 1) for one in wild], PROMPTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_images_gradient_is_its_own(family: str) -> None:
    reward_model = load(family)
    together = [one.requires_grad_() for one in images_of(family)]
    reward_model.score(together, PROMPTS, batch_size=2).sum().backward()
    for one, prompt in zip(together, PROMPTS, strict=True):
        alone = one.detach().clone().requires_grad_()
        reward_model.score([alone], [prompt]).sum().backward()
        assert_close(one.grad, alone.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_kept_only_for_an_image_that_requires_it_and_never_for_weights(family: str) -> None:
    reward_model, plain = load(family), random_image(56, 56)
    assert not reward_model.score([plain], ["a fox"]).requires_grad
    asking = plain.clone().requires_grad_()
    with torch.no_grad():
        assert not reward_model.score([asking], ["a fox"]).requires_grad
    assert not reward_model.score([asking.detach()], ["a fox"]).requires_grad
    reward_model.score([plain, asking], ["a fox"] * 2).sum().backward()
    assert asking.grad.abs().max() > 0
    reward_model.compare([asking], [plain], ["a fox"]).sum().backward()
    batch = torch.stack([plain, plain]).requires_grad_()
    reward_model.score(batch, ["a fox"] * 2).sum().backward()
    assert batch.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in reward_model.model.parameters())
    in_training = fresh_model(family)
    in_training.set_trainable()
    assert not LlavaReward(in_training).score([plain], ["a fox"]).requires_grad


# --- independence of the batch --------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_score_does_not_depend_on_its_batch_order_or_padding_side(family: str, side: str) -> None:
    """The batch has other sizes, other numbers of visual tokens, and longer and shorter prompts."""
    reward_model = LlavaReward(fresh_model(family, padding_side=side))
    images = images_of(family)
    alone = torch.cat([reward_model.score([one], [prompt]) for one, prompt in zip(images, PROMPTS, strict=True)])
    assert alone.std() > 0.1
    assert_same(reward_model.score(images, PROMPTS), alone)
    assert_same(reward_model.score(images, PROMPTS, batch_size=2), alone)
    for order in ([2, 0, 1], [1, 2, 0], [2, 1, 0, 0, 1]):
        assert_same(reward_model.score([images[i] for i in order], [PROMPTS[i] for i in order]), alone[order])
    assert_same(alone, load(family).score(images, PROMPTS))  # padded on the right


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_depends_on_the_image_and_on_the_prompt(family: str) -> None:
    """A guard for all tests of equality here."""
    reward_model, images = load(family), [random_image(56, 56, seed=i) for i in range(4)]
    of_images, of_prompts = reward_model.score(images, ["a red fox"] * 4), reward_model.score(images[:1] * 3, PROMPTS)
    assert of_images.std() > 0.1
    assert of_prompts.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_all_input_types_of_one_image_have_the_same_score(family: str, tmp_path: Path) -> None:
    pixels = bytes_of(60, 57)
    array = pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "image.png")
    kinds = [pixels.float() / 255, pixels, array, array / 255.0, Image.fromarray(array), tmp_path / "image.png"]
    reward_model = load(family)
    scores = reward_model.score([*kinds, str(tmp_path / "image.png")], ["a red fox"] * 7)
    assert_same(scores, scores[:1].expand(7))
    assert_same(reward_model.score(torch.stack([kinds[0]] * 2), ["a red fox"] * 2), scores[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_scores_are_float32_and_the_batch_size_does_not_change_them(family: str, dtype: torch.dtype) -> None:
    reward_model = LlavaReward.from_pretrained(reward_model_folder(family), dtype=dtype)
    images, prompts = images_of(family) * 2, PROMPTS * 2
    whole = reward_model.score(images, prompts)
    assert whole.dtype == torch.float32
    tolerance = 2e-5 if dtype == torch.float32 else 0.1 * whole.std().item()
    for batch_size in (1, 4, 100):
        assert_close(reward_model.score(images, prompts, batch_size=batch_size), whole, rtol=0, atol=tolerance)
    exact = load(family).score(images, prompts)
    assert_close(whole, exact, rtol=0, atol=tolerance if dtype == torch.float32 else 0.5 * exact.std().item())


def test_the_last_real_token_is_found_on_either_side() -> None:
    hidden = torch.arange(24.0).reshape(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert torch.equal(last_real_token(hidden, mask), torch.stack([hidden[0, 1], hidden[1, 3], hidden[2, 3]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_the_head_of_skip_ca_of_the_last_token_and_the_visual_tokens(family: str) -> None:
    model = fresh_model(family)
    images = images_of(family)
    inputs, part = model.backbone.prepare(images, PROMPTS), model.perspectives["alignment"]
    with torch.no_grad():
        output, expected = model.backbone.forward(inputs), []
        for i in range(3):
            last, visual = output.hidden[i][output.hidden_mask[i]][-1:], output.visual[i][output.visual_mask[i]]
            everything = torch.ones(1, len(visual), dtype=torch.bool)
            expected.append(part.head(part.skip_ca(last, visual[None], everything)))
        assert_same(model(**inputs), torch.cat(expected))


# --- training -------------------------------------------------------------------------------------


def snapshot(model: RewardModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def one_step(model: RewardModel, family: str) -> None:
    """Take one step of AdamW on one pair."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    outputs = model(**model.backbone.prepare(images_of(family)[:2], ["a red fox", "a red fox"]))
    preference_losses((outputs[:1] - outputs[1:])[:, 0], torch.tensor([False])).sum().backward()
    optimizer.step()


def names_in(model: RewardModel, group: str) -> set[str]:
    """Return the names, within the model, of a group's parameters of the active perspective."""
    ids = {id(parameter) for parameter in model.groups(model.active)[group].values()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize("groups", [GROUPS, ("lora",), ("projector", "head"), ("skip_ca",)])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_one_step_moves_every_tensor_of_the_trained_groups_and_nothing_else(
    family: str, groups: tuple[str, ...]
) -> None:
    """LoRA's B is randomised first: while it is zero, as initially, A has no gradient (the next test)."""
    model = fresh_model(family)
    model.add(config_of(family, perspective="safety"))  # frozen too
    model.use("alignment")
    model.set_trainable(groups)
    before = snapshot(model)
    one_step(model, family)
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    expected = [names_in(model, group) for group in groups]
    assert all(expected)
    assert moved == set().union(*expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_lora_moves_b_in_the_first_step_and_all_in_two(family: str) -> None:
    model = RewardModel(fresh_backbone(family))
    model.add(config_of(family))
    model.set_trainable()
    lora = model.groups("alignment")["lora"]
    start = {name: parameter.detach().clone() for name, parameter in lora.items()}
    one_step(model, family)
    for name, parameter in lora.items():
        assert torch.equal(parameter, start[name]) == (".lora_A." in name)
    one_step(model, family)
    assert not any(torch.equal(parameter, start[name]) for name, parameter in lora.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_perspective_does_not_change_the_backbones_output(family: str) -> None:
    """The LoRA is initially without effect, and the projector is the backbone's own."""
    backbone = fresh_backbone(family)
    inputs = backbone.prepare(images_of(family), PROMPTS)
    with torch.no_grad():
        before = backbone.forward(inputs)
        model = RewardModel(backbone)
        model.add(config_of(family))
        after = backbone.forward(inputs)
    assert torch.equal(before.hidden, after.hidden)
    assert torch.equal(before.visual, after.visual)
    lora = model.groups("alignment")["lora"]
    assert len(lora) == 2 * 2 * 7  # A and B in two layers of seven matrices


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_of_a_batch_are_not_in_memory_together(family: str) -> None:
    """An iterator that opens files is asked for the next one when the one before the last is gone."""
    open_images, most = list[weakref.ref[torch.Tensor]](), list[int]()

    def opened() -> Iterator[torch.Tensor]:
        for image in images_of(family) * 2:
            open_images.append(weakref.ref(one := image.clone()))
            yield one
            del one
            most.append(sum(image() is not None for image in open_images))

    backbone = fresh_backbone(family)
    inputs = backbone.prepare(opened(), PROMPTS * 2)
    assert max(most) == 1
    expected = backbone.prepare(images_of(family) * 2, PROMPTS * 2)
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs.keys() | expected.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_parameters_are_float32_and_the_rest_is_as_loaded(dtype: torch.dtype) -> None:
    model = RewardModel(fresh_backbone("qwen2_5_vl", dtype=dtype))
    model.add(config_of("qwen2_5_vl"))
    model.set_trainable()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}


@pytest.mark.parametrize("skip_ca", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameter_table_adds_up(family: str, skip_ca: bool) -> None:
    model = fresh_model(family, skip_ca=skip_ca)
    rows = {name: int(n.replace(",", "")) for name, n in re.findall(r"^(\w+) +([\d,]+)$", parameter_table(model), re.M)}
    expected = {"lora", "projector", "head", "trained", "frozen"} | ({"skip_ca"} if skip_ca else set())
    assert rows.keys() == expected
    trained = sum(rows[group] for group in GROUPS if group in rows)
    total = sum(p.numel() for p in model.parameters())
    assert rows["trained"] == trained
    assert rows["trained"] + rows["frozen"] == total
    assert rows["head"] == WIDTH
    if skip_ca:
        assert rows["skip_ca"] == 3 * WIDTH**2 + WIDTH
    assert f"{100 * trained / total:.1f} % of {total:,} parameters are trained" in parameter_table(model)


def test_the_seed_determines_initial_weights_and_the_global_generator_is_unchanged() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        model = RewardModel(fresh_backbone("llava"))
        model.add(config_of("llava"), seed=seed)
        return adapter_tensors(model, "alignment")

    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = start(1), start(1), start(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert not any(torch.equal(one[key], other[key]) for key in one if ".lora_A." in key)


# --- adapter checkpoints --------------------------------------------------------------------------------------

PERSPECTIVES = {
    "alignment": {"seed": 1},
    "fidelity": {"seed": 2, "perspective": "fidelity", "skip_ca": False, "lora_rank": 3},
    "safety": {"seed": 3, "perspective": "safety", "skip_ca_heads": 4, "lora_alpha": 1.0},
}


@pytest.mark.parametrize("options", [{}, {"skip_ca": False}, {"head": "general_preference", "template": "published"}])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_saved_model_gives_identical_scores(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = fresh_model(family, **options)
    save_adapter(model.configs["alignment"], adapter_tensors(model, "alignment"), tmp_path)
    loaded = load_reward_model(tmp_path)
    inputs = model.backbone.prepare(images_of(family), PROMPTS)
    with torch.no_grad():
        assert torch.equal(model(**inputs), loaded(**loaded.backbone.prepare(images_of(family), PROMPTS)))
    assert loaded.configs == model.configs


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_checkpoint_holds_exactly_the_trained_tensors_and_the_config(family: str) -> None:
    folder, without = reward_model_folder(family), reward_model_folder(family, skip_ca=False)
    for bundle in (folder, without):
        assert {path.name for path in bundle.iterdir()} == {"llava_reward.safetensors", "llava_reward.json"}
    with_skip_ca, plain = load_file(folder / WEIGHTS_NAME), load_file(without / WEIGHTS_NAME)
    assert {key.partition(".")[0] for key in with_skip_ca} == set(GROUPS)
    assert {key.partition(".")[0] for key in plain} == set(GROUPS) - {"skip_ca"}
    assert {tensor.dtype for tensor in with_skip_ca.values()} == {torch.float32}
    assert json.loads((folder / CONFIG_NAME).read_text())["format"] == 1
    assert read_config(folder) == config_of(family)
    assert RewardModelConfig.from_json(config_of(family).to_json(), where="here") == config_of(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_skip_ca_a_score_is_the_head_of_the_last_token(family: str) -> None:
    model = fresh_model(family, skip_ca=False)
    inputs = model.backbone.prepare(images_of(family), PROMPTS)
    with torch.no_grad():
        output = model.backbone.forward(inputs)
        last = torch.stack([output.hidden[i][output.hidden_mask[i]][-1] for i in range(3)])
        assert_same(model(**inputs), last @ model.perspectives["alignment"].head.weight.T)


@pytest.mark.parametrize("family", FAMILIES)
def test_perspectives_on_one_backbone_score_as_each_alone_to_the_bit(family: str) -> None:
    """Also after switching back and forth; and all at once, with one run of the vision tower per image."""
    folders = {name: reward_model_folder(family, **options) for name, options in PERSPECTIVES.items()}
    images = images_of(family)
    own = {name: LlavaReward.from_pretrained(folder).score(images, PROMPTS) for name, folder in folders.items()}
    assert min((own[a] - own[b]).abs().max() for a in own for b in own if a < b) > 0.1
    reward_model = LlavaReward.from_pretrained(folders["alignment"])
    assert [reward_model.add(folders[name]) for name in ("fidelity", "safety")] == ["fidelity", "safety"]
    assert reward_model.perspectives == list(PERSPECTIVES)
    for name in ("safety", "alignment", "fidelity", "safety", "fidelity", "alignment"):
        assert torch.equal(reward_model.score(images, PROMPTS, perspective=name), own[name])
    assert torch.equal(reward_model.score(images, PROMPTS), own["alignment"])  # the first is the default
    with counting(vision_tower(reward_model)) as calls, counting(reward_model.model.backbone.language_model) as passes:
        everything = reward_model.score_all(images, PROMPTS)
    assert (len(calls), len(passes)) == (1, 3)
    assert {name: scores.tolist() for name, scores in everything.items()} == {
        name: scores.tolist() for name, scores in own.items()
    }
    with counting(vision_tower(reward_model)) as calls:
        for name, scores in reward_model.score_all(images, PROMPTS, batch_size=2).items():
            assert_same(scores, own[name])
    assert len(calls) == 2
    some = reward_model.score_all(images, PROMPTS, perspectives=["safety", "fidelity"])
    assert list(some) == ["safety", "fidelity"]
    assert torch.equal(some["safety"], own["safety"])
    assert all(not p.requires_grad for p in reward_model.model.parameters())
    assert not any(module.training for module in reward_model.model.modules())


def test_the_gradient_through_all_perspectives_is_the_sum_of_theirs() -> None:
    reward_model = load("qwen2_5_vl", **PERSPECTIVES["alignment"])
    reward_model.add(reward_model_folder("qwen2_5_vl", **PERSPECTIVES["safety"]))
    gradients = []
    for names in (["alignment", "safety"], ["alignment"], ["safety"]):
        pixels = random_image(60, 60).requires_grad_()
        scores = reward_model.score_all([pixels], ["a fox"]) if len(names) == 2 else None
        parts = scores.values() if scores else [reward_model.score([pixels], ["a fox"], perspective=names[0])]
        torch.cat(list(parts)).sum().backward()
        gradients.append(pixels.grad)
    assert_close(gradients[0], gradients[1] + gradients[2], rtol=1e-3, atol=1e-5)


def test_one_checkpoint_may_be_added_under_two_names_but_not_twice_under_one() -> None:
    reward_model = load("llava", seed=1)
    assert reward_model.add(reward_model_folder("llava", seed=2), name="second") == "second"
    with pytest.raises(ValueError, match="already is a perspective 'alignment'"):
        reward_model.add(reward_model_folder("llava", seed=2))
    images = images_of("llava")
    assert torch.equal(
        reward_model.score(images, PROMPTS, perspective="second"), load("llava", seed=2).score(images, PROMPTS)
    )
    assert torch.equal(reward_model.score(images, PROMPTS), load("llava", seed=1).score(images, PROMPTS))


@pytest.mark.parametrize("name", ["mlp", "self_attn", "layers", "q_proj", "lora", "lora_a", "default"])
def test_a_perspective_may_have_the_name_of_a_submodule(name: str) -> None:
    """Names in an adapter checkpoint are those of the model without the perspective's."""
    plain, named = load("llava"), load("llava", perspective=name)
    assert (
        load_file(reward_model_folder("llava", perspective=name) / WEIGHTS_NAME).keys()
        == adapter_tensors(plain.model, "alignment").keys()
    )
    images = images_of("llava")
    assert torch.equal(named.score(images, PROMPTS), plain.score(images, PROMPTS))


def test_a_checkpoint_with_its_backbone_can_be_moved(tmp_path: Path) -> None:
    """Its config has the backbone's path relative to its own folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(backbone_folder("llava"), here / "backbone")
    model = RewardModel(fresh_backbone("llava"))
    model.add(RewardModelConfig(backbone=str(here / "backbone"), model_type="llava", width=WIDTH, lora_rank=2))
    scatter(model, seed=0)
    save_adapter(model.configs["alignment"], adapter_tensors(model, "alignment"), here)
    expected = LlavaReward(model).score(images_of("llava"), PROMPTS)
    here.rename(there)
    assert torch.equal(LlavaReward.from_pretrained(there).score(images_of("llava"), PROMPTS), expected)


def test_checkpoints_share_a_backbone_by_its_absolute_path(tmp_path: Path) -> None:
    """One has it inside, another names its full path; a third has another one of the same name inside."""
    inside, outside, other = (tmp_path / name for name in ("inside", "outside", "other"))
    for seed, folder in enumerate((inside, other)):
        shutil.copytree(backbone_folder("llava"), folder / "backbone")
        shutil.copytree(reward_model_folder("llava", seed=seed), folder, dirs_exist_ok=True)
    shutil.copytree(reward_model_folder("llava", seed=2), outside)
    for folder, backbone in ((inside, "backbone"), (outside, str(inside / "backbone")), (other, "backbone")):
        changes = json.loads((folder / CONFIG_NAME).read_text())
        (folder / CONFIG_NAME).write_text(json.dumps(changes | {"backbone": backbone}))
    reward_model = LlavaReward.from_pretrained(inside)
    reward_model.add(outside, name="outside")
    with pytest.raises(ValueError, match=rf"{other} cannot share .* is '{other}/backbone', not '{inside}/backbone'"):
        reward_model.add(other, name="other")


def broken(tmp_path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Return a copy of the LLaVA adapter checkpoint with changes of its config."""
    folder = tmp_path / "broken"
    shutil.copytree(reward_model_folder("llava", seed=seed), folder)
    config = json.loads((folder / CONFIG_NAME).read_text()) | changes
    (folder / CONFIG_NAME).write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 64}, "width 64; this one has 32"),
        ({"model_type": "qwen2_5_vl"}, "a backbone of type 'qwen2_5_vl'; this one is 'llava'"),
        ({"colour": "red", "age": 3}, "unknown keys: age, colour"),
        ({"width": "absent", "backbone": "absent"}, "lacks keys: backbone, width"),
        ({"format": 2}, "not a reward model config of format 1"),
        ({"format": "absent"}, "not a reward model config of format 1"),
        ({"head": "vector"}, "'vector'"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"tie_width": -0.1}, "tie_width is -0.1; it must be at least 0"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be in"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it must be in"),
        ({"template": "mine"}, "'mine'"),
        ({"skip_ca_keys": "text"}, "'text'"),
        ({"skip_ca_eps": 0.0}, "skip_ca_eps is 0.0; it must be positive"),
        ({"perspective": "Not a name"}, "perspective is 'Not a name'; it must be a-z"),
        ({"perspective": "train"}, "perspective is 'train'; it must be .* no attribute"),
        ({"lora_rank": 3}, "does not fit its config: lora.* is .*not"),
        ({"skip_ca": False}, r"does not fit its config: skip_ca.* is unexpected"),
        ({"head": "general_preference"}, r"does not fit its config: head.weight is \(1, 32\), not \(2, 32\)"),
        ({"skip_ca_heads": 5}, r"skip_ca_heads \(5\) must divide the width"),
    ],
)
def test_an_invalid_config_is_named_with_its_file(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = broken(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        LlavaReward.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    (folder / CONFIG_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"llava_reward\.json is not JSON"):
        LlavaReward.from_pretrained(folder)
    (folder / CONFIG_NAME).write_text("[1]")
    with pytest.raises(ValueError, match=r"llava_reward\.json is not a reward model config of format 1"):
        LlavaReward.from_pretrained(folder)
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder} is not a reward model: it has no llava_reward\.json"):
        LlavaReward.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=f"no reward model in '{tmp_path}/nowhere'"):
        LlavaReward.from_pretrained(tmp_path / "nowhere")


def test_truncated_missing_and_unexpected_weights_are_named(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    path, whole = folder / WEIGHTS_NAME, (folder / WEIGHTS_NAME).read_bytes()
    tensors = load_file(
        reward_model_folder("llava") / WEIGHTS_NAME
    )  # not of `path`: they stay on the file, which gets shorter
    for size in (len(whole) - 1, len(whole) // 2, 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"The weights {path} cannot be read"):
            LlavaReward.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ValueError, match=rf"The weights {path} cannot be read"):
        LlavaReward.from_pretrained(folder)
    save_file({key: tensor for key, tensor in tensors.items() if key != "skip_ca.key.weight"}, path)
    with pytest.raises(ValueError, match=rf"{path} does not fit its config: skip_ca\.key\.weight is missing"):
        LlavaReward.from_pretrained(folder)
    save_file({**tensors, "skip_ca.bias": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"{path} does not fit its config: skip_ca\.bias is unexpected"):
        LlavaReward.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "published"}, "its template is 'published', not 'family'"),
        ({"width": 64}, "width 64; this one has 32"),
        ({"model_type": "qwen2_5_vl"}, "of type 'qwen2_5_vl'; this one is 'llava'"),
        ({"backbone": "elsewhere"}, "its backbone is 'elsewhere'"),
        ({"lora_rank": 3}, "does not fit its config"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_model_unchanged(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """No untrained perspective may be left for score_all."""
    reward_model, images = load("llava"), images_of("llava")
    before, tensors = reward_model.score(images, PROMPTS), set(reward_model.model.state_dict())
    folder = broken(tmp_path, seed=2, perspective="safety", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        reward_model.add(folder)
    assert str(folder) in str(caught.value)
    assert reward_model.perspectives == ["alignment"]
    assert list(reward_model.score_all(images, PROMPTS)) == ["alignment"]
    assert torch.equal(reward_model.score(images, PROMPTS), before)
    assert set(reward_model.model.state_dict()) == tensors
    assert reward_model.add(reward_model_folder("llava", seed=2, perspective="safety")) == "safety"  # the name is free
    own = load("llava", seed=2, perspective="safety").score(images, PROMPTS)
    assert torch.equal(reward_model.score(images, PROMPTS, perspective="safety"), own)


def test_qwen_checkpoints_with_other_pixel_bounds_do_not_share_a_backbone() -> None:
    reward_model = load("qwen2_5_vl")
    other = reward_model_folder("qwen2_5_vl", perspective="safety", max_pixels=6272)
    with pytest.raises(ValueError, match="its max_pixels is 6272, not None"):
        reward_model.add(other)


# --- comparisons -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie_width": 0.7}, {"head": "general_preference", "tie_width": 0.2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_orders_of_a_comparison_sum_to_one(family: str, options: dict[str, Any]) -> None:
    reward_model = load(family, temperature=3.0, **options)
    first, second = images_of(family), images_of(family)[::-1]
    there, back = reward_model.compare(first, second, PROMPTS), reward_model.compare(second, first, PROMPTS)
    assert_close(there + back, torch.ones(3), rtol=0, atol=1e-5)
    assert torch.equal(reward_model.compare(first, first, PROMPTS), torch.full((3,), 0.5))
    assert (there - 0.5).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_comparison_by_scores_is_their_difference_over_the_temperature(family: str) -> None:
    reward_model = load(family, temperature=2.0, tie_width=0.4)
    first, second = images_of(family), images_of(family)[::-1]
    gap = (reward_model.score(first, PROMPTS) - reward_model.score(second, PROMPTS)) / 2
    assert_same(reward_model.logits(first, second, PROMPTS), gap)
    won, lost = torch.sigmoid(gap - 0.4), torch.sigmoid(-gap - 0.4)
    assert_same(reward_model.compare(first, second, PROMPTS), won + (1 - won - lost) / 2)


def test_one_image_may_be_compared_under_two_prompts() -> None:
    reward_model, images = load("llava", temperature=2.0), images_of("llava")
    other = PROMPTS[::-1]
    expected = (reward_model.score(images, PROMPTS) - reward_model.score(images, other)) / 2
    assert_same(reward_model.logits(images, images, PROMPTS, second_prompts=other), expected)
    with pytest.raises(ValueError, match="3 images came with 0 prompts"):
        reward_model.logits(images, images, PROMPTS, second_prompts=[])
    with pytest.raises(ValueError, match="1 first and 3 second"):
        reward_model.compare(images[:1], images, PROMPTS[:1], second_prompts=PROMPTS)


def test_score_statistics_are_mean_and_std_over_all_images(tmp_path: Path) -> None:
    """Both images of each pair with their own prompts, and each labelled image."""
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.fromarray(bytes_of(28, 28, seed=i).permute(1, 2, 0).numpy()).save(file)
    reward_model = load("llava")
    records = [LabelledImage(files[2], PROMPTS[2], 1), PreferencePair(files[0], files[1], PROMPTS[0], PROMPTS[1])]
    scores = reward_model.score(files, PROMPTS)
    expected = {"score_mean": scores.mean().item(), "score_std": scores.std(correction=0).item()}
    assert reward_model.score_statistics(records) == pytest.approx(expected, abs=1e-5)
    assert load("llava", head="general_preference").score_statistics(records) == {}


def test_a_general_preference_head_compares_but_has_no_scores() -> None:
    reward_model, images = load("llava", head="general_preference"), images_of("llava")
    for ask in (reward_model.score, reward_model.score_all):
        with pytest.raises(ValueError, match=r"'alignment' has a general-preference head.*Use compare\(first, second"):
            ask(images, PROMPTS)
    reward_model.add(reward_model_folder("llava", perspective="safety"))
    assert reward_model.score(images, PROMPTS, perspective="safety").shape == (3,)


# --- errors ------------------------------------------------------------------------------


def test_images_and_prompts_that_do_not_match_are_refused() -> None:
    reward_model, one = load("llava"), random_image(28, 28)
    with pytest.raises(ValueError, match="2 images came with 1 prompts"):
        reward_model.score([one, one], ["a fox"])
    with pytest.raises(ValueError, match="1 images came with 3 prompts"):
        reward_model.compare([one], [one], PROMPTS)
    with pytest.raises(TypeError, match=r"prompts is one text \('a fox'\)"):
        reward_model.score([one] * 5, "a fox")
    with pytest.raises(ValueError, match="no image to score"):
        reward_model.score([], [])
    with pytest.raises(ValueError, match="no image to score"):
        reward_model.score(torch.zeros(0, 3, 8, 8), [])
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
            reward_model.score([one], ["a fox"], batch_size=batch_size)


def test_a_single_image_in_place_of_a_list_is_refused() -> None:
    """A string has a length too, and would be taken as that many images."""
    reward_model = load("llava")
    with pytest.raises(TypeError, match=r"images is one text \('fox\.png'\)"):
        reward_model.score("fox.png", ["a fox"])
    with pytest.raises(ValueError, match=r"shape \(28, 28\) is no image"):
        inspect.unwrap(LlavaReward.score)(reward_model, random_image(28, 28), PROMPTS)  # without the tests' type checks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.int64), "torch.int64"),
        (torch.full((3, 8, 8), torch.nan), "not finite"),
        (torch.zeros(8, 8, 3), r"\(8, 8, 3\)"),
        (np.zeros((8, 8, 4), dtype=np.uint8), r"\(8, 8, 4\)"),
        (Path("/nowhere/fox.png"), "/nowhere/fox.png"),
        (Path(__file__), "test_reward_model.py' is no image"),
    ],
)
def test_an_invalid_image_is_named(given: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load("llava").score([random_image(28, 28), given], ["a fox"] * 2)


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    with pytest.raises(ValueError, match=r"bomb\.png' has 20 x 30 pixels, more than 599"):
        load("llava").score([tmp_path / "bomb.png"], ["a fox"])


@pytest.mark.parametrize("family", FAMILIES)
def test_transparency_and_exif_orientation_are_applied(family: str, tmp_path: Path) -> None:
    array = bytes_of(60, 57).permute(1, 2, 0).numpy()
    rgba = np.dstack([array, np.full((60, 57), 255, dtype=np.uint8)])
    rgba[:20, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "transparent.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(array)).save(tmp_path / "turned.png", exif=exif)
    white = array.copy()
    white[:20] = 255
    files: Sequence[Any] = [tmp_path / "transparent.png", white, tmp_path / "turned.png", array]
    scores = load(family).score(files, ["a red fox"] * 4)
    assert_same(scores[::2], scores[1::2])
    assert (scores[0] - scores[2]).abs() > 0.05


def test_unknown_perspectives_are_refused_by_name() -> None:
    reward_model = load("llava")
    image, prompt = [random_image(28, 28)], ["a fox"]
    for ask in (
        reward_model.config,
        lambda name: reward_model.score(image, prompt, perspective=name),
        lambda name: reward_model.score_all(image, prompt, perspectives=[name]),
    ):
        with pytest.raises(KeyError, match="no perspective 'beauty' here; there are alignment"):
            ask("beauty")
    with pytest.raises(KeyError, match="no perspective 'beauty' here; there are none"):
        RewardModel(fresh_backbone("llava")).use("beauty")
