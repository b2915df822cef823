"""Every command and config that the README and recipes/configs show runs, at tiny size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```$", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [text for language, text in BLOCKS if language == ""]
(SNIPPET,) = [text for language, text in BLOCKS if language == "python"]
TINY = {
    "num_steps": 1, "prompts_per_step": 2, "images_per_prompt": 4, "num_denoising_steps": 4,
    "num_evaluation_images": 4, "microbatch_size": 8,
}  # fmt: skip


def run(arguments: list[str], *, cwd: Path = ROOT) -> str:
    """A recipe by `accelerate launch` without any `accelerate config`; what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "home")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def flags(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_the_readme_and_ci_give_the_same_commands() -> None:
    assert "pip install -e . -c constraints.txt && accelerate launch recipes/ddpo.py" in COMMANDS
    assert "pip install -e '.[dev]' -c constraints.txt && pytest" in COMMANDS
    ci = (ROOT / ".ci" / "run").read_text()
    assert "-e '.[dev]' -c constraints.txt" in ci
    assert "\npytest\n" in ci


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
def test_weights_are_compared_on_the_same_pictures(tmp_path: Path) -> None:
    small = {**TINY, "learning_rate": 1e-3}
    run(["recipes/ddpo.py", *flags(**small, run_folder=tmp_path / "run")])
    compared = ",".join(["base", str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints" / "step_000001")])
    output = run(
        [
            "recipes/evaluate_policy.py",
            *flags(weights=compared, num_images=8, num_denoising_steps=4, run_folder=tmp_path / "evaluation"),
        ]
    )
    lines = [line for line in output.splitlines() if "oracle_pass" in line]
    assert len(lines) == 3
    base, exported, checkpoint = (line.partition(": ")[2] for line in lines)
    assert exported == checkpoint != base
    assert len(list((tmp_path / "evaluation" / "pictures").glob("*.png"))) == 3
