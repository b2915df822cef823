"""Every command and config that README.md, docs/ and recipes/configs show runs, at tiny size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from reward_model.datasets import load_records
from rlhf_t2i.shapes.scenes import all_scenes
from tests import processes
from tests.pages import ROOT, blocks, command_of, commands
from tests.reward_models import backbone_folder
from tests.toy_pairs import write_toy_pairs

TINY = {
    "num_steps": 1, "prompts_per_step": 2, "images_per_prompt": 4, "num_denoising_steps": 4,
    "num_evaluation_images": 4, "microbatch_size": 8,
}  # fmt: skip

TINY_QWEN = {
    "lora_rank": 2, "num_steps": 1, "evaluate_every": 1, "min_pixels": 784,
    "max_pixels": 3136, "mixed_precision": "no", "num_workers": 0, "microbatch_size": 2,
}  # fmt: skip
ONE_THREAD = ["--num_cpu_threads", "1"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def run(arguments: list[str], *, cwd: Path = ROOT) -> str:
    """Run a recipe of this project by `accelerate launch`, without any `accelerate config`; return what it printed."""
    arguments = [str(ROOT / part) if part.startswith("recipes/") else part for part in arguments]
    result = processes.run([*LAUNCH, *arguments, *ONE_THREAD], cwd=cwd, env={"HF_HOME": str(cwd / "home")})
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    for logged in ("torchao", "register_constant"):  # by torchao, which diffusers and peft import if it is installed
        assert logged not in output
    return output


def run_python(*arguments: str) -> str:
    result = processes.run([sys.executable, *arguments])
    assert result.returncode == 0, result.stderr
    return result.stdout


def flags(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_the_readme_and_ci_give_the_same_commands() -> None:
    shown = [command for block in blocks("README.md") for command in block.splitlines()]
    assert "pip install -e . -c constraints.txt && accelerate launch recipes/ddpo.py" in shown
    assert "pip install -e '.[dev]' -c constraints.txt && pytest -m \"not slow\"" in shown
    ci = (ROOT / ".ci" / "run").read_text()
    assert "-e '.[dev]' -c constraints.txt" in ci
    assert '\npytest -m "not slow"\n' in ci
    assert "\npytest -m slow\n" in ci


def test_the_first_command_leaves_weights_that_plain_diffusers_samples_from(tmp_path: Path) -> None:
    """By a shell's `accelerate launch`, without the test server; then the README's snippet with its weights."""
    folder = tmp_path / "run"
    command = [*LAUNCH, "recipes/ddpo.py", *flags(**TINY, run_folder=folder), *ONE_THREAD]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    rows = [line.split()[0] for line in output.splitlines() if "±" in line and not line.startswith("after")]
    assert rows == ["0", "1", "oracle", "oracle_pass", "llava_reward"]  # two evaluations, and the changes
    assert (folder / "report.html").is_file()
    *_, snippet = blocks("README.md", "python")
    snippet = snippet.replace("runs/ddpo-DATE", str(folder)) + f"\nimage.save({str(tmp_path / 'out.png')!r})"
    run_python("-c", snippet)
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (32, 32)


def test_a_users_own_model_prompts_and_reward_run_as_shown(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "held_out.txt").write_text("a fox\n")
    (tmp_path / "my_rewards.py").write_text(next(b for b in blocks("README.md", "python") if "def brightness" in b))
    command = next(c for b in blocks("README.md") for c in commands(b) if "--model" in c)
    arguments = [part.replace("path/or/hub-id", str(tiny_sd)) for part in command[2:]]
    run([*arguments, *flags(**TINY, run_folder="out")], cwd=tmp_path)
    scores = json.loads((tmp_path / "out" / "images" / "step_000001.json").read_text())["scores"]
    assert "my_rewards:brightness" in scores
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_the_published_settings_for_ddpo_on_sd15_run(tiny_sd: Path, tmp_path: Path) -> None:
    small = {**TINY, "num_denoising_steps": 5, "model": tiny_sd, "run_folder": tmp_path / "run"}
    output = run(["recipes/ddpo.py", "--config", str(ROOT / "recipes/configs/ddpo_sd15.yaml"), *flags(**small)])
    assert "jpeg_compressibility" in output


@pytest.mark.slow
def test_the_published_settings_for_preferences_on_sd15_run(tiny_sd: Path, tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a fox", "winner": "a.png", "loser": "b.png"}\n')
    small = {
        "num_steps": 1, "num_denoising_steps": 4, "num_evaluation_images": 2, "pairs_per_step": 1, "microbatch_size": 2,
        "pairs": tmp_path / "pairs.jsonl", "model": tiny_sd, "run_folder": tmp_path / "run",
    }  # fmt: skip
    config = str(ROOT / "recipes/configs/diffusion_dpo_sd15.yaml")
    run(["recipes/diffusion_dpo.py", "--config", config, *flags(**small)])
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_weights_are_compared_on_the_same_images_and_a_run_is_published_as_shown(tmp_path: Path) -> None:
    """All but the upload, for which tests/test_upload.py has a Hub."""
    first, second, evaluation = (tmp_path / name for name in ("ddpo", "draft", "evaluation"))
    run(["recipes/ddpo.py", *flags(**TINY, learning_rate=1e-3, run_folder=first)])
    compared = f"base,{first},{first / 'checkpoints' / 'step_000001'}"
    small = {"num_evaluation_images": 8, "num_evaluation_steps": 4, "run_folder": evaluation}
    output = run(["recipes/evaluate_policy.py", *flags(weights=compared, **small)])
    lines = [line for line in output.splitlines() if "oracle_pass" in line and "±" in line]
    assert len(lines) == 3
    base, exported, checkpoint = (line.partition(": ")[2] for line in lines)
    assert exported == checkpoint != base
    assert len(list((evaluation / "images").glob("*.png"))) == 3

    run(["recipes/ddpo.py", *flags(**TINY, seed=1, run_folder=second)])
    dry_run, _, compare = commands(next(b for b in blocks("docs/publishing.md") if "recipes/publish.py" in b))
    for command in (dry_run, [*compare, "--output", str(tmp_path / "comparison.html")]):
        paths = [part.replace("runs/ddpo-DATE", str(first)).replace("runs/draft-DATE", str(second)) for part in command]
        run_python(*paths[1:])
    card = (first / "publication" / "README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" in card
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft", "diffusion_dpo", "diffusion_nft", "flow_grpo"])
def test_each_other_recipe_runs_without_settings(name: str, tmp_path: Path) -> None:
    """On the toy world; only the amount of work is given. tests/test_search_recipes.py has those that search."""
    small = {"prompts_per_step": 4} if name == "draft" else {"prompts_per_step": 2, "images_per_prompt": 2}
    amount = flags(**small, num_steps=1, num_evaluation_images=4, run_folder=tmp_path / "run")
    run([f"recipes/{name}.py", *amount])
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_search_in_three_lines_runs(tmp_path: Path) -> None:
    (snippet,) = blocks("docs/search.md", "python")
    run_python("-c", snippet.replace("circle.png", str(tmp_path / "circle.png")))
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (32, 32)


def test_the_score_in_three_lines_is_a_number() -> None:
    (snippet,) = blocks("docs/reward_model.md", "python")
    assert re.match(r"tensor\(\[-?\d+\.\d+\]\)", run_python("-c", snippet))


def test_every_record_that_the_page_shows_is_read(tmp_path: Path) -> None:
    (text,) = blocks("docs/reward_model.md", "json")
    for name in ("a", "b"):
        Image.new("RGB", (28, 28), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text(text)
    records = load_records(tmp_path / "pairs.jsonl")
    assert len(records) == len(text.splitlines()) == 6
    assert records[1].rating_gap == 2.0
    assert records[2].tie
    assert records[5].label == 1


def preference_rows(folder: Path, prompts: list[str]) -> list[dict[str, str]]:
    """Pairs of a white image, which is preferred, and a black one."""
    rows = []
    for i, prompt in enumerate(prompts):
        for name, colour in (("good", "white"), ("bad", "black")):
            Image.new("RGB", (56, 56), colour).save(folder / f"{name}{i}.png")
        rows.append({"prompt": prompt, "winner": f"good{i}.png", "loser": f"bad{i}.png"})
    return rows


@pytest.mark.slow
def test_a_reward_model_is_trained_evaluated_and_used_as_shown(tmp_path: Path) -> None:
    """With the published settings for Qwen2.5-VL, on a tiny one."""
    rows = preference_rows(tmp_path, [scene.prompt for scene in all_scenes("one", "training")[:8]])
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    tiny = flags(backbone=backbone_folder("qwen2_5_vl"), **TINY_QWEN, validation_fraction=0.3)
    block = next(text for text in blocks("README.md") if "train_reward_model.py" in text)
    train, use = (command[2:] for command in commands(block))
    assert train == command_of("docs/reward_model.md", "recipes/train_reward_model.py")
    run([*train, *tiny], cwd=tmp_path)
    evaluate = commands(next(b for b in blocks("docs/reward_model.md") if "--test_data test.jsonl" in b))[1][2:]
    assert "accuracy_ties_wrong" in run(evaluate, cwd=tmp_path)
    (page,) = tmp_path.glob("runs/reward_model_evaluation-*/report.html")
    assert "test" in page.read_text()
    output = run([*use, *flags(**TINY, run_folder="out")], cwd=tmp_path)
    assert "llava_reward:runs/my-reward" in output


@pytest.mark.slow
@pytest.mark.parametrize("perspective", ["fidelity", "safety", "ranking"])
def test_the_settings_for_every_perspective_train(perspective: str, tmp_path: Path) -> None:
    """On a tiny Qwen2.5-VL; alignment is trained above."""
    rows: list[dict[str, object]] = list(preference_rows(tmp_path, [f"a fox {i}" for i in range(4)]))
    if perspective == "safety":
        names = [f"{name}{i}.png" for i in range(4) for name in ("good", "bad")]
        rows = [{"prompt": "", "image": name, "label": int(name.startswith("good"))} for name in names]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train_data": tmp_path / "data.jsonl", "validation_data": tmp_path / "data.jsonl"}
    small = flags(**data, **TINY_QWEN, backbone=backbone_folder("qwen2_5_vl"), run_folder=tmp_path / "run")
    config = str(ROOT / "recipes" / "configs" / f"reward_qwen2_5_vl_{perspective}.yaml")
    run(["recipes/train_reward_model.py", "--config", config, *small])
    config_file = tmp_path / "run" / "reward_model" / "llava_reward.json"
    assert json.loads(config_file.read_text())["perspective"] == perspective


@pytest.mark.slow
def test_the_built_in_reward_model_is_trained_by_the_command_without_arguments(tmp_path: Path) -> None:
    """With fewer pairs than the recipe generates, written where it looks for them."""
    folder = tmp_path / "runs" / "shapes-pairs-0"
    write_toy_pairs(
        folder, num_drawn_pairs=24, num_generated_pairs=8, num_generated_images=200, num_validation_pairs=8,
        num_test_pairs=8,
    )  # fmt: skip
    run(["recipes/train_reward_model.py", *flags(num_steps=2, evaluate_every=2, run_folder="out")], cwd=tmp_path)
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"validation", "test_drawn"} <= measured.keys()
    assert (tmp_path / "out" / "reward_model" / "llava_reward.safetensors").is_file()
