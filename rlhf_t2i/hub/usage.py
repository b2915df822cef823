"""Python code for a model card: loading the published model, and repeating the first evaluation image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_t2i.hub.base import Base
from rlhf_t2i.output.run_folder import LORA_WEIGHTS
from rlhf_t2i.shapes.names import TOY_MODELS
from rlhf_t2i.training.finished_run import FinishedRun

_PACKAGE = Path(__file__).parent.parent
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def diffusers_usage(
    run: FinishedRun, base: Base, name: str, *, revision: str | None, full_pipeline: bool
) -> tuple[str, str]:
    """Return code for plain diffusers: one part loads `pipe` and samples, the next repeats the first evaluation image.

    `name` is the Hub id or the folder of the publication.
    """
    assert base.family is not None
    stock = base.family.stock_arguments(run.config["guidance_scale"])
    if not run.config.get("complex_human_instruction", True):  # older runs have no such option
        stock["complex_human_instruction"] = None
    arguments: dict[str, Any] = {
        "base": base,
        "built_in_folder": TOY_MODELS[base.source].relative_to(_PACKAGE).as_posix() if base.built_in else None,
        "pipeline": base.family.pipeline_class.__name__,
        "is_flow": base.family.is_flow,
        "replaces_solver": base.family.replaces_solver,
        "name": name,
        "revision": revision,
        "full_pipeline": full_pipeline,
        "weight_name": LORA_WEIGHTS,
        "prompt": _literal(run.captions["prompts"][0]),
        "seed": run.captions["seeds"][0],
        "num_steps": run.num_evaluation_steps,
        "arguments": {name: repr(value) for name, value in stock.items()},
        "image_size": run.image_size,
        "eta": run.config["evaluation_eta"],
    }
    usage, first_image = (TEMPLATES.get_template(file) for file in ("use_pipeline.py.jinja", "first_image.py.jinja"))
    return usage.render(arguments), first_image.render(arguments)


def _literal(text: str) -> str:
    """Return a text as a literal of Python that neither ends a block of code nor starts a tag of HTML."""
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c").replace("`", "\\u0060")


def reward_model_usage(run: FinishedRun, name: str, *, revision: str | None) -> str:
    """Return code that loads and calls the reward model `name`, a Hub id or a folder."""
    pairwise = run.config.get("loss") == "general_preference"
    return TEMPLATES.get_template("use_reward_model.py.jinja").render(name=name, revision=revision, pairwise=pairwise)
