"""What an installed package has: the command `rlhf-t2i`, recipes and configs in the wheel, and lazy names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf_t2i
from rlhf_t2i.__main__ import copy_recipes, listing, main, recipes

ROOT = Path(__file__).parent.parent


def test_the_list_has_every_recipe_with_its_first_line_and_every_config() -> None:
    text = listing()
    for path in (ROOT / "recipes").glob("*.py"):
        assert f"\n{path.stem} " in f"\n{text}"
    assert "DDPO: policy-gradient training of a diffusion model" in text
    for path in [*(ROOT / "recipes" / "configs").glob("*.yaml"), *(ROOT / "accelerate_configs").glob("*.yaml")]:
        assert path.name in text


def test_each_config_belongs_to_the_recipe_of_its_command() -> None:
    found = recipes()
    assert [path.name for path in found["ddpo"]] == ["ddpo_sd15.yaml", "ddpo_sdxl.yaml", "ddpo_sdxl_24gb.yaml"]
    assert [path.name for path in found["fk_steering"]] == ["fk_sd15.yaml", "fk_sdxl_geneval.yaml"]
    assert sum(map(len, found.values())) == len(list((ROOT / "recipes" / "configs").glob("*.yaml")))


def test_copies_have_the_paths_and_the_content_of_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["copy", "ddpo", "accelerate_configs"])
    main(["copy", "draft"])  # has a file of prompts in common
    shown = [Path(line) for line in capsys.readouterr().out.splitlines()]
    copied = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert copied == sorted(shown)
    assert Path("recipes/ddpo.py") in shown
    assert Path("recipes/configs/draft_sd15.yaml") in shown
    for path in copied:
        assert path.read_bytes() == (ROOT / path).read_bytes()
    prompts = yaml.safe_load(Path("recipes/configs/ddpo_sd15.yaml").read_text())["prompts"]
    assert Path(prompts) in shown or Path("recipes/configs", prompts) in shown


def test_nothing_is_overwritten_or_copied_in_part(tmp_path: Path) -> None:
    changed = tmp_path / "recipes" / "configs" / "ddpo_sdxl.yaml"
    changed.parent.mkdir(parents=True)
    changed.write_text("num_steps: 1\n")
    with pytest.raises(FileExistsError, match=r"ddpo_sdxl.yaml exists and differs, so nothing was copied"):
        copy_recipes(["ddpo"], tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [changed]


def test_an_unknown_recipe_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["copy", "ddop"])
    error = capsys.readouterr().err
    assert error.startswith("error: There is no recipe 'ddop'; choose from best_of_n, ")
    assert error.count("\n") == 1


def test_the_package_names_what_it_has_without_importing_it() -> None:
    assert {"LlavaReward", "best_of_n", "fk_steering", "load_rewards", "__version__"} <= set(dir(rlhf_t2i))
    command = "import sys, rlhf_t2i; dir(rlhf_t2i); assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with pytest.raises(AttributeError, match="module 'rlhf_t2i' has no attribute 'ddop'"):
        rlhf_t2i.ddop  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(rlhf_t2i.__all__) - {"__version__"}))
def test_each_name_of_the_package_exists_and_is_described(name: str) -> None:
    assert getattr(rlhf_t2i, name).__doc__


def run(command: list[Any], folder: Path, **environment: str) -> str:
    """Return the output of a command in a folder; a failure shows its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_wheel_has_all_that_a_clone_has(tmp_path: Path) -> None:
    """Built from a copy, as a build leaves files behind, and installed into a folder of its own."""
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    work.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("rlhf_t2i", "reward_model", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels"], source)
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.startswith(f"rlhf_t2i-{rlhf_t2i.__version__}-")
    run([*pip, "install", "--no-deps", "--target", site, wheel], work)
    installed = {str(path.relative_to(site / "rlhf_t2i" / "recipes")) for path in (site / "rlhf_t2i").rglob("*.*")
                 if path.is_relative_to(site / "rlhf_t2i" / "recipes")}  # fmt: skip
    files = [path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.*")]
    files += [path.relative_to(ROOT) for path in (ROOT / "accelerate_configs").iterdir()]
    assert {str(path) for path in files if "__pycache__" not in path.parts} <= installed
    environment = {"PYTHONPATH": str(site)}
    assert run([sys.executable, "-m", "rlhf_t2i", "list"], work, **environment) == listing()
    run([sys.executable, site / "bin" / "rlhf-t2i", "copy", "ddpo"], work, **environment)
    config = ["--config", "recipes/configs/ddpo_sd15.yaml", "--model", "shapes", "--print_config"]
    assert "prompts_per_step: 64" in run([sys.executable, "recipes/ddpo.py", *config], work, **environment)
    command = "from rlhf_t2i.recipes import ddpo; print(ddpo.__file__)"
    assert run([sys.executable, "-c", command], work, **environment).startswith(str(site))
