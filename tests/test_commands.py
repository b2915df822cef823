"""Every command and config that the README and recipes/configs show runs, at tiny size."""

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
from rlhf_t2i.shapes.pairs import write_pairs
from rlhf_t2i.shapes.scenes import all_scenes
from tests.reward_models import backbone_folder
from tests.test_matrix import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```$", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [text for language, text in BLOCKS if language == ""]
SNIPPET, STEER_SNIPPET, JUDGE_SNIPPET = [text for language, text in BLOCKS if language == "python"]
(RECORDS,) = [text for language, text in BLOCKS if language == "json"]
TINY = {
    "num_steps": 1, "prompts_per_step": 2, "images_per_prompt": 4, "num_denoising_steps": 4,
    "num_evaluation_images": 4, "microbatch_size": 8,
}  # fmt: skip

TINY_QWEN = {
    "lora_rank": 2, "num_steps": 1, "evaluate_every": 1, "min_pixels": 784,
    "max_pixels": 3136, "mixed_precision": "no", "num_workers": 0, "microbatch_size": 2,
}  # fmt: skip


def run(arguments: list[str], *, cwd: Path = ROOT) -> str:
    """A recipe by `accelerate launch` without any `accelerate config`; what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "home")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def shown(command: str) -> list[str]:
    """A command of the README, without `accelerate launch`."""
    return command.replace("\\\n", " ").removeprefix("accelerate launch ").split()


def flags(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_the_readme_and_ci_give_the_same_commands() -> None:
    assert "pip install -e . -c constraints.txt && accelerate launch recipes/ddpo.py" in COMMANDS
    assert "pip install -e '.[dev]' -c constraints.txt && pytest" in COMMANDS
    ci = (ROOT / ".ci" / "run").read_text()
    assert "-e '.[dev]' -c constraints.txt" in ci
    assert "\npytest\n" in ci


def test_the_table_of_models_and_recipes_is_what_is_tested() -> None:
    assert table() in README


@pytest.mark.slow
def test_the_first_command_ends_with_the_table_and_the_places(tmp_path: Path) -> None:
    """And the README's own snippet then paints with what it left, in plain diffusers."""
    folder = tmp_path / "run"
    output = run(["recipes/ddpo.py", *flags(**TINY, run_folder=folder)])
    for word in ("before", "after", "oracle_pass", "diversity", str(folder / "report.html"), str(folder / "unet")):
        assert word in output
    snippet = SNIPPET.replace("runs/ddpo-DATE", str(folder)) + f"\nimage.save({str(tmp_path / 'out.png')!r})"
    subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, check=True, capture_output=True)
    with Image.open(tmp_path / "out.png") as painted:
        assert painted.size == (32, 32)


@pytest.mark.slow
def test_the_command_for_a_users_own_things_runs(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "held_out.txt").write_text("a fox\n")
    (tmp_path / "my_rewards.py").write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    (command,) = [text for text in COMMANDS if "my_rewards" in text]
    command = command.replace("\\\n", " ").replace(" recipes/", f" {ROOT}/recipes/")
    arguments = command.replace("path/or/hub-id", str(tiny_sd)).split()[2:]
    output = run([*arguments, *flags(**TINY, run_folder="out")], cwd=tmp_path)
    assert "my_rewards:brightness" in output
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_the_published_settings_for_sd15_run(tiny_sd: Path, tmp_path: Path) -> None:
    small = {**TINY, "num_denoising_steps": 5, "model": tiny_sd, "run_folder": tmp_path / "run"}
    output = run(["recipes/ddpo.py", "--config", "recipes/configs/ddpo_sd15.yaml", *flags(**small)])
    assert "jpeg_compressibility" in output


@pytest.mark.slow
def test_the_settings_for_preferences_on_sd15_run(tiny_sd: Path, tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a fox", "winner": "a.png", "loser": "b.png"}\n')
    small = {
        "num_steps": 1, "num_denoising_steps": 4, "num_evaluation_images": 2, "pairs_per_step": 1, "microbatch_size": 2,
        "pairs": tmp_path / "pairs.jsonl", "model": tiny_sd, "run_folder": tmp_path / "run",
    }  # fmt: skip
    output = run(["recipes/diffusion_dpo.py", "--config", "recipes/configs/diffusion_dpo_sd15.yaml", *flags(**small)])
    assert "report.html" in output


@pytest.mark.slow
def test_weights_are_compared_on_the_same_images(tmp_path: Path) -> None:
    small = {**TINY, "learning_rate": 1e-3}
    run(["recipes/ddpo.py", *flags(**small, run_folder=tmp_path / "run")])
    compared = ",".join(["base", str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints" / "step_000001")])
    output = run(
        [
            "recipes/evaluate_policy.py",
            *flags(
                weights=compared, num_evaluation_images=8, num_evaluation_steps=4, run_folder=tmp_path / "evaluation"
            ),
        ]
    )
    lines = [line for line in output.splitlines() if "oracle_pass" in line]
    assert len(lines) == 3
    base, exported, checkpoint = (line.partition(": ")[2] for line in lines)
    assert exported == checkpoint != base
    assert len(list((tmp_path / "evaluation" / "images").glob("*.png"))) == 3


@pytest.mark.slow
def test_a_run_is_published_and_compared_as_the_readme_says(tmp_path: Path) -> None:
    """All but the upload, for which tests/test_publish.py has a Hub."""
    run(["recipes/ddpo.py", *flags(**TINY, run_folder=tmp_path / "ddpo")])
    run(["recipes/ddpo.py", *flags(**TINY, run_folder=tmp_path / "draft", seed=1)])
    (block,) = [text for text in COMMANDS if "recipes/publish.py" in text]
    dry, _, side_by_side = (line.partition("#")[0].strip() for line in block.splitlines())
    for command in (dry, f"{side_by_side} --output {tmp_path / 'comparison.html'}"):
        command = command.replace("runs/ddpo-DATE", str(tmp_path / "ddpo")).replace(
            "runs/draft-DATE", str(tmp_path / "draft")
        )
        subprocess.run(
            [sys.executable, *command.split()[1:]], cwd=ROOT, check=True, capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    card = (tmp_path / "ddpo" / "publication" / "README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" in card
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft", "diffusion_dpo", "diffusion_nft", "flow_grpo", "best_of_n", "fk_steering"])
def test_the_other_recipes_run_as_the_readme_says(name: str, tmp_path: Path) -> None:
    """On the built-in world without settings, but for their number."""
    (line,) = [line for text in COMMANDS for line in text.splitlines() if f"recipes/{name}.py" in line]
    searching = name in ("best_of_n", "fk_steering")
    small = {"prompts": tmp_path / "prompts.txt", "images_per_prompt": 1} if searching else {
        "num_steps": 1, "num_evaluation_images": 4,
        **({"prompts_per_step": 4} if name == "draft" else {"prompts_per_step": 2, "images_per_prompt": 2}),
    }  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a red circle on a blue background\n")
    output = run([*shown(line.partition("#")[0]), *flags(**small, run_folder=tmp_path / "run")])
    assert "report.html" in output
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_readme_searches_with_a_plain_pipeline(tmp_path: Path) -> None:
    snippet = STEER_SNIPPET.replace("circle.png", str(tmp_path / "circle.png"))
    subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, check=True, capture_output=True)
    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (32, 32)


def test_the_readme_scores_a_image_in_three_lines() -> None:
    result = subprocess.run([sys.executable, "-c", JUDGE_SNIPPET], cwd=ROOT, check=True, capture_output=True, text=True)
    assert re.match(r"tensor\(\[-?\d+\.\d+\]\)", result.stdout)


def test_every_line_that_the_readme_shows_is_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (28, 28), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text(RECORDS)
    records = load_records(tmp_path / "pairs.jsonl")
    assert len(records) == len(RECORDS.splitlines()) == 6
    assert records[1].rating_gap == 2.0
    assert records[2].tie
    assert records[5].label == 1


@pytest.mark.slow
def test_a_judge_is_trained_measured_and_used_as_the_readme_says(tmp_path: Path) -> None:
    """With the published settings for Qwen2.5-VL, on a tiny one."""
    train, measure, use = next(text for text in COMMANDS if "runs/my-reward" in text).replace("\\\n", " ").split("\n")
    prompts = [scene.prompt for scene in all_scenes("one", "training")[:8]]
    rows = []
    for i, prompt in enumerate(prompts):
        for name, colour in (("good", "white"), ("bad", "black")):
            Image.new("RGB", (56, 56), colour).save(tmp_path / f"{name}{i}.png")
        rows.append(json.dumps({"prompt": prompt, "winner": f"good{i}.png", "loser": f"bad{i}.png"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:4]))
    tiny = flags(backbone=backbone_folder("qwen2_5_vl"), **TINY_QWEN, validation_fraction=0.3)
    commands = {"recipes/": f"{ROOT}/recipes/"}

    def arguments(command: str) -> list[str]:
        for old, new in commands.items():
            command = command.replace(old, new)
        return shown(command)

    output = run([*arguments(train), *tiny], cwd=tmp_path)
    assert "accuracy_ties_wrong" in output
    output = run(arguments(measure), cwd=tmp_path)
    assert "accuracy_ties_wrong" in output
    (page,) = tmp_path.glob("runs/reward_model_evaluation-*/report.html")
    assert "test" in page.read_text()
    output = run([*arguments(use), *flags(**TINY, run_folder="out")], cwd=tmp_path)
    assert "llava_reward:runs/my-reward/reward_model" in output


@pytest.mark.slow
@pytest.mark.parametrize("perspective", ["fidelity", "safety", "ranking"])
def test_the_settings_for_every_perspective_train(perspective: str, tmp_path: Path) -> None:
    """On a tiny Qwen2.5-VL; alignment is trained above."""
    rows: list[dict[str, object]] = []
    for i in range(4):
        for name, colour in (("good", "white"), ("bad", "black")):
            Image.new("RGB", (56, 56), colour).save(tmp_path / f"{name}{i}.png")
        rows.append({"prompt": f"a fox {i}", "winner": f"good{i}.png", "loser": f"bad{i}.png"})
    if perspective == "safety":
        rows = [
            {"prompt": "", "image": f"{name}{i}.png", "label": int(name == "good")}
            for i in range(4)
            for name in ("good", "bad")
        ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ROOT / "recipes" / "configs" / f"reward_qwen2_5_vl_{perspective}.yaml"
    data = {"train_data": tmp_path / "data.jsonl", "validation_data": tmp_path / "data.jsonl"}
    run(
        [
            "recipes/train_reward_model.py",
            "--config",
            str(config),
            *flags(**data, **TINY_QWEN, backbone=backbone_folder("qwen2_5_vl"), run_folder=tmp_path / "run"),
        ]
    )
    facts = json.loads((tmp_path / "run" / "reward_model" / "llava_reward.json").read_text())
    assert facts["perspective"] == perspective


@pytest.mark.slow
def test_the_built_in_judge_is_trained_by_the_command_without_arguments(tmp_path: Path) -> None:
    """Here with fewer pairs, made beforehand where the recipe looks for them."""
    write_pairs(
        tmp_path / "runs" / "shapes-pairs-0",
        num_drawn_pairs=24,
        num_generated_pairs=8,
        num_generated_images=200,
        num_validation_pairs=8,
        num_test_pairs=8,
    )
    output = run(
        [str(ROOT / "recipes" / "train_reward_model.py"), *flags(num_steps=2, evaluate_every=2, run_folder="out")],
        cwd=tmp_path,
    )
    for word in ("validation", "test_drawn", "test_generated", str(Path("out") / "reward_model")):
        assert word in output
