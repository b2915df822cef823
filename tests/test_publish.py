"""What is published is what the run left, loads where nothing else is, and reaches the Hub whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from recipes import ddpo, flow_grpo, train_reward_model
from recipes import publish as recipe
from reward_model import LlavaReward
from rlhf_t2i.hub import upload
from rlhf_t2i.hub.bundle import files_of
from rlhf_t2i.hub.model_card import reward_rows, verdict
from rlhf_t2i.training.finished_run import FinishedRun, read_run
from tests.hub import TOKEN, Commit, FakeHub, Repository, running_hub
from tests.reward_models import backbone_folder

# huggingface_hub hands files to its client as that no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parent.parent
BASE = "some/base"
"""What tests call the tiny Stable Diffusion on the Hub."""


# --- runs, each made once ---


def reset_processes() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def tuned(folder: Path, teacher: Any = ddpo, **settings: Any) -> Path:
    """A run whose weights moved far enough to be seen in its images."""
    tiny: dict[str, Any] = {
        "num_steps": 1, "prompts_per_step": 2, "images_per_prompt": 4, "num_denoising_steps": 4, "learning_rate": 0.1,
        "num_evaluation_images": 4, "evaluate_every": 0, "rewards": "oracle", "num_cpu_threads": 1,
        "evaluation_rewards": "oracle,jpeg_compressibility",
    }  # fmt: skip
    teacher.main(teacher.Config(**{**tiny, **settings}, run_folder=str(folder)))
    reset_processes()
    return folder


@pytest.fixture(scope="session")
def lora_run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("runs") / "lora", model=str(tiny_sd), lora_rank=2)


@pytest.fixture(scope="session")
def unet_run(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("runs") / "unet", model=str(tiny_sd))


@pytest.fixture(scope="session")
def built_in_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("runs") / "built_in", lora_rank=2)


@pytest.fixture(scope="session")
def family_runs(
    tiny_sdxl: Path, tiny_sd3: Path, tiny_sd3_lean: Path, tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Of each other family a LoRA and a whole denoiser; among them what a card must say more of than of SD 1.5."""
    folder, few = tmp_path_factory.mktemp("runs"), {"num_denoising_steps": 2}
    flow = {**few, "num_evaluation_steps": 3, "resolution": 16}
    runs = {
        "sdxl_lora": tuned(
            folder / "sdxl_lora", model=str(tiny_sdxl), lora_rank=2, resolution=24, evaluation_eta=1.0, **few
        ),
        "sdxl_unet": tuned(folder / "sdxl_unet", model=str(tiny_sdxl), guidance_scale=2.0, **few),
        "sd3_lora": tuned(
            folder / "sd3_lora", flow_grpo, model=str(tiny_sd3), lora_rank=2, guidance_scale=2.0, learning_rate=1.0,
            **flow,
        ),
        "sd3_transformer": tuned(folder / "sd3_transformer", flow_grpo, model=str(tiny_sd3_lean), **flow),
        "flux_lora": tuned(
            folder / "flux_lora", flow_grpo, model=str(tiny_flux), lora_rank=2, guidance_scale=3.5, learning_rate=1.0,
            **flow,
        ),
        "flux_transformer": tuned(folder / "flux_transformer", model=str(tiny_flux), **flow),
    }  # fmt: skip
    is_sharded(runs["sd3_transformer"] / "transformer")
    return runs


def is_sharded(folder: Path) -> None:
    """Save a denoiser as diffusers does a large one."""
    from diffusers import AutoModel

    network = AutoModel.from_pretrained(str(folder))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="20KB")


@pytest.fixture(scope="session")
def judge_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a backbone in a folder that also holds pickled weights."""
    data, backbone = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("models") / "llava"
    shutil.copytree(backbone_folder("llava"), backbone)
    torch.save({}, backbone / "pytorch_model.bin")
    rows: list[str] = []
    for i in range(4):
        for name, colour in (("good", "white"), ("bad", "black")):
            Image.new("RGB", (28, 28), colour).save(data / f"{name}{i}.png")
        rows.append(json.dumps({"prompt": f"a fox {i}", "winner": f"good{i}.png", "loser": f"bad{i}.png"}))
    (data / "pairs.jsonl").write_text("\n".join(rows))
    config = train_reward_model.Config(
        backbone=str(backbone), training=str(data / "pairs.jsonl"), validation=str(data / "pairs.jsonl"), lora_rank=2,
        max_steps=2, evaluate_every=1, microbatch_size=2, num_cpu_threads=1, learning_rate=1e-2,
        run_folder=str(data / "run"),
    )  # fmt: skip
    train_reward_model.main(config)
    reset_processes()
    return data / "run"


@pytest.fixture(scope="session")
def publication(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it would be uploaded."""
    target = tmp_path_factory.mktemp("published") / "lora"
    return recipe.main(recipe.Config(run=str(lora_run), folder=str(target), base=BASE, license="openrail"))


@pytest.fixture
def copy(lora_run: Path, tmp_path: Path) -> Path:
    """A run to break."""
    return shutil.copytree(lora_run, tmp_path / "run")


@contextmanager
def only_hub(login: Path) -> Iterator[FakeHub]:
    """The only Hub within it, with a token of it in the environment, and another place for that of a login."""
    constants = huggingface_hub.constants
    with running_hub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(login))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield hub


@pytest.fixture(autouse=True)
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with only_hub(tmp_path / "login") as hub:
        yield hub


def upload(folder: Path, repo: str = "me/tuned", *, private: bool = False, revision: str | None = None) -> str:
    said: list[str] = []
    upload.upload(folder, repo, private=private, revision=revision, api=upload.hub(), say=said.append)
    return "\n".join(said)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


# --- the folder ---


def test_a_publication_holds_the_weights_and_what_explains_them_and_no_more(lora_run: Path, publication: Path) -> None:
    files = [name for name in files_of(publication) if not name.startswith("curves/")]
    assert files == [
        "README.md", "SHA256SUMS", "images/after.png", "images/before.png", "images/captions.json",
        "pytorch_lora_weights.safetensors", "report.html", "training/config.yaml", "training/metrics.jsonl",
        "training/run.json",
    ]  # fmt: skip
    for name, own in (
        ("pytorch_lora_weights.safetensors", "lora/pytorch_lora_weights.safetensors"),
        ("images/before.png", "images/step_000000.png"),
        ("images/after.png", "images/step_000001.png"),
    ):
        assert (publication / name).read_bytes() == (lora_run / own).read_bytes()


def test_the_checksums_are_those_of_all_other_files(publication: Path) -> None:
    listed = dict(reversed(line.split("  ")) for line in (publication / "SHA256SUMS").read_text().splitlines())
    others = {name: hashlib.sha256(data).hexdigest() for name, data in contents(publication).items()}
    others.pop("SHA256SUMS")
    assert listed == others
    if sha256sum := shutil.which("sha256sum"):
        subprocess.run([sha256sum, "--strict", "-c", "SHA256SUMS"], cwd=publication, check=True, capture_output=True)


def test_the_hub_reads_base_licence_and_results_from_the_card(hub: FakeHub, lora_run: Path, tmp_path: Path) -> None:
    hub.repos[BASE] = Repository(card={"license": "creativeml-openrail-m"})
    folder = recipe.main(
        recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), repo="me/tuned", dry_run=True, base=BASE,
                      datasets="me/prompts")
    )  # fmt: skip
    data = ModelCard.load(folder / "README.md").data.to_dict()
    for key, value in {
        "base_model": BASE, "base_model_relation": "adapter", "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image", "library_name": "diffusers", "datasets": ["me/prompts"],
    }.items():  # fmt: skip
        assert data[key] == value
    (index,) = data["model-index"]
    last = read_run(lora_run).evaluations[-1]
    assert index["name"] == "tuned"
    metrics = {metric["type"]: metric for metric in index["results"][0]["metrics"]}
    assert {name: metric["value"] for name, metric in metrics.items()} == {
        name: last[name] for name in ("oracle", "jpeg_compressibility")
    }
    assert metrics["oracle"]["args"]["standard_error"] == last["oracle/standard_error"]
    assert metrics["jpeg_compressibility"]["name"] == "jpeg_compressibility (held out)"
    assert not hub.count("POST")


def test_the_card_says_how_it_was_made(lora_run: Path, publication: Path) -> None:
    text = (publication / "README.md").read_text()
    facts = json.loads((lora_run / "run.json").read_text())
    for word in (facts["command"], facts["git_commit"], f"torch {facts['versions']['torch']}", "learning_rate: 0.1"):
        assert word in text
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"images/before.png", "images/after.png", "curves/oracle.svg"} <= set(shown)
    assert all((publication / name).is_file() for name in shown)


def test_a_curve_is_a_image_of_its_own(publication: Path) -> None:
    curves = list((publication / "curves").glob("*.svg"))
    assert curves
    for path in curves:
        svg = ElementTree.parse(path).getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        assert svg.find("{*}style") is not None


def two_evaluations(*, trained: float, held_out: float | None) -> FinishedRun:
    """Of 100 images each, with errors of 0.03 and 0.04, so that a difference has one of 0.05."""
    rows: list[dict[str, Any]] = [{"kind": "train", "step": 1, "rewards/judge": 0.5, "elapsed": 1.0, "images": 8}]
    for step, error, part in ((0, 0.03, 0.0), (1, 0.04, 1.0)):
        scores: dict[str, float] = {"llava_reward": 0.5 + part * trained, "reward_model/standard_error": error}
        if held_out is not None:
            scores |= {"oracle": 0.5 + part * held_out, "oracle/standard_error": error}
        rows.append({"kind": "evaluation", "step": step, "num_images": 100, **scores, "diversity": 0.3, "elapsed": 1.0})
    return FinishedRun(Path(), "lora", {}, {}, rows, {}, [])


def test_the_interval_of_a_change_by_hand() -> None:
    judge, oracle = reward_rows(two_evaluations(trained=0.3, held_out=0.0))
    assert judge["interval"] == "+0.202 to +0.398"  # 0.3 ± 1.96 * 0.05
    assert oracle["interval"] == "-0.098 to +0.098"
    assert (judge["role"], oracle["role"]) == ("trained on", "held out")


@pytest.mark.parametrize(
    ("trained", "held_out", "words"),
    [
        (0.6, 0.15, "oracle confirms 25% of the gain of judge"),
        (0.6, -0.3, "oracle confirms -50% of the gain of judge"),
        (0.1, 0.1, "within its noise"),
        (-0.6, 0.0, "judge fell, although it was trained on"),
        (0.6, None, "nobody knows how much of the gain is real"),
    ],
)
def test_the_card_says_how_much_of_a_gain_is_real(trained: float, held_out: float | None, words: str) -> None:
    assert words in verdict(two_evaluations(trained=trained, held_out=held_out))


def test_a_publication_is_made_anew_but_never_over_what_somebody_wrote(lora_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    config = recipe.Config(run=str(lora_run), folder=str(target), base=BASE)
    before = contents(recipe.main(config))
    assert contents(recipe.main(config)) == before
    card = target / "README.md"
    card.write_text(card.read_text() + "My own words.\n")
    with pytest.raises(FileExistsError, match="is not empty"):
        recipe.main(config)
    assert card.read_text().endswith("My own words.\n")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


# --- what strangers do with it ---


def blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), flags=re.DOTALL)


def elsewhere(lines: list[str], *, hub: FakeHub, cwd: Path) -> str:
    """What lines print in a fresh process, without a token, that can ask nobody but the Hub."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cwd / "home"), "HF_HUB_DISABLE_XET": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=cwd, env={**kept, **settings, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def painted(
    lora_run: Path, unet_run: Path, built_in_run: Path, family_runs: dict[str, Path], tiny_sd: Path, tiny_sdxl: Path,
    tiny_sd3: Path, tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """What the cards' own lines paint where there is only diffusers, and all else comes from the Hub."""
    out, lines = tmp_path_factory.mktemp("painted"), ["import sys"]
    with only_hub(out / "login") as hub:
        models = {BASE: tiny_sd, "some/sdxl": tiny_sdxl, "some/sd3": tiny_sd3, "some/flux": tiny_flux}
        for base, model in models.items():
            hub.repos[base] = Repository(branches={"main": [Commit(contents(model))]}, card={"license": "mit"})
        for name, run, more in (
            ("lora", lora_run, {"base": BASE, "revision": "v2"}),
            ("merged", lora_run, {"base": BASE, "merge_lora": True}),
            ("unet", unet_run, {"revision": "v2"}),
            *((name, run, {"base": f"some/{name.partition('_')[0]}"}) for name, run in family_runs.items()),
            ("sd3_merged", family_runs["sd3_lora"], {"merge_lora": True}),
            ("flux_merged", family_runs["flux_lora"], {"merge_lora": True}),
            ("built_in", built_in_run, {}),
        ):
            config = recipe.Config(run=str(run), folder=str(out / name), repo=f"me/{name}", **more)
            usage, again = blocks(recipe.main(config))
            lines += [usage, again, f"image.save({name + '.png'!r})"]
            if name != "built_in":
                lines.append('assert not {"rlhf_t2i", "reward_model"} & set(sys.modules)')
        elsewhere(lines, hub=hub, cwd=out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("lora", 0), ("merged", 1), ("unet", 0), ("built_in", 0), ("sdxl_lora", 0), ("sdxl_unet", 0), ("sd3_lora", 0),
        ("sd3_transformer", 0), ("sd3_merged", 1), ("flux_lora", 0), ("flux_transformer", 0), ("flux_merged", 1),
    ],
)  # fmt: skip
def test_strangers_paint_the_image_that_the_run_painted(name: str, most: int, painted: Path) -> None:
    """In 8 bits; a merged LoRA rounds once more."""
    image = np.asarray(Image.open(painted / f"{name}.png")).astype(int)
    height, width, _ = image.shape
    before, after = (
        np.asarray(Image.open(painted / name / "images" / f"{end}.png")).astype(int)[:height, :width]
        for end in ("before", "after")
    )
    assert abs(image - after).max() <= most
    assert abs(after - before).max() > 3 * max(most, 1), "the training must have moved it"


@pytest.mark.slow
def test_a_whole_pipeline_keeps_all_parts_of_its_base_but_the_tuned_one(tiny_sd: Path, painted: Path) -> None:
    from diffusers import StableDiffusionPipeline

    def parts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        return {name: getattr(pipe, name).state_dict() for name in ("unet", "vae", "text_encoder")}

    base, published = parts(tiny_sd), parts(painted / "unet")
    for name in base:
        same = all(torch.equal(tensor, published[name][key]) for key, tensor in base[name].items())
        assert same == (name != "unet")
    texts = "".join(path.read_text() for path in (painted / "unet").rglob("*config.json"))
    assert str(tiny_sd) not in texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "pipeline", "tag"),
    [
        ("sdxl", "StableDiffusionXLPipeline", "stable-diffusion-xl"),
        ("sd3", "StableDiffusion3Pipeline", "stable-diffusion-3"),
        ("flux", "FluxPipeline", "flux"),
    ],
)
def test_a_card_names_the_pipeline_and_is_found_by_the_family(
    family: str, pipeline: str, tag: str, painted: Path
) -> None:
    for path in painted.glob(f"{family}_*/README.md"):
        assert {tag, "rlhf-t2i"} <= set(ModelCard.load(path).data.tags)
        usage, again = blocks(path.parent)
        assert f"from diffusers import {pipeline}\n" in usage
        assert ("eta=" in again) == (family == "sdxl")


@pytest.mark.slow
def test_a_card_says_what_noise_a_flows_pipeline_does_not_add(family_runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(family_runs["flux_lora"], tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "evaluation_eta": 0.5}))
    folder = recipe.main(recipe.Config(run=str(run), base="some/flux"))
    assert "again, but for the noise in each step (`evaluation_eta`)" in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("revision", [None, "v2"])
def test_strangers_get_the_judges_own_scores(
    revision: str | None, judge_run: Path, tmp_path: Path, hub: FakeHub
) -> None:
    """With its backbone, which they have nowhere else."""
    config = recipe.Config(run=str(judge_run), folder=str(tmp_path / "out"), repo="me/judge", revision=revision)
    folder = recipe.main(config)
    assert not list(folder.rglob("*.bin"))
    assert json.loads((folder / "llava_reward.json").read_text())["backbone"] == "backbone"
    Image.new("RGB", (28, 28), "red").save(tmp_path / "image.png")
    (usage,) = blocks(folder)
    usage = usage.replace("print(judge", "print(*judge").replace("])", "]).tolist()")
    check = 'import sys\nassert not {"rlhf_t2i", "diffusers"} & set(sys.modules)'
    printed = elsewhere([usage, check], hub=hub, cwd=tmp_path)
    prompt = "a red circle on a blue background"
    own = LlavaReward.from_pretrained(judge_run / "reward_model").score([tmp_path / "image.png"], [prompt])
    assert float(printed) == pytest.approx(own.item(), abs=1e-5)


def test_a_judge_of_a_backbone_on_the_hub_is_published_without_it(judge_run: Path, tmp_path: Path) -> None:
    run = str(shutil.copytree(judge_run, tmp_path / "run"))
    facts = tmp_path / "run" / "reward_model" / "llava_reward.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "backbone": "some/llava"}))
    folder = recipe.main(recipe.Config(run=run, license="mit"))
    assert not (folder / "backbone").exists()
    assert json.loads((folder / "llava_reward.json").read_text())["backbone"] == "some/llava"
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["base_model"] == "some/llava"
    measured = json.loads((judge_run / "metrics.json").read_text())["validation"]
    found = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    assert found == {metric["name"]: metric["value"] for metric in measured}


# --- what cannot be published ---


def break_run(run: Path, how: str) -> None:
    facts = json.loads((run / "run.json").read_text())
    weights = run / "lora" / "pytorch_lora_weights.safetensors"
    match how:
        case "no run":
            (run / "run.json").unlink()
        case "no weights":
            shutil.rmtree(run / "lora")
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "went on":
            config = yaml.safe_load((run / "config.yaml").read_text())
            (run / "config.yaml").write_text(yaml.safe_dump({**config, "num_steps": 7}))
        case "no images":
            (run / "images" / "step_000001.png").unlink()
        case "another version":
            facts["versions"]["rlhf-t2i"] = "0.9.3"
            (run / "run.json").write_text(json.dumps(facts))
        case "older facts":
            del facts["versions"]
            (run / "run.json").write_text(json.dumps(facts))
        case "older config":
            (run / "config.yaml").write_text("model: shapes\n")
        case "unknown base":
            pass
        case other:
            raise ValueError(other)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("no run", FileNotFoundError, "is not the folder of a run: it holds no run.json"),
        ("no weights", FileNotFoundError, "holds no weights.*--resume --run_folder"),
        ("cut weights", ValueError, "pytorch_lora_weights.safetensors are damaged"),
        ("went on", FileNotFoundError, "1 of 7 steps.*--resume --run_folder"),
        ("no images", FileNotFoundError, "holds no images/step_000001.png"),
        ("another version", ValueError, r"was written by rlhf-t2i 0\.9\.3, and this is"),
        ("older facts", ValueError, "run.json lacks versions: another version"),
        ("older config", ValueError, "config.yaml lacks .*num_steps.*: another version"),
        ("unknown base", ValueError, "a LoRA of .*, a folder of this machine.*--base OWNER/NAME.*--merge_lora"),
    ],
)
def test_what_a_run_lacks_is_named(how: str, error: type[Exception], message: str, copy: Path) -> None:
    break_run(copy, how)
    with pytest.raises(error, match=message):
        recipe.main(recipe.Config(run=str(copy), base=None if how == "unknown base" else BASE))
    assert not (copy / "publication").exists()


def test_a_judge_that_was_not_measured_is_not_finished(judge_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(judge_run, tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no metrics.json. Its run is not finished: .*--resume"):
        recipe.main(recipe.Config(run=str(run)))


def test_a_base_that_is_gone_or_named_twice_is_refused(lora_run: Path) -> None:
    from rlhf_t2i.hub.bundle import base_of

    run = read_run(lora_run)
    with pytest.raises(FileNotFoundError, match="the folder '/no/where', is gone"):
        base_of(replace(run, config={**run.config, "model": "/no/where"}), named=None)
    with pytest.raises(ValueError, match=r"base is 'some/other', but .* was tuned from 'some/base'"):
        base_of(replace(run, config={**run.config, "model": BASE}), named="some/other")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # of diffusers
def test_what_kind_of_model_a_base_on_the_hub_is_is_asked_there(
    hub: FakeHub, lora_run: Path, tiny_sd3_lean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_t2i.hub.bundle import base_of

    where = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", where)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    run = read_run(lora_run)
    run = replace(run, config={**run.config, "model": "some/sd3"})
    with pytest.raises(FileNotFoundError, match="'some/sd3' could not be loaded, neither as a folder nor from the Hub"):
        base_of(run, named=None)
    hub.repos["some/sd3"] = Repository(branches={"main": [Commit(contents(tiny_sd3_lean))]})
    base = base_of(run, named=None)
    assert base.family is not None
    assert base.family.title == "Stable Diffusion 3"
    assert list(base.lacking) == ["text_encoder_3", "tokenizer_3"]


def test_a_denoiser_in_parts_is_read_and_a_part_that_is_missing_is_named(unet_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(unet_run, tmp_path / "run")
    is_sharded(run / "unet")
    assert read_run(run).kind == "unet"
    part = sorted((run / "unet").glob("*.safetensors"))[1]
    part.unlink()
    with pytest.raises(ValueError, match=f"{part.name} are damaged"):
        read_run(run)


def test_an_older_run_was_evaluated_as_it_was_trained() -> None:
    """It has no settings for the size of images and for steps of evaluation."""
    run = replace(two_evaluations(trained=0.3, held_out=0.0), config={"num_denoising_steps": 8})
    assert (run.num_evaluation_steps, run.resolution) == (8, None)
    more = replace(run, config={"num_denoising_steps": 8, "num_evaluation_steps": 40, "resolution": 512})
    assert (more.num_evaluation_steps, more.resolution) == (40, 512)


def test_only_a_painters_lora_is_merged(unet_run: Path, judge_run: Path) -> None:
    for run, words in ((unet_run, "the whole denoiser"), (judge_run, "a judge")):
        with pytest.raises(ValueError, match=f"merge_lora is for a painter's LoRA; .* trained {words}"):
            recipe.main(recipe.Config(run=str(run), merge_lora=True))


def test_options_of_an_upload_need_a_repository() -> None:
    with pytest.raises(ValueError, match="private is True; it must be used with a repo"):
        recipe.Config(run="somewhere", private=True)
    with pytest.raises(ValueError, match="repo is 'tuned'; it must be OWNER/NAME"):
        recipe.main(recipe.Config(run="somewhere", repo="tuned"))


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"license": "cc-by-nc-nd-4.0"}, "Creative Commons Attribution-NonCommercial-NoDerivatives 4.0 International"),
        ({"license": "other", "license_name": "acme-nd-1"}, "acme-nd-1.*forbids the publication of derivatives"),
        ({}, "The licence of the base is not known"),
        (None, "The licence of the base is not known"),
    ],
)
def test_a_licence_against_derivatives_is_warned_of(
    card: dict[str, str] | None, words: str, hub: FakeHub, lora_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And stands in the card. None is a base that is not on the Hub."""
    if card is not None:
        hub.repos[BASE] = Repository(card=dict(card))
    folder = recipe.main(recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), base=BASE))
    assert re.search(f"WARNING: .*{words}", capsys.readouterr().out)
    assert re.search(words, (folder / "README.md").read_text())


def test_a_licence_that_allows_derivatives_is_not_warned_of(hub: FakeHub, lora_run: Path, tmp_path: Path) -> None:
    hub.repos[BASE] = Repository(
        card={"license": "other", "license_name": "stand-and-deliver", "license_link": "LICENSE"}
    )
    folder = recipe.main(recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), base=BASE))
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "stand-and-deliver", "LICENSE")
    assert "> **" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "Ab3" * 12])
def test_a_token_in_a_run_is_not_published(secret: str, copy: Path) -> None:
    """Neither the own one nor one of somebody else."""
    facts = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**facts, "command": f"HF_TOKEN={secret} {facts['command']}"}))
    with pytest.raises(ValueError, match="holds a token of the Hub") as refusal:
        recipe.main(recipe.Config(run=str(copy), base=BASE))
    assert secret not in str(refusal.value)
    assert not (copy / "publication").exists()


# --- the Hub ---


def test_one_commit_holds_all_files_and_only_them(hub: FakeHub, publication: Path) -> None:
    said = upload(publication)
    repo = hub.repos["me/tuned"]
    assert repo.files() == {".gitattributes": b"", **contents(publication)}
    assert [commit.summary for commit in repo.branches["main"]] == [
        "initial commit", "Publish a model tuned with rlhf-t2i",
    ]  # fmt: skip
    assert not repo.private
    assert said == ""


def test_the_recipe_uploads_what_it_wrote(
    hub: FakeHub, lora_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And the token shows nowhere."""
    caplog.set_level("DEBUG")
    config = recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), repo="team/tuned", private=True, base=BASE)
    folder = recipe.main(config)
    repo = hub.repos["team/tuned"]
    assert repo.private
    assert repo.files() == {".gitattributes": b"", **contents(folder)}
    printed = "".join(capfd.readouterr())
    assert f"published {hub.endpoint}/team/tuned/commit/" in printed
    for text in (printed, caplog.text, *(data.decode(errors="ignore") for data in contents(folder).values())):
        assert TOKEN not in text


def test_a_dry_run_writes_the_same_folder_and_uploads_nothing(
    hub: FakeHub, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), repo="me/tuned", dry_run=True, base=BASE)
    folder = recipe.main(config)
    assert "one commit to me/tuned; nothing was uploaded" in (printed := capsys.readouterr().out)
    assert all(name in printed for name in files_of(folder))
    assert not hub.count("POST|PUT")
    before = contents(folder)
    recipe.main(replace(config, dry_run=False))
    assert hub.repos["me/tuned"].files() == {".gitattributes": b"", **before}


def test_a_second_publication_replaces_the_first_in_one_commit(hub: FakeHub, publication: Path, tmp_path: Path) -> None:
    upload(publication)
    changed = shutil.copytree(publication, tmp_path / "changed")
    (changed / "report.html").unlink()
    (changed / "README.md").write_text("---\nlicense: mit\n---\nOther words.\n")
    assert "removed from me/tuned, because this publication does not have it: report.html" in upload(changed)
    assert hub.repos["me/tuned"].files() == {".gitattributes": b"", **contents(changed)}
    assert len(hub.repos["me/tuned"].branches["main"]) == 3


def test_a_revision_is_a_branch_that_leaves_main_alone(hub: FakeHub, publication: Path) -> None:
    upload(publication, revision="v2")
    repo = hub.repos["me/tuned"]
    assert repo.files("v2") == {".gitattributes": b"", **contents(publication)}
    assert repo.files("main") == {".gitattributes": b""}


@pytest.mark.parametrize("request_", ["GET /api/who", "POST /api/repos", "preupload", "batch", "PUT /lfs/", "commit/"])
@pytest.mark.parametrize("after_work", [False, True])
def test_a_dropped_connection_is_tried_again(request_: str, after_work: bool, hub: FakeHub, publication: Path) -> None:
    """Also where the work was done and only the answer got lost: nothing is committed twice."""
    hub.fail(request_, after_work=after_work)
    upload(publication)
    repo = hub.repos["me/tuned"]
    assert repo.files() == {".gitattributes": b"", **contents(publication)}
    assert len(repo.branches["main"]) == 2


@pytest.mark.parametrize("request_", ["PUT /lfs/", "POST .*/commit/"])
def test_an_upload_that_fails_leaves_nothing_and_can_be_repeated(
    request_: str, hub: FakeHub, publication: Path
) -> None:
    hub.fail(request_, status=503, message="come back later", times=100)
    with pytest.raises(ConnectionError, match=r"503.*whole or not at all; the same command can be repeated"):
        upload(publication)
    assert hub.repos["me/tuned"].files() == {".gitattributes": b""}
    hub.failures.clear()
    upload(publication)
    assert hub.repos["me/tuned"].files() == {".gitattributes": b"", **contents(publication)}
    (weights,) = (hashlib.sha256(data).hexdigest() for name, data in contents(publication).items() if "lora_w" in name)
    assert hub.count(f"PUT /lfs/{weights}") >= 1


def test_large_files_that_arrived_are_not_sent_again(hub: FakeHub, publication: Path) -> None:
    hub.fail("POST .*/commit/", times=1)
    upload(publication)
    assert hub.count("PUT /lfs/") == len(hub.objects) == 3


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (("POST .*/commit/", 403, "You need the write role"), PermissionError, "may not write to me/tuned.*write role"),
        (("POST /api/repos/create", 403, "No rights"), PermissionError, "may not write to me/tuned.*No rights"),
        (
            ("PUT /lfs/", 413, "Too big"),
            OSError,
            r"too large.*Too big.*largest is report.html, 0\.0 MB",
        ),
        (("POST .*/commit/", 413, "Too big"), OSError, "too large for me/tuned"),
        (("POST .*/commit/", 412, "A commit has happened since"), FileExistsError, "changed by somebody else"),
        (("POST /api/repos/create", 409, "You already created this"), FileExistsError, "409: You already created this"),
        (("GET /api/whoami", 401, f"unknown {TOKEN}"), PermissionError, r"does not know the token.*HF_TOKEN"),
        (("POST .*/commit/", 400, f"bad {TOKEN}"), OSError, r"refused me/tuned \(400: bad \*\*\*\)"),
    ],
)
def test_a_refusal_is_explained_without_the_token(
    failure: tuple[str, int, str], error: type[Exception], message: str, hub: FakeHub, publication: Path
) -> None:
    pattern, status, text = failure
    hub.fail(pattern, status=status, message=text, times=100)
    with pytest.raises(error, match=message) as refusal:
        upload(publication)
    assert TOKEN not in str(refusal.value)
    assert all(repo.files() == {".gitattributes": b""} for repo in hub.repos.values())


def test_what_somebody_else_commits_in_the_meantime_is_not_overwritten(hub: FakeHub, publication: Path) -> None:
    theirs = Commit({".gitattributes": b"", "theirs.txt": b"hello"})
    hub.fail("POST .*/commit/", meanwhile=lambda: hub.repos["me/tuned"].branches["main"].append(theirs))
    with pytest.raises(FileExistsError, match="changed by somebody else in the meantime"):
        upload(publication)
    assert hub.repos["me/tuned"].files() == theirs.files


@pytest.mark.parametrize("repo", ["somebody/tuned", "me/other"])
def test_a_repository_that_is_not_ours_is_left_alone(repo: str, hub: FakeHub, publication: Path) -> None:
    """Neither one of others, nor one of our own that something else is in."""
    hub.repos[repo] = Repository()
    hub.repos[repo].files()["model.bin"] = b"theirs"
    message = "is not yours: the token is of me, who can publish under me or team" if repo[0] == "s" else (
        "The name me/other is taken: the repository exists, and its files .model.bin"
    )  # fmt: skip
    for revision in (None, "v2"):
        with pytest.raises(OSError, match=message):
            upload(publication, repo, revision=revision)
    assert hub.repos[repo].files() == {".gitattributes": b"", "model.bin": b"theirs"}
    assert not hub.count("POST|PUT")


def test_private_is_not_promised_of_a_public_repository(hub: FakeHub, publication: Path) -> None:
    hub.repos["me/tuned"] = Repository(private=False)
    with pytest.raises(FileExistsError, match="me/tuned exists and is public"):
        upload(publication, private=True)
    assert not hub.count("POST|PUT")


def test_without_a_token_nothing_is_sent(hub: FakeHub, publication: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="no token of the Hub: set HF_TOKEN, or run `hf auth login`"):
        upload(publication)
    assert not hub.count("me/tuned")


def test_the_token_of_a_login_is_used(
    hub: FakeHub, publication: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "login").write_text(TOKEN)
    upload(publication)
    assert "README.md" in hub.repos["me/tuned"].files()


def test_no_setting_takes_a_token() -> None:
    assert not [name for name in recipe.Config.__dataclass_fields__ if "token" in name]
