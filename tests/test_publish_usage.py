"""The code of a model card gives, in a fresh environment, the images and scores of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from recipes import ddpo, flow_grpo
from recipes import publish as recipe
from reward_model import LlavaReward
from tests.hub import Commit, FakeHub, Repository
from tests.publications import (
    BASE,
    code_blocks,
    file_contents,
    finished_run,
    only_hub,
    run_elsewhere,
    shard_weights,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("hub"),
    # huggingface_hub passes files to its HTTP client in a deprecated way.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def built_in_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "built_in", ddpo, lora_rank=2)


@pytest.fixture(scope="module")
def family_runs(
    tiny_sdxl: Path, tiny_sd3: Path, tiny_sd3_lean: Path, tiny_flux: Path, tiny_sana: Path,
    tiny_qwen_image: Path, tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:  # fmt: skip
    """A LoRA and a full denoiser of each other family, with settings that its card must repeat."""
    folder, few = tmp_path_factory.mktemp("runs"), {"num_denoising_steps": 2}
    flow = {**few, "num_evaluation_steps": 3, "resolution": 16}
    runs = {
        "sdxl_lora": finished_run(
            folder / "sdxl_lora", ddpo, model=str(tiny_sdxl), lora_rank=2, height=16, width=24, evaluation_eta=1.0,
            **few,
        ),
        "sdxl_unet": finished_run(folder / "sdxl_unet", ddpo, model=str(tiny_sdxl), guidance_scale=2.0, **few),
        "sd3_lora": finished_run(
            folder / "sd3_lora", flow_grpo, model=str(tiny_sd3), lora_rank=2, guidance_scale=2.0, learning_rate=1.0,
            **flow,
        ),
        "sd3_transformer": finished_run(folder / "sd3_transformer", flow_grpo, model=str(tiny_sd3_lean), **flow),
        "flux_lora": finished_run(
            folder / "flux_lora", flow_grpo, model=str(tiny_flux), lora_rank=2, guidance_scale=3.5, learning_rate=1.0,
            **flow,
        ),
        "sana_lora": finished_run(
            folder / "sana_lora", flow_grpo, model=str(tiny_sana), lora_rank=2, learning_rate=1.0,
            **{**flow, "resolution": 32},
        ),
        "qwen_lora": finished_run(
            folder / "qwen_lora", flow_grpo, model=str(tiny_qwen_image), lora_rank=2, learning_rate=1.0,
            guidance_scale=3.0, rewards="jpeg_compressibility", **flow,
        ),
        "flux_transformer": finished_run(folder / "flux_transformer", ddpo, model=str(tiny_flux), **flow),
    }  # fmt: skip
    shard_weights(runs["sd3_transformer"] / "transformer")
    return runs


@pytest.fixture(scope="module")
def published(
    lora_run: Path, unet_run: Path, built_in_run: Path, family_runs: dict[str, Path], request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """NAME/ is the publication of each run, NAME.png the image of its card's code in a process with diffusers only."""
    out, lines = tmp_path_factory.mktemp("published"), ["import sys"]
    with only_hub(out / "login") as hub:
        models = {BASE: "tiny_sd"} | {f"some/{name}": f"tiny_{name}" for name in ("sdxl", "sd3", "flux", "sana")}
        models["some/qwen"] = "tiny_qwen_image"
        for base, name in models.items():
            model = request.getfixturevalue(name)
            hub.repos[base] = Repository(branches={"main": [Commit(file_contents(model))]}, card={"license": "mit"})
        for name, run, more in (
            ("lora", lora_run, {"base": BASE, "revision": "v2"}),
            ("merged", lora_run, {"base": BASE, "merge_lora": True}),
            ("unet", unet_run, {"revision": "v2"}),
            *((name, run, {"base": f"some/{name.partition('_')[0]}"}) for name, run in family_runs.items()),
            ("sd3_merged", family_runs["sd3_lora"], {"merge_lora": True}),
            ("flux_merged", family_runs["flux_lora"], {"merge_lora": True}),
            ("qwen_merged", family_runs["qwen_lora"], {"merge_lora": True}),
            ("built_in", built_in_run, {}),
        ):
            config = recipe.Config(run=str(run), folder=str(out / name), repo=f"me/{name}", **more)
            usage, first_image = code_blocks(recipe.main(config))
            lines += [usage, first_image, f"image.save({name + '.png'!r})"]
            if name != "built_in":
                lines.append('assert not {"rlhf_t2i", "reward_model"} & set(sys.modules)')
        run_elsewhere(lines, hub=hub, cwd=out)
    return out


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("lora", 0), ("merged", 1), ("unet", 0), ("built_in", 0), ("sdxl_lora", 0), ("sdxl_unet", 0), ("sd3_lora", 0),
        ("sd3_transformer", 0), ("sd3_merged", 1), ("flux_lora", 1), ("flux_transformer", 0), ("flux_merged", 1),
        ("sana_lora", 1), ("qwen_lora", 1), ("qwen_merged", 1),
    ],
)  # fmt: skip
def test_the_card_repeats_the_image_of_the_run(name: str, tolerance: int, published: Path) -> None:
    """Up to `tolerance` of 255: a merged LoRA is rounded once more, and the run sampled its image in a batch."""
    image = np.asarray(Image.open(published / f"{name}.png")).astype(int)
    height, width, _ = image.shape
    assert (width > height) == (name == "sdxl_lora")
    before, after = (
        np.asarray(Image.open(published / name / "images" / f"{end}.png")).astype(int)[:height, :width]
        for end in ("before", "after")
    )
    assert abs(image - after).max() <= tolerance
    assert abs(after - before).max() > 3 * max(tolerance, 1), "training must have changed the image"


def test_a_full_pipeline_differs_from_its_base_in_the_denoiser_only(tiny_sd: Path, published: Path) -> None:
    from diffusers import StableDiffusionPipeline

    def parts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        return {name: getattr(pipe, name).state_dict() for name in ("unet", "vae", "text_encoder")}

    base, tuned = parts(tiny_sd), parts(published / "unet")
    for name in base:
        same = all(torch.equal(tensor, tuned[name][key]) for key, tensor in base[name].items())
        assert same == (name != "unet")
    texts = "".join(path.read_text() for path in (published / "unet").rglob("*config.json"))
    assert str(tiny_sd) not in texts


@pytest.mark.parametrize(
    ("family", "pipeline", "tag"),
    [
        ("sdxl", "StableDiffusionXLPipeline", "stable-diffusion-xl"),
        ("sd3", "StableDiffusion3Pipeline", "stable-diffusion-3"),
        ("flux", "FluxPipeline", "flux"),
        ("sana", "SanaPipeline", "sana"),
    ],
)
def test_the_card_names_pipeline_and_tag_of_the_family(family: str, pipeline: str, tag: str, published: Path) -> None:
    for path in published.glob(f"{family}_*/README.md"):
        assert {tag, "rlhf-t2i"} <= set(ModelCard.load(path).data.tags)
        usage, first_image = code_blocks(path.parent)
        assert f"from diffusers import {pipeline}\n" in usage
        assert ("eta=" in first_image) == (family == "sdxl")


def test_the_card_of_a_flow_model_mentions_noise_that_its_pipeline_lacks(
    family_runs: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(family_runs["flux_lora"], tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "evaluation_eta": 0.5}))
    folder = recipe.main(recipe.Config(run=str(run), base="some/flux"))
    assert (
        "except for the noise that the run added in each step (`evaluation_eta`)" in (folder / "README.md").read_text()
    )


def test_the_card_of_a_reward_model_gives_its_scores(reward_model_run: Path, tmp_path: Path, hub: FakeHub) -> None:
    """Its backbone, which is nowhere else, is part of the publication; from the main branch and from another."""
    Image.new("RGB", (28, 28), "red").save(tmp_path / "image.png")
    lines = ["import sys"]
    for revision in (None, "v2"):
        folder = tmp_path / f"out-{revision}"
        config = recipe.Config(run=str(reward_model_run), folder=str(folder), repo=f"me/{revision}", revision=revision)
        assert not list(recipe.main(config).rglob("*.bin"))
        assert json.loads((folder / "llava_reward.json").read_text())["backbone"] == "backbone"
        (usage,) = code_blocks(folder)
        lines.append(usage.replace("print(reward_model", "print(*reward_model").replace("])", "]).tolist()"))
    lines.append('assert not {"rlhf_t2i", "diffusers"} & set(sys.modules)')
    printed = run_elsewhere(lines, hub=hub, cwd=tmp_path)
    prompt = "a red circle on a blue background"
    scores = LlavaReward.from_pretrained(reward_model_run / "reward_model").score([tmp_path / "image.png"], [prompt])
    assert [float(score) for score in printed.split()] == pytest.approx([scores.item()] * 2, abs=1e-5)
