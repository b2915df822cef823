"""HPSv3 with tiny random weights under the published names: its maths in float64, its text, and its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reward_model.scorers import load_scorer
from reward_model.scorers.hps_v3 import load_hps_v3
from reward_model.scorers.hps_v3_rubric import BEFORE, BEHIND
from rlhf_t2i.rewards.load import load_reward, load_rewards
from tests.reward_models import QWEN_TOKENS, WIDTH, bytes_of
from tests.scorer_files import published, save_hps_v3
from tests.servers import served

SIZE = 448
"""Height and width with exactly the pixels that HPSv3 resizes to."""
PROMPTS = ["a red fox", "a blue cat on a red fox"]
PIXELS = torch.stack([bytes_of(SIZE, SIZE, seed=seed) for seed in range(2)])
IMAGES = PIXELS.float() / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hps_v3")
    save_hps_v3(root)
    return root


def slow_score(folder: Path, pixels: Tensor, prompt: str) -> Tensor:
    """In float64 by transformers' parts: embeddings with the image's in their places, and positions left to right."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "HPSv3.safetensors").items()}
    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(QWEN_TOKENS) + 1
    model = Qwen2VLForConditionalGeneration(config).double().eval()
    model.load_state_dict({name: tensors[published(name)] for name in model.state_dict()})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    parts = [{"type": "image"}, {"type": "text", "text": BEFORE + prompt + BEHIND}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    size = {"shortest_edge": 256 * 28 * 28, "longest_edge": 256 * 28 * 28}
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder, size=size)
    image = processor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt")
    ids = torch.tensor(tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 256))["input_ids"])
    states = model.model.language_model.embed_tokens(ids)
    visual = model.model.visual(image.pixel_values.double(), grid_thw=image.image_grid_thw).pooler_output
    states = states.masked_scatter((ids == 5)[:, None], visual)
    hidden = model.model.language_model(inputs_embeds=states[None]).last_hidden_state[0]
    x = hidden[(ids == len(QWEN_TOKENS)).nonzero().item()]
    for number in (0, 3, 5):
        x = tensors[f"rm_head.{number}.weight"] @ x.clamp_min(0 if number else -torch.inf)
        x = x + tensors[f"rm_head.{number}.bias"]
    return x[0]


def test_a_score_equals_the_published_maths_in_float64(folder: Path) -> None:
    """One image at a time; in a batch, whose rows differ in length, too."""
    with torch.no_grad():
        expected = [slow_score(folder, pixels, prompt) for pixels, prompt in zip(PIXELS, PROMPTS, strict=True)]
    scores = load_scorer(f"hps_v3:{folder}").score(IMAGES, PROMPTS)
    assert_close(scores.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-2
    with served(load_rewards(f"hps_v3:{folder}")) as address:
        assert torch.equal(load_reward(address)(IMAGES, PROMPTS), scores)
    reward = load_reward(f"hps_v3:{folder / 'HPSv3.safetensors'}(batch_size=1)")
    assert_close(reward(IMAGES, PROMPTS), scores, rtol=1e-5, atol=1e-5)


def test_the_gradient_to_the_pixels_equals_finite_differences(folder: Path) -> None:
    scorer = load_hps_v3(folder)
    generator = torch.Generator().manual_seed(0)
    images = (0.35 + 0.3 * torch.rand(1, 3, SIZE, SIZE, generator=generator)).double().requires_grad_()
    scorer.model.double()
    try:
        (pixel_gradient,) = torch.autograd.grad(scorer(images, PROMPTS[:1]).sum(), images)
        step = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (scorer(images + sign * 1e-5 * step, PROMPTS[:1]) for sign in (1, -1))
        assert_close(((ahead - behind) / 2e-5)[0], (pixel_gradient * step).sum(), rtol=1e-2, atol=1e-9)
    finally:
        scorer.model.float()


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the scorer and changes its tensors."""

    def of(change: Callable[[dict[str, Any]], Any]) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        tensors = load_file(copy / "HPSv3.safetensors")
        change(tensors)
        save_file(tensors, copy / "HPSv3.safetensors")
        return copy

    return of


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("rm_head.3.weight"), "lacks rm_head.3.weight, so it is no HPSv3"),
        (lambda t: t.pop("visual.merger.mlp.0.weight"), "lacks model.visual.merger.mlp.0.weight"),
        (lambda t: t.update({"model.more": torch.zeros(2)}), "has the unexpected "),
        (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(7, WIDTH)}), "no embedding of the token"),
    ],
)
def test_a_file_that_is_no_hps_v3_is_refused(
    change: Callable[[dict[str, Any]], Any], why: str, broken: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=why):
        load_hps_v3(broken(change))


def test_a_folder_without_the_file_or_without_what_belongs_beside_it_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no file HPSv3\.safetensors"):
        load_hps_v3(tmp_path)
    shutil.copy(folder / "HPSv3.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor of Qwen/Qwen2-VL-7B-Instruct belong beside HPSv3\.safetensors"):
        load_hps_v3(tmp_path)
