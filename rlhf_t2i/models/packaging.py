"""A trained model as one self-contained diffusers pipeline."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import json
from pathlib import Path

import torch

from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import family_of, load_policy, pipeline_index
from rlhf_t2i.models.pipeline_parts import load_pipeline, missing_parts
from rlhf_t2i.models.quiet import only_errors
from rlhf_t2i.output.files import check_links
from rlhf_t2i.shapes.names import TOY_MODELS


def family_and_missing_parts(model: str) -> tuple[type[DiffusionPolicy], list[str]]:
    """Return a model's family, and the required parts that it lacks (such as the T5 of an SD 3).

    Raises FileNotFoundError or ValueError for one that is not a pipeline of a supported family.
    """
    _, index = pipeline_index(model)
    family = family_of(index["_class_name"])
    return family, [name for name in missing_parts(index) if name not in family.pipeline_class._optional_components]


def save_trained_pipeline(model: str, weights: Path, folder: Path) -> None:
    """Write all of `model` with a run's LoRA (merged) or full denoiser, in float32 and as safetensors.

    Its scheduler is the one that the run sampled with (DDIM for a diffusion model); all other parts are the model's
    own. Raises what `load_policy` does, and ValueError for a link out of the model's folder or that of the weights.
    """
    for given in (TOY_MODELS.get(model, Path(model)), weights):
        check_links(given)
    policy = load_policy(model, device=torch.device("cpu"), weights=weights)
    (source, index), component = pipeline_index(model), policy.component
    with only_errors():
        pipeline = load_pipeline(policy.pipeline_class, source, index, given={component: policy.network}, whole=True)
        if (weights / "pytorch_lora_weights.safetensors").is_file():
            pipeline.fuse_lora(components=[component])
            pipeline.unload_lora_weights()
        pipeline.scheduler = policy.levels.scheduler
        pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None):  # a path on this machine
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
