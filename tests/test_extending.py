"""docs/extending.md: each example is built as the page shows it and does its work."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests import reward_models, tiny
from tests.pages import ROOT
from tests.runs import as_for_toy_models, rows

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^```python file=(\S+)\n(.*?)\n```$", PAGE, flags=re.DOTALL | re.MULTILINE))
LINES = dict(re.findall(r"^```python line=(\S+)\n(.*?)\n```$", PAGE, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Any]:
    """Import a file of the page as the module that it would be in the project."""
    added: list[str] = []

    def load(path: str) -> ModuleType:
        file = tmp_path / Path(path).name
        file.write_text(FILES[path])
        name = path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        added.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in added:
        del sys.modules[name]


def entry(path: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """The line that the page adds to a table of names."""
    return eval(f"{{{LINES[path]}\n}}", names)


def test_a_reward(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_t2i.rewards import table
    from rlhf_t2i.rewards.gradient import require_gradient
    from rlhf_t2i.rewards.load import load_rewards

    shown("rlhf_t2i/rewards/contrast.py")
    row = eval(LINES["rlhf_t2i/rewards/table.py"], vars(table))
    monkeypatch.setattr(table, "REWARDS", (*table.REWARDS, row))
    images = torch.zeros(2, 3, 4, 4)
    images[1, :, :2] = 1.0
    reward = load_rewards("contrast")
    total, _ = reward(images, ["a", "b"])
    assert_close(total, torch.tensor([0.0, images[1, 0].std()]))
    require_gradient(reward, prompt="a")
    assert "`contrast`" in table.markdown_table()


def save_pixart(folder: Path) -> Path:
    """A tiny random PixArt-Sigma, which predicts a variance too."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, caption_channels=16, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    diffusers.PixArtSigmaPipeline(
        tokenizer=tiny.t5_tokenizer(), text_encoder=tiny.t5(width=16), vae=tiny.autoencoder(), transformer=transformer,
        scheduler=scheduler,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_model_family(shown: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The image of a seed is the stock pipeline's, without and with guidance."""
    from diffusers import PixArtSigmaPipeline

    from rlhf_t2i.diffusion.transitions import stochastic
    from rlhf_t2i.models import load, table
    from rlhf_t2i.sampling.rollout import generate
    from rlhf_t2i.types import Sampler

    shown("rlhf_t2i/models/pixart_sigma.py")
    monkeypatch.setattr(table, "FAMILIES", {**table.FAMILIES, **entry("rlhf_t2i/models/table.py", vars(table))})
    folder = save_pixart(tmp_path / "model")
    policy = load.load_policy(str(folder), device=torch.device("cpu"))
    pipeline: Any = PixArtSigmaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for scale in (1.0, 3.0):
        schedule = policy.schedule(4)
        sampler = Sampler(schedule, stochastic(schedule, eta=0.0), scale)
        generator = torch.Generator().manual_seed(3)
        images, _ = generate(policy, ["a red fox"], sampler=sampler, generators=[generator], microbatch_size=1)
        expected = pipeline(
            "a red fox", num_inference_steps=4, guidance_scale=scale, negative_prompt="", height=16, width=16,
            generator=torch.Generator().manual_seed(3), output_type="pt", use_resolution_binning=False,
            clean_caption=False,
        ).images  # fmt: skip
        assert_close(images, expected, rtol=0, atol=2e-5)


def test_an_algorithm(shown: Any, tiny_sd: Path, tmp_path: Path) -> None:
    recipe = shown("recipes/rwr.py")
    options = as_for_toy_models(
        model=str(tiny_sd), rewards="tests.runs:redness", evaluation_rewards="tests.runs:redness", num_steps=2,
        prompts_per_step=2, images_per_prompt=4, num_denoising_steps=4, num_evaluation_images=2, evaluate_every=0,
        microbatch_size=4, run_folder=str(tmp_path / "run"), num_cpu_threads=1,
    )  # fmt: skip
    folder = recipe.main(recipe.Config(**options))
    first, second = rows(folder, "train")
    assert first["gradient_norm"] > 0
    assert second["step"] == 2
    assert (folder / "unet").is_dir()


def test_a_backbone(shown: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Projector and language model give the hidden states of transformers' own forward pass."""
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    from reward_model.backbones import load

    source = reward_models.backbone_folder("llava")
    shown("reward_model/backbones/vipllava.py")
    monkeypatch.setattr(load, "FAMILIES", {**load.FAMILIES, **entry("reward_model/backbones/load.py")})
    llava = load.load_backbone(str(source)).model.config
    torch.manual_seed(0)
    config = VipLlavaConfig(
        vision_config=llava.vision_config, text_config=llava.text_config, image_token_index=llava.image_token_id,
        vision_feature_layer=[-1, -2],
    )  # fmt: skip
    model = VipLlavaForConditionalGeneration(config)
    folder = tmp_path / "vipllava"
    model.save_pretrained(folder)
    for path in Path(source).iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    backbone = load.load_backbone(str(folder))
    images = [torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    inputs = backbone.prepare(images, ["a red fox", "a cat"])
    output = backbone.forward(backbone.encode_image(inputs))
    pixels = inputs["pixel_values"]
    own = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = backbone.model.model(**own, pixel_values=pixels).last_hidden_state
    mask = inputs["attention_mask"].bool()
    assert_close(output.hidden[mask], expected[mask], rtol=0, atol=1e-5)
