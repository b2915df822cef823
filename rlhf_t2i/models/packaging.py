"""A tuned painter as one pipeline that needs nothing else."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlhf_t2i.models.family import FamilyClass
from rlhf_t2i.models.load import declaration, family_of, lacking_parts, load_policy
from rlhf_t2i.models.quiet import only_errors


def family_and_lack(model: str) -> tuple[FamilyClass, list[str]]:
    """Of which family a model is, and the parts that it lacks and that diffusers wants to be told of (T5 of an SD 3).

    Raises FileNotFoundError or ValueError for one that is no pipeline of a known family.
    """
    _, declared = declaration(model)
    family = family_of(declared["_class_name"])
    return family, [name for name in lacking_parts(declared) if name not in family.pipeline_class._optional_components]


def save_tuned_pipeline(model: str, weights: Path, folder: Path) -> None:
    """Write all of `model` with a run's `lora` (merged) or whole denoiser in it, in float32 and as safetensors.

    Its scheduler is the one that the run painted with (of a diffusion model DDIM); all other parts are the model's own.
    Raises what `load_policy` does.
    """
    policy = load_policy(model, device=torch.device("cpu"), weights=weights)
    (source, declared), component = declaration(model), policy.family.component
    with only_errors():
        parts = {**lacking_parts(declared), component: policy.network}
        pipeline: Any = policy.family.pipeline_class.from_pretrained(source, dtype=torch.float32, **parts)
        if (weights / "pytorch_lora_weights.safetensors").is_file():
            pipeline.fuse_lora(components=[component])
            pipeline.unload_lora_weights()
        pipeline.scheduler = policy.family.levels.scheduler
        pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and facts.pop("_name_or_path", None):  # where it lay on this machine
            path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
