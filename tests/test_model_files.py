"""Model folders as users have them: variants, missing parts, damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlhf_t2i.models.packaging import save_trained_pipeline
from tests.policies import edit_json, images_of, pipeline_of, policy_of, stock_images
from tests.single_file import save_single_file
from tests.trained_weights import lora_of


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    """A copy of a model like SD 1.5, to be changed."""
    return shutil.copytree(tiny_sd, tmp_path / "model")


def rename_to_variant(folder: Path, variant: str) -> None:
    """Rename all weight files to those of a variant."""
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_a_folder_with_half_precision_files_only_is_loaded_from_them(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    folder = shutil.copytree(model, tmp_path / "model")
    rename_to_variant(folder, "fp16")
    assert_close(images_of(policy_of(folder)), images_of(policy_of(model)), rtol=0, atol=0)


def test_a_folder_with_both_is_loaded_from_the_full_precision_files(folder: Path, tiny_sd: Path) -> None:
    for file in list(folder.rglob("*.safetensors")):
        half = {name: weight.half() for name, weight in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"))
    assert_close(images_of(policy_of(folder)), images_of(policy_of(tiny_sd)), rtol=0, atol=0)


@pytest.mark.parametrize("listed", ["feature_extractor", "safety_checker", "image_encoder"])
def test_a_missing_part_that_is_not_used_is_not_missed(listed: str, folder: Path, tiny_sd: Path) -> None:
    edit_json(folder / "model_index.json", **{listed: ["transformers", "CLIPImageProcessor"]})
    assert_close(images_of(policy_of(folder)), images_of(policy_of(tiny_sd)), rtol=0, atol=0)


def test_a_pipeline_is_published_with_all_parts_that_it_has(folder: Path, tiny_sd: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    edit_json(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    lora = lora_of(tiny_sd, tmp_path).parent
    save_trained_pipeline(str(folder), lora, tmp_path / "without")
    assert not (tmp_path / "without" / "feature_extractor").exists()
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    save_trained_pipeline(str(folder), lora, tmp_path / "with")
    assert (tmp_path / "with" / "feature_extractor").is_dir()
    expected = images_of(policy_of(tiny_sd, weights=lora))
    assert_close(stock_images(pipeline_of(tmp_path / "with")), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(part: str, folder: Path) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"has no folder '{part}', which its model_index.json lists"):
        policy_of(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_damaged_part_is_named_in_one_line(part: str, folder: Path) -> None:
    [file] = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"The {part} in .* could not be loaded") as caught:
        policy_of(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_whose_weights_are_cut_is_named_with_those_that_are_missing(part: str, folder: Path) -> None:
    [file] = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    missing = sorted(weights)[-1]
    save_file({name: weight for name, weight in weights.items() if name != missing}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"The {part} in .* is incomplete: 1 weights are missing") as caught:
        policy_of(folder)
    assert missing.rsplit(".", 2)[-2] in str(caught.value)


def test_a_part_without_weights_is_named(folder: Path) -> None:
    next((folder / "text_encoder").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"The text_encoder in .* could not be loaded"):
        policy_of(folder)


@pytest.mark.parametrize("index", [{}, {"_class_name": None}, {"_class_name": ["a"]}])
def test_an_index_without_a_pipeline_class_is_refused(index: dict[str, object], folder: Path) -> None:
    named = json.loads((folder / "model_index.json").read_text())
    named.pop("_class_name")
    (folder / "model_index.json").write_text(json.dumps({**named, **index}))
    with pytest.raises(ValueError, match="has no _class_name, the diffusers pipeline class; supported are Stable"):
        policy_of(folder)


def test_an_index_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")
    with pytest.raises((ValueError, FileNotFoundError), match=r"model_index\.json|could not be loaded") as caught:
        policy_of(folder)
    assert "\n" not in str(caught.value)


def test_a_single_file_gives_the_images_of_its_folder_and_is_published(tiny_sd: Path, tmp_path: Path) -> None:
    file = save_single_file(tiny_sd, tmp_path / "model.safetensors")
    assert_close(images_of(policy_of(file)), images_of(policy_of(tiny_sd)), rtol=0, atol=0)
    lora = lora_of(tiny_sd, tmp_path).parent
    save_trained_pipeline(str(file), lora, tmp_path / "published")
    expected = images_of(policy_of(tiny_sd, weights=lora))
    assert_close(stock_images(pipeline_of(tmp_path / "published")), expected, rtol=0, atol=2e-5)


def test_a_single_file_that_is_damaged_is_named(tiny_sd: Path, tmp_path: Path) -> None:
    file = save_single_file(tiny_sd, tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"The checkpoint .*model\.safetensors' could not be loaded") as caught:
        policy_of(file)
    assert "\n" not in str(caught.value)


def test_a_single_file_without_its_configs_says_where_they_belong(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(source: str) -> None:
        raise OSError(f"no connection for {source}")

    file = save_single_file(tiny_sd, tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setattr("rlhf_t2i.models.load.DiffusionPipeline.load_config", offline)
    with pytest.raises(
        FileNotFoundError, match=r"neither in the folder .*model' .* nor could they be loaded from 'stable-"
    ):
        policy_of(file)
