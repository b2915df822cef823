"""The image-text similarity of a CLIP as a reward: transformers' own numbers, with a gradient to the pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward_model.images import preprocess_as_clip
from reward_model.scorers.clip import load_clip
from rlhf_t2i.rewards.gradient import require_gradient, score_with_gradient
from rlhf_t2i.rewards.load import load_reward, load_rewards
from rlhf_t2i.shapes.scenes import parse_prompt, render
from tests.clips import SIZE, make_clip
from tests.reward_models import bytes_of

PROMPTS = ["a red circle on a blue background", "three squares", "a red circle on a blue background", "zebra"]
PIXELS = torch.stack([bytes_of(SIZE, SIZE, seed=seed) for seed in range(4)])
IMAGES = PIXELS.float() / 255


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def broken(clip: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(clip, tmp_path / "broken"))


def pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def logits(folder: Path, images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Return the logits of transformers, one pair at a time, without padding."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        words = tokenizer([prompt], truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**words, **processor([image], return_tensors="pt")).logits_per_image[0, 0])
    return torch.stack(found)


# --- values ----------------------------------------------------------------------------------


def test_the_score_equals_the_logit_of_transformers(clip: Path) -> None:
    scores = load_reward(f"clip:{clip}")(IMAGES, PROMPTS)
    assert_close(scores, logits(clip, [pil(pixels) for pixels in PIXELS], PROMPTS), rtol=0, atol=1e-5)
    assert scores.dtype == torch.float32
    assert scores.unique().numel() == 4
    assert scores.std() > 0.1


def test_the_score_is_the_scaled_cosine(clip: Path) -> None:
    """exp(2.6592) = 14.28, the initial scale of a CLIP, times the cosine of both embeddings."""
    reward = load_clip(clip)
    image_embeddings, text_embeddings = reward.encode_image(IMAGES).double(), reward.encode_text(PROMPTS).double()
    cosine = (image_embeddings * text_embeddings).sum(1) / image_embeddings.norm(dim=1) / text_embeddings.norm(dim=1)
    assert_close(reward(IMAGES, PROMPTS).double(), 14.2849 * cosine, rtol=1e-5, atol=1e-5)


def test_a_resized_image_scores_like_the_processors(clip: Path) -> None:
    """Drawings of another size and shape; the processor rounds them to 8 bits, which moves a score a little."""
    prompts = ["a red circle on a blue background", "two green squares on a white background"]
    drawn = render([parse_prompt(prompt) for prompt in prompts], rng=np.random.default_rng(0), size=32)[..., 4:28, :]
    pixels = (drawn * 255).round().byte()
    scores = load_clip(clip)(pixels.float() / 255, prompts)
    assert_close(scores, logits(clip, [pil(each) for each in pixels], prompts), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_of_any_precision_are_scored_in_float32(clip: Path, dtype: torch.dtype) -> None:
    images = IMAGES.to(dtype)
    reward = load_clip(clip)
    assert torch.equal(reward(images, PROMPTS), reward(images.float(), PROMPTS))


def test_a_score_does_not_depend_on_the_other_images_and_prompts(clip: Path) -> None:
    together = load_clip(clip)(IMAGES, PROMPTS)
    alone = torch.cat([load_clip(clip)(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    turned = load_clip(clip, batch_size=3)(IMAGES.flip(0), PROMPTS[::-1]).flip(0)
    assert_close(alone, together, rtol=0, atol=1e-5)
    assert_close(turned, together, rtol=0, atol=1e-5)


def test_a_prompt_is_truncated_at_the_models_last_position(clip: Path) -> None:
    """12 positions: the start, ten words, the end."""
    reward = load_clip(clip)
    ten = "a red circle above a green square on a blue"
    scores = reward(IMAGES[:1].expand(3, -1, -1, -1), [ten, f"{ten} background", "a red circle above a green square"])
    assert torch.equal(scores[0], scores[1])
    assert (scores[0] - scores[2]).abs() > 1e-3


# --- preprocessing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (24, 40), (41, 23), (9, 12)])
def test_pixels_equal_the_processors(size: tuple[int, int]) -> None:
    """Exactly without a resize; up to its rounding for smooth images."""
    rough = bytes_of(5, 5).float()[None]
    smooth = torch.nn.functional.interpolate(rough, size, mode="bilinear", align_corners=True).round().byte()
    pixels = PIXELS if size == (16, 16) else smooth
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = processor([pil(each) for each in pixels], return_tensors="pt").pixel_values
    exact = 1e-6 if size == (16, 16) else 0.02
    assert_close(preprocess_as_clip(pixels.float() / 255, processor), expected, rtol=0, atol=exact)


def test_a_fixed_size_without_cropping_or_normalising_equals_the_processors_too() -> None:
    processor = CLIPImageProcessorPil(size={"height": 20, "width": 12}, do_center_crop=False, do_normalize=False)
    expected = processor([pil(each) for each in PIXELS], return_tensors="pt").pixel_values
    assert_close(preprocess_as_clip(IMAGES, processor), expected, rtol=0, atol=1.6 / 255)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 24])
def test_the_gradient_equals_finite_differences(clip: Path, size: int) -> None:
    """Along random directions, with a resize and without; grey enough that nothing is clamped."""
    generator = torch.Generator().manual_seed(0)
    images = 0.35 + 0.3 * torch.rand(2, 3, size, size, generator=generator)
    reward, prompts = load_clip(clip), PROMPTS[:2]
    images.requires_grad_()
    (pixel_gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
    for _ in range(3):
        step = torch.randn(images.shape, generator=generator)
        with torch.no_grad():
            ahead, behind = (reward(images + sign * 1e-3 * step, prompts) for sign in (1, -1))
        expected = (pixel_gradient * step).flatten(1).sum(1)
        assert_close((ahead - behind) / 2e-3, expected, rtol=0.01, atol=0.01)


def test_its_pixel_gradient_is_used_by_score_with_gradient(clip: Path) -> None:
    reward = load_rewards(f"clip:{clip}=0.5")
    require_gradient(reward, prompt=PROMPTS[0])
    scored = score_with_gradient(reward, IMAGES, PROMPTS)
    assert_close(scored.rewards, 0.5 * load_clip(clip)(IMAGES, PROMPTS))
    assert (scored.pixel_gradient.abs().amax((1, 2, 3)) > 0).all()


def test_a_saturated_pixel_keeps_its_gradient(clip: Path) -> None:
    """It is clamped to white or black, but its gradient is not."""
    wild = (4 * IMAGES - 1.5).requires_grad_()
    scores = load_clip(clip)(wild, PROMPTS)
    assert_close(scores, load_clip(clip)(wild.detach().clamp(0, 1), PROMPTS))
    (pixel_gradient,) = torch.autograd.grad(scores.sum(), wild)
    assert (pixel_gradient[wild > 1].abs() > 0).all()


def test_the_model_is_frozen_and_in_evaluation_mode(clip: Path) -> None:
    model = load_clip(clip).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not load_clip(clip)(IMAGES, PROMPTS).requires_grad


def test_a_model_is_loaded_once(clip: Path) -> None:
    assert load_clip(clip).model is load_clip(str(clip)).model


# --- errors --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "no/such/folder", "./no/folder", "/no/folder"])
def test_a_missing_clip_is_named(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no CLIP in '{path}'"):
        load_reward(f"clip:{path}")


def test_another_kind_of_model_is_refused_with_its_type_and_examples(tmp_path: Path) -> None:
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    CLIPTextModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of type 'clip_text_model'; .* whole CLIPModel .*clip-vit-large-patch14"):
        load_reward(f"clip:{tmp_path}")


def test_a_folder_without_a_model_is_refused_with_a_hint_at_llava_reward(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config.json .*llava_reward:PATH"):
        load_reward(f"clip:{tmp_path}")


@pytest.mark.parametrize("file", ["preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_an_error(broken: Path, file: str) -> None:
    (broken / file).unlink()
    with pytest.raises(ValueError, match="is not complete: "):
        load_reward(f"clip:{broken}")


def test_a_missing_tokenizer_is_an_error(broken: Path) -> None:
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has 2 tokens and its model \d+; are tokenizer.json"):
        load_reward(f"clip:{broken}")


def test_missing_weights_are_an_error(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: text_projection.weight"):
        load_reward(f"clip:{broken}")


def test_another_filter_than_bicubic_is_refused(broken: Path) -> None:
    settings = json.loads((broken / "preprocessor_config.json").read_text())
    (broken / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 2}))
    with pytest.raises(ValueError, match="filter 2; only bicubic"):
        load_reward(f"clip:{broken}")


def test_another_number_of_prompts_than_images_is_refused(clip: Path) -> None:
    with pytest.raises(ValueError, match="4 images came with 1 prompts"):
        load_clip(clip)(IMAGES, PROMPTS[:1])


def test_towers_in_half_precision_hold_half_the_bytes_and_score_almost_alike(clip: Path) -> None:
    half, full = (load_reward(f"pick_score:{clip}{given}") for given in ('(dtype="bfloat16")', ""))
    scores, expected = half(IMAGES, PROMPTS), full(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, expected)
    one, other = load_clip(clip, dtype=torch.bfloat16).model, load_clip(clip).model
    assert sum(p.nbytes for p in one.parameters()) - 4 == (sum(p.nbytes for p in other.parameters()) - 4) / 2
    assert torch.equal(one.logit_scale, other.logit_scale)
    assert_close(scores, expected, rtol=0, atol=0.01 * float(one.logit_scale.exp()))


def test_a_precision_that_a_scorer_does_not_have_is_refused(clip: Path) -> None:
    with pytest.raises(ValueError, match="The dtype of pick_score is 'int8'; it must be float32, bfloat16, float16"):
        load_reward(f'pick_score:{clip}(dtype="int8")')
    with pytest.raises(ValueError, match="The dtype of hps is 'bfloat16'; it must be float32"):
        load_reward(f'hps:{clip}(dtype="bfloat16")')
