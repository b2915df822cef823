"""The pages are true: commands are accepted, names exist, links lead somewhere, generated tables are up to date."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from recipes import ddpo, draft
from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.page import RECIPES, options_page
from tests.pages import PAGES, ROOT, blocks, commands

DOCS = Path(__file__).parent.parent / "docs"
OTHERS = {"config_file", "run", "repo"}
"""Options of accelerate and of recipes/publish.py."""


@pytest.mark.parametrize(("heading", "recipe"), [("DDPOConfig", ddpo), ("AlignPropConfig", draft)])
def test_each_setting_that_replaces_one_of_trl_exists(heading: str, recipe: Any) -> None:
    section = (DOCS / "coming_from_trl.md").read_text().split(f"## `{heading}`")[1].split("\n## ")[0]
    named = set(re.findall(r"--([a-z_0-9]+)", section)) - OTHERS
    assert len(named) > 4
    assert named <= {field.name for field in fields(recipe.Config)}


def test_every_setting_of_trls_ddpo_is_accounted_for() -> None:
    """The fields of DDPOConfig in trl 0.23.1."""
    section = (DOCS / "coming_from_trl.md").read_text().split("## `DDPOConfig`")[1].split("\n## ")[0]
    named = {
        name
        for row in section.splitlines()
        if row.startswith("|")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named >= {
        "exp_name", "run_name", "seed", "log_with", "tracker_kwargs", "accelerator_kwargs", "project_kwargs",
        "tracker_project_name", "logdir", "num_epochs", "save_freq", "num_checkpoint_limit", "mixed_precision",
        "allow_tf32", "resume_from", "sample_num_steps", "sample_eta", "sample_guidance_scale", "sample_batch_size",
        "sample_num_batches_per_epoch", "train_batch_size", "train_use_8bit_adam", "train_learning_rate",
        "train_adam_beta1", "train_adam_beta2", "train_adam_weight_decay", "train_adam_epsilon",
        "train_gradient_accumulation_steps", "train_max_grad_norm", "train_num_inner_epochs", "train_cfg",
        "train_adv_clip_max", "train_clip_range", "train_timestep_fraction", "per_prompt_stat_tracking",
        "per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count", "async_reward_computation",
        "max_workers", "negative_prompts", "push_to_hub",
    }  # fmt: skip


def recipe_commands() -> list[tuple[str, list[str]]]:
    """Each command line of the pages that starts a recipe: the page, and the arguments from the script on."""
    found: list[tuple[str, list[str]]] = []
    for page in PAGES:
        for language in ("", "sh"):
            for block in blocks(str(page.relative_to(ROOT)), language):
                for command in commands(block):
                    script = next((i for i, part in enumerate(command) if re.fullmatch(r"recipes/\w+\.py", part)), None)
                    if script is not None:
                        found.append((page.name, command[script:]))
    return found


def test_every_recipe_has_a_command_on_some_page_or_a_row_of_options() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.py")} == set(RECIPES)


@pytest.mark.parametrize(
    ("page", "command"), recipe_commands(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_of_the_pages_is_accepted(page: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All options exist and their values are in range; MODE, RECIPE and `...` are placeholders, as are models."""
    monkeypatch.setattr("rlhf_t2i.settings.by_model.pipeline_class_of", lambda _: "StableDiffusionPipeline")
    module = importlib.import_module(f"rlhf_t2i.settings.{Path(command[0]).stem}")
    arguments = [part for part in command[1:] if part != "..."]
    arguments = [part.replace("$seed", "0").replace("SEED", "0") for part in arguments]
    assert isinstance(parse_config(module.Config, arguments=arguments), module.Config)


def test_the_page_of_options_is_up_to_date() -> None:
    assert (DOCS / "options.md").read_text() == options_page(), "python -m rlhf_t2i.settings.page > docs/options.md"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= set(re.findall(r"\((\w+\.md)\)", index))


def test_every_function_that_implements_an_equation_exists() -> None:
    """The third column of docs/papers.md, relative to rlhf_t2i or from reward_model."""
    for row in (DOCS / "papers.md").read_text().splitlines():
        cells = row.split(" | ")
        if not row.startswith("| ") or len(cells) < 4 or cells[0] == "| paper":
            continue
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", cells[2]):
            path = name if name.startswith("reward_model") else f"rlhf_t2i.{name}"
            assert resolve(path) is not None, name


def resolve(path: str) -> Any:
    """The module or object of a dotted path."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    return None
