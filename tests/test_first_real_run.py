"""docs/first_real_run.md: each command and snippet in turn, at tiny size, on a folder that diffusers saved."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from rlhf_t2i.config import parse_config
from tests.pages import blocks, commands
from tests.publications import reset_processes

PAGE = "docs/first_real_run.md"
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TINY = {
    "ddpo": "--prompts_per_step 2 --images_per_prompt 4 --num_denoising_steps 4 --num_evaluation_steps 4 --num_steps 1"
    " --num_evaluation_images 4 --num_cpu_threads 1",
    "evaluate_policy": "--num_evaluation_images 6 --num_cpu_threads 1",
    "publish": f"--base {MODEL}",
}
"""Options that make each recipe small; a publication of a local folder is told its Hub id."""


def test_the_page_leads_from_prompts_to_a_published_lora(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    reward, use = blocks(PAGE, "python")
    (tmp_path / "my_rewards.py").write_text(reward)
    animals = ("fox", "hen", "cow", "cat", "dog", "owl")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a {animal}" for animal in animals))
    shown = [command for block in blocks(PAGE) for command in commands(block)]
    for command in shown:
        (script,) = (part for part in command if part.startswith("recipes/"))
        name = Path(script).stem
        given = [str(tiny_sd) if part == MODEL else part for part in command[command.index(script) + 1 :]]
        recipe = importlib.import_module(f"recipes.{name}")
        recipe.main(parse_config(recipe.Config, arguments=[*given, *TINY.get(name, "").split()]))
        reset_processes()
    assert [Path(script).stem for c in shown for script in c if script.startswith("recipes/")] == [
        "ddpo", "ddpo", "evaluate_policy", "compare", "publish"
    ]  # fmt: skip
    table = json.loads((tmp_path / "runs" / "bright-evaluated" / "table.json").read_text())
    assert list(table) == ["base", "runs/bright"]
    assert table["base"]["my_rewards:brightness"] != table["runs/bright"]["my_rewards:brightness"]
    assert "load_lora_weights" in (tmp_path / "runs" / "bright" / "publication" / "README.md").read_text()
    names: dict[str, object] = {}
    exec(use.replace(MODEL, str(tiny_sd)), names)
    assert names["image"].size == (16, 16)  # pyright: ignore[reportAttributeAccessIssue]
