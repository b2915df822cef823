"""A publication holds what the run wrote, and its model card tells the truth about it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard

from recipes import publish as recipe
from rlhf_t2i.hub.local_paths import paths_of, without_paths
from rlhf_t2i.hub.model_card import held_out_summary, reward_rows
from rlhf_t2i.hub.publication import list_files, new_publication
from rlhf_t2i.training.finished_run import read_run
from tests import processes
from tests.hub import FakeHub, Repository
from tests.publications import BASE, file_contents, two_evaluations

pytestmark = [
    pytest.mark.usefixtures("hub"),
    # huggingface_hub passes files to its HTTP client in a deprecated way.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


# --- the folder -----------------------------------------------------------------------------------


def test_a_publication_holds_weights_and_training_record_and_nothing_else(lora_run: Path, publication: Path) -> None:
    files = [name for name in list_files(publication) if not name.startswith("curves/")]
    assert files == [
        "README.md", "SHA256SUMS", "images/after.png", "images/before.png", "images/captions.json",
        "pytorch_lora_weights.safetensors", "report.html", "training/config.yaml", "training/metrics.jsonl",
        "training/run.json",
    ]  # fmt: skip
    for name, source in (
        ("pytorch_lora_weights.safetensors", "lora/pytorch_lora_weights.safetensors"),
        ("images/before.png", "images/step_000000.png"),
        ("images/after.png", "images/step_000001.png"),
    ):
        assert (publication / name).read_bytes() == (lora_run / source).read_bytes()


def test_checksums_cover_all_other_files(publication: Path) -> None:
    listed = dict(reversed(line.split("  ")) for line in (publication / "SHA256SUMS").read_text().splitlines())
    others = {name: hashlib.sha256(data).hexdigest() for name, data in file_contents(publication).items()}
    others.pop("SHA256SUMS")
    assert listed == others
    if sha256sum := shutil.which("sha256sum"):
        subprocess.run([sha256sum, "--strict", "-c", "SHA256SUMS"], cwd=publication, check=True, capture_output=True)


def test_a_publication_is_overwritten_only_while_unchanged(lora_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    config = recipe.Config(run=str(lora_run), folder=str(target), base=BASE)
    before = file_contents(recipe.main(config))
    assert file_contents(recipe.main(config)) == before
    card = target / "README.md"
    card.write_text(card.read_text() + "My own words.\n")
    with pytest.raises(FileExistsError, match="is not empty"):
        recipe.main(config)
    assert card.read_text().endswith("My own words.\n")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_what_a_killed_publication_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = "import os; from pathlib import Path; from rlhf_t2i.hub.publication import new_publication as new\n"
    end = "with new(Path('out')) as folder: (folder / 'weights').touch(); os._exit(9)"
    assert processes.run([sys.executable, "-c", code + end], cwd=tmp_path).returncode == 9
    assert list(tmp_path.iterdir())
    with new_publication(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        with pytest.raises(BlockingIOError, match="in use by another process"), new_publication(tmp_path / "out"):
            pass
        (folder / "card").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["card"]


def test_curves_are_svg_files_that_stand_alone(publication: Path) -> None:
    curves = list((publication / "curves").glob("*.svg"))
    assert curves
    for path in curves:
        svg = ElementTree.parse(path).getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        assert svg.find("{*}style") is not None


def test_a_reward_model_of_a_backbone_on_the_hub_is_published_without_it(
    reward_model_run: Path, tmp_path: Path
) -> None:
    run = str(shutil.copytree(reward_model_run, tmp_path / "run"))
    config = tmp_path / "run" / "reward_model" / "llava_reward.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "backbone": "some/llava"}))
    folder = recipe.main(recipe.Config(run=run, license="mit"))
    assert not (folder / "backbone").exists()
    assert json.loads((folder / "llava_reward.json").read_text())["backbone"] == "some/llava"
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["base_model"] == "some/llava"
    measured = json.loads((reward_model_run / "metrics.json").read_text())["validation"]
    published = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    assert published == {metric["name"]: metric["value"] for metric in measured}


# --- the model card -------------------------------------------------------------------------------


def test_card_metadata_holds_base_licence_and_results(hub: FakeHub, lora_run: Path, tmp_path: Path) -> None:
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


def test_the_card_states_command_commit_versions_and_settings(lora_run: Path, publication: Path) -> None:
    text = (publication / "README.md").read_text()
    run = read_run(lora_run)
    public = without_paths(run, paths_of(run))
    for part in (public.info["command"], run.info["git_commit"], f"torch {run.info['versions']['torch']}"):
        assert part in text
    (settings,) = re.findall(r"```yaml\n(.*?)\n```", text, re.S)
    assert yaml.safe_load(settings) == public.config


def test_the_card_shows_evaluations_and_names_the_sibling_that_the_weights_were_loaded_into(
    lora_run: Path, tmp_path: Path
) -> None:
    folder, own = tmp_path / "evaluation", read_run(lora_run).config["model"]
    (folder / "images").mkdir(parents=True)
    measured = {"oracle": 0.25, "oracle/standard_error": 0.01, "diversity": 0.2}
    table = {"base": measured, str(lora_run): measured | {"oracle": 0.5}}
    (folder / "table.json").write_text(json.dumps(table))
    (folder / "images" / "captions.json").write_text(
        json.dumps({"prompts": ["a"] * 64, "seeds": [0] * 64, "columns": 8})
    )
    settings = {"num_evaluation_steps": 4, "guidance_scale": 1.0}
    texts = []
    for model in ("owner/turbo", own):
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, **settings}))
        published = recipe.main(
            recipe.Config(
                run=str(lora_run), folder=str(tmp_path / Path(model).name), base=BASE, license="openrail",
                evaluations=str(folder),
            )
        )  # fmt: skip
        texts.append((published / "README.md").read_text())
    described = f"Trained on {BASE} and loaded into another base model, owner/turbo: 64 images, 4 denoising steps, a "
    assert described + "guidance scale of 1.0.\n\n| reward | owner/turbo alone | with these weights |" in texts[0]
    assert "| oracle | 0.250 ± 0.010 | 0.500 ± 0.010 |" in texts[0]
    assert "Evaluated on its own: 64 images" in texts[1]
    table.pop(str(lora_run))
    (folder / "table.json").write_text(json.dumps(table))
    config = recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), evaluations=str(folder))
    with pytest.raises(ValueError, match=f"evaluates base, as seen from .*, and none of them is of {lora_run}"):
        recipe.main(config)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is no finished run of recipes/evaluate_policy"):
        recipe.main(config.with_options(evaluations=str(tmp_path)))


def test_images_of_the_card_are_in_the_folder(publication: Path) -> None:
    linked = re.findall(r"!\[.*?\]\((.*?)\)", (publication / "README.md").read_text())
    assert {"images/before.png", "images/after.png", "curves/oracle.svg"} <= set(linked)
    assert all((publication / name).is_file() for name in linked)


def test_the_confidence_interval_of_a_change_by_hand() -> None:
    trained, held_out = reward_rows(two_evaluations(trained=0.3, held_out=0.0))
    assert trained["interval"] == "+0.202 to +0.398"  # 0.3 ± 1.96 * 0.05
    assert held_out["interval"] == "-0.098 to +0.098"
    assert (trained["role"], held_out["role"]) == ("trained on", "held out")


@pytest.mark.parametrize(
    ("trained", "held_out", "conclusion"),
    [
        (0.6, 0.15, "oracle confirms 25% of the gain of llava_reward"),
        (0.6, -0.3, "oracle confirms -50% of the gain of llava_reward"),
        (0.1, 0.1, "within noise"),
        (-0.6, 0.0, "llava_reward fell, although it was trained on"),
        (0.6, None, "it is unknown how much of the gain is real"),
    ],
)
def test_the_card_compares_the_gain_with_the_held_out_reward(
    trained: float, held_out: float | None, conclusion: str
) -> None:
    assert conclusion in held_out_summary(two_evaluations(trained=trained, held_out=held_out))


@pytest.mark.parametrize(
    ("card", "warning"),
    [
        ({"license": "cc-by-nc-nd-4.0"}, "Creative Commons Attribution-NonCommercial-NoDerivatives 4.0 International"),
        ({"license": "other", "license_name": "acme-nd-1"}, "acme-nd-1.*forbids publishing derivatives"),
        ({}, "The licence of the base model is unknown"),
        (None, "The licence of the base model is unknown"),
    ],
)
def test_a_licence_against_derivatives_is_printed_and_in_the_card(
    card: dict[str, str] | None, warning: str, hub: FakeHub, lora_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """card=None is a base model that is not on the Hub."""
    if card is not None:
        hub.repos[BASE] = Repository(card=dict(card))
    folder = recipe.main(recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), base=BASE))
    assert re.search(f"WARNING: .*{warning}", capsys.readouterr().out)
    assert re.search(warning, (folder / "README.md").read_text())


def test_a_licence_that_allows_derivatives_gives_no_warning(hub: FakeHub, lora_run: Path, tmp_path: Path) -> None:
    hub.repos[BASE] = Repository(
        card={"license": "other", "license_name": "stand-and-deliver", "license_link": "LICENSE"}
    )
    folder = recipe.main(recipe.Config(run=str(lora_run), folder=str(tmp_path / "out"), base=BASE))
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "stand-and-deliver", "LICENSE")
    assert "> **" not in (folder / "README.md").read_text()
