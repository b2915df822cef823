"""A run that cannot be published is refused, and the message names the reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import save_file

from recipes import publish as recipe
from rlhf_t2i.hub.base import find_base
from rlhf_t2i.hub.contents import check_kinds, check_no_keys
from rlhf_t2i.models.packaging import save_trained_pipeline
from rlhf_t2i.output.files import check_links
from rlhf_t2i.shapes.names import TOY_MODELS
from rlhf_t2i.training.finished_run import read_run
from tests.hub import TOKEN, Commit, FakeHub, Repository
from tests.publications import BASE, file_contents, shard_weights, two_evaluations

pytestmark = [
    pytest.mark.usefixtures("hub"),
    # huggingface_hub passes files to its HTTP client in a deprecated way.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


@pytest.fixture
def run_copy(lora_run: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return shutil.copytree(lora_run, tmp_path / "run")


def configure(run: Path, **changes: object) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def damage(run: Path, how: str) -> None:
    info = json.loads((run / "run.json").read_text())
    weights = run / "lora" / "pytorch_lora_weights.safetensors"
    match how:
        case "no run":
            (run / "run.json").unlink()
        case "no weights":
            shutil.rmtree(run / "lora")
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "unfinished":
            configure(run, num_steps=7)
        case "no images":
            (run / "images" / "step_000001.png").unlink()
        case "another version":
            info["versions"]["rlhf-t2i"] = "0.9.3"
            (run / "run.json").write_text(json.dumps(info))
        case "no versions":
            del info["versions"]
            (run / "run.json").write_text(json.dumps(info))
        case "incomplete config":
            (run / "config.yaml").write_text("model: shapes\n")
        case "local base model":
            pass
        case other:
            raise ValueError(other)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("no run", FileNotFoundError, "is not a run folder: it has no run.json"),
        ("no weights", FileNotFoundError, "has no weights.*--resume --run_folder"),
        ("truncated weights", ValueError, "pytorch_lora_weights.safetensors are damaged"),
        ("unfinished", FileNotFoundError, "1 of 7 steps.*--resume --run_folder"),
        ("no images", FileNotFoundError, "has no images/step_000001.png"),
        ("another version", ValueError, r"was written by rlhf-t2i 0\.9\.3, and this is"),
        ("no versions", ValueError, "run.json lacks versions: another version"),
        ("incomplete config", ValueError, "config.yaml lacks .*num_steps.*: another version"),
        (
            "local base model",
            ValueError,
            "a LoRA of .*, which is a folder of this machine.*--base OWNER/.*--merge_lora",
        ),
    ],
)
def test_an_unpublishable_run_is_refused_with_its_reason(
    how: str, error: type[Exception], message: str, run_copy: Path
) -> None:
    damage(run_copy, how)
    with pytest.raises(error, match=message):
        recipe.main(recipe.Config(run=str(run_copy), base=None if how == "local base model" else BASE))
    assert not (run_copy / "publication").exists()


def test_a_lora_of_another_denoiser_is_not_published_as_one_of_the_base(run_copy: Path) -> None:
    configure(run_copy, init_weights="runs/other")
    with pytest.raises(ValueError, match=r"a LoRA of the denoiser in 'runs/other', not of .*--merge_lora"):
        recipe.main(recipe.Config(run=str(run_copy), base=BASE))


def test_a_reward_model_without_metrics_is_refused(reward_model_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(reward_model_run, tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no metrics.json. The run is not finished: .*--resume"):
        recipe.main(recipe.Config(run=str(run)))


def test_a_missing_base_and_a_wrong_hub_id_are_refused(lora_run: Path) -> None:
    run = read_run(lora_run)
    with pytest.raises(FileNotFoundError, match="the folder '/no/where', does not exist"):
        find_base(replace(run, config={**run.config, "model": "/no/where"}), hub_id=None)
    with pytest.raises(ValueError, match=r"base is 'some/other', but .* started from 'some/base'"):
        find_base(replace(run, config={**run.config, "model": BASE}), hub_id="some/other")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # of diffusers
def test_the_family_of_a_base_on_the_hub_is_read_from_the_hub(
    hub: FakeHub, lora_run: Path, tiny_sd3_lean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    run = read_run(lora_run)
    run = replace(run, config={**run.config, "model": "some/sd3"})
    with pytest.raises(FileNotFoundError, match="'some/sd3' could not be loaded, neither as a folder nor from the Hub"):
        find_base(run, hub_id=None)
    hub.repos["some/sd3"] = Repository(branches={"main": [Commit(file_contents(tiny_sd3_lean))]})
    base = find_base(run, hub_id=None)
    assert base.family is not None
    assert base.family.title == "Stable Diffusion 3"
    assert list(base.missing_parts) == ["text_encoder_3", "tokenizer_3"]


def test_sharded_weights_are_read_and_a_missing_shard_is_named(unet_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(unet_run, tmp_path / "run")
    shard_weights(run / "unet")
    assert read_run(run).kind == "unet"
    shard = sorted((run / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} are damaged"):
        read_run(run)


def test_an_older_run_was_evaluated_with_the_settings_of_training() -> None:
    """Its config has no resolution and no num_evaluation_steps."""
    run = replace(two_evaluations(trained=0.3, held_out=0.0), config={"model": BASE, "num_denoising_steps": 8})
    assert (run.num_evaluation_steps, run.image_size) == (8, None)
    newer = replace(run, config={"num_denoising_steps": 8, "num_evaluation_steps": 40, "resolution": 512})
    assert (newer.num_evaluation_steps, newer.image_size) == (40, (512, 512))
    assert replace(run, info={**run.info, "image_size": [8, 16]}).image_size == (8, 16)
    wide = replace(run, config={**newer.config, "resolution": None, "height": 512, "width": 768})
    assert wide.image_size == (512, 768)


def test_merge_lora_is_refused_for_other_runs(unet_run: Path, reward_model_run: Path) -> None:
    for run, trained in ((unet_run, "all weights of the denoiser"), (reward_model_run, "a reward model")):
        with pytest.raises(ValueError, match=f"it needs a run that trained a LoRA, and .* trained {trained}"):
            recipe.main(recipe.Config(run=str(run), merge_lora=True))


def test_upload_options_need_a_repository() -> None:
    with pytest.raises(ValueError, match="private is True; it must be used with a repo"):
        recipe.Config(run="somewhere", private=True)
    for repo in ("tuned", "owner/name/more"):
        with pytest.raises(ValueError, match=f"repo is '{repo}'; it must be OWNER/NAME"):
            recipe.main(recipe.Config(run="somewhere", repo=repo))


@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "Ab3" * 12])
def test_a_token_in_a_run_is_not_published(secret: str, run_copy: Path) -> None:
    """Neither the user's own nor someone else's."""
    info = json.loads((run_copy / "run.json").read_text())
    (run_copy / "run.json").write_text(json.dumps({**info, "command": f"HF_TOKEN={secret} {info['command']}"}))
    with pytest.raises(ValueError, match=r"README\.md:\d+ contains an? (access )?token of") as refusal:
        recipe.main(recipe.Config(run=str(run_copy), base=BASE))
    assert secret not in str(refusal.value)
    assert not (run_copy / "publication").exists()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("sk-ant-api03-" + "a1B-" * 10, "a key of Anthropic"),
        ("sk-proj-" + "a1B_" * 10, "a key of OpenAI"),
        (f"WANDB_API_KEY={'0123456789abcdef' * 2}01234567", "a key of Weights & Biases"),
        ("AKIA" + "A1B2C3D4" * 2, "a key of AWS"),
        ("ghp_" + "a1B" * 12, "a token of GitHub"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
    ],
)
def test_a_key_anywhere_in_a_publication_is_found_with_file_and_line(text: str, kind: str, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    (tmp_path / "a.txt").write_text(f"{commit}\nrisk-free task-based\n{text}\n")
    with pytest.raises(ValueError, match=rf"^a\.txt:3 contains {kind}, ") as refusal:
        check_no_keys(tmp_path)
    assert text not in str(refusal.value)
    (tmp_path / "a.txt").unlink()
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"note": text})
    with pytest.raises(ValueError, match=rf"^b\.safetensors:1 contains {kind}, "):
        check_no_keys(tmp_path)


@pytest.mark.parametrize("name", ["report.html", "metrics.jsonl", "lora/pytorch_lora_weights.safetensors"])
def test_no_link_out_of_the_run_folder_is_followed(name: str, run_copy: Path, tmp_path: Path) -> None:
    """Whoever made the run could so have any file of the publishing machine published."""
    outside = tmp_path / "outside"
    (run_copy / name).rename(outside)
    (run_copy / name).symlink_to(outside)
    with pytest.raises(ValueError, match=rf"{name} is a link to {outside}, outside of {run_copy}; it is not published"):
        recipe.main(recipe.Config(run=str(run_copy), base=BASE))
    assert not (run_copy / "publication").exists()


def test_no_link_out_of_a_model_or_backbone_is_followed(lora_run: Path, reward_model_run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    backbone = read_run(reward_model_run).config["backbone"]
    for original in (Path(backbone), TOY_MODELS["shapes"]):
        folder = shutil.copytree(original, tmp_path / original.name)
        (folder / "chat_template.json").symlink_to(tmp_path / "secret")
    run = shutil.copytree(reward_model_run, tmp_path / "run")
    facts = run / "reward_model" / "llava_reward.json"
    facts.write_text(facts.read_text().replace(json.dumps(backbone), json.dumps(str(tmp_path / Path(backbone).name))))
    with pytest.raises(
        ValueError, match=r"chat_template.json is a link to .*/secret, outside of .*; it is not published"
    ):
        recipe.main(recipe.Config(run=str(run)))
    with pytest.raises(ValueError, match=r"chat_template.json is a link to .*/secret, outside of"):
        save_trained_pipeline(str(folder), lora_run / "lora", tmp_path / "published")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "1").touch()
    (snapshot := blobs.parent / "snapshots" / "2").mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/1")
    check_links(snapshot)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.png", b"GIF89a"), ("a.json", b"{"), ("a.jsonl", b"{}\nx\n"), ("a.yaml", b"["), ("a.html", b"\xff\xfe")],
)
def test_a_file_that_is_not_what_its_suffix_says_is_not_published(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{name} is no {name[2:]} file, so it is not published"):
        check_kinds(tmp_path)
