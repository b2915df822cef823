"""A tuned painter as one pipeline that needs nothing else."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from rlhf_t2i.policies.stable_diffusion import BUILT_IN, load_stable_diffusion, only_errors


def save_tuned_pipeline(model: str, weights: Path, folder: Path) -> None:
    """Write all of `model` with a run's `lora` (merged) or `unet` in it, in float32 and as safetensors.

    Its scheduler is the DDIM that the run painted with; all other parts are the model's own. Raises what
    `load_stable_diffusion` does.
    """
    policy = load_stable_diffusion(model, device=torch.device("cpu"), weights=weights)
    source = str(BUILT_IN) if model == "shapes" else model
    with only_errors():
        pipeline: Any = StableDiffusionPipeline.from_pretrained(source, unet=policy.unet, dtype=torch.float32)
        if (weights / "pytorch_lora_weights.safetensors").is_file():
            pipeline.fuse_lora(components=["unet"])
            pipeline.unload_lora_weights()
        pipeline.scheduler = policy.scheduler
        pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and facts.pop("_name_or_path", None):  # where it lay on this machine
            path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
