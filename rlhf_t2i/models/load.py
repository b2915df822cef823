"""From a pipeline folder to a policy; the one place that knows which families there are."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAssignmentType=false, reportReturnType=false
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline

from rlhf_t2i.distributed.state import stored_weights
from rlhf_t2i.models.base import PipelinePolicy
from rlhf_t2i.models.family import FamilyClass
from rlhf_t2i.models.lora import add_lora
from rlhf_t2i.models.quiet import only_errors
from rlhf_t2i.shapes.names import TOY_RESOLUTION as PIXELS

BUILT_IN = Path(__file__).parent.parent / "shapes" / "weights"
"""What the model name `shapes` stands for."""
BUILT_IN_FLOW = BUILT_IN / "flow"
"""What `shapes-flow` stands for."""


def family_of(pipeline_class: str) -> FamilyClass:
    """What paints as a pipeline class of diffusers does. Raises ValueError, listing those that work, for another."""
    match pipeline_class:
        case "StableDiffusionPipeline":
            from rlhf_t2i.models.stable_diffusion import StableDiffusion

            return StableDiffusion
        case "StableDiffusionXLPipeline":
            from rlhf_t2i.models.sdxl import StableDiffusionXL

            return StableDiffusionXL
        case "StableDiffusion3Pipeline":
            from rlhf_t2i.models.sd3 import StableDiffusion3

            return StableDiffusion3
        case "FluxPipeline":
            from rlhf_t2i.models.flux import Flux

            return Flux
        case "ZImagePipeline":
            from rlhf_t2i.models.zimage import ZImage

            return ZImage
        case _:
            raise ValueError(
                f"The model is a {pipeline_class}; those that can be trained are StableDiffusionPipeline "
                f"(1.x and 2.x), StableDiffusionXLPipeline, StableDiffusion3Pipeline (3 and 3.5), FluxPipeline and "
                f"ZImagePipeline."
            )


def as_policy(pipeline: Any, *, resolution: int | None = None) -> PipelinePolicy:
    """A loaded diffusers pipeline as a policy, on its device and in its precision; its networks are shared, not copied.

    It paints squares of `resolution` pixels; None is what the model was made for.
    Raises ValueError for a pipeline of a family that is not known.
    """
    family = family_of(type(pipeline).__name__)
    device, dtype = pipeline.device, getattr(pipeline, family.component).dtype
    parts = family(pipeline, device=device, dtype=dtype, resolution=resolution)
    return PipelinePolicy(parts, device=device, dtype=dtype)


def load_policy(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    weights: Path | None = None,
    resolution: int | None = None,
) -> PipelinePolicy:
    """Load `shapes` (the built-in model), a pipeline folder or a Hub id, and put trained `weights` into it.

    `shapes-flow` is the built-in flow model. It paints squares of `resolution` pixels; None is what the model was made
    for. Raises FileNotFoundError or ValueError, saying what is missing, for a path that is no pipeline of a known
    family, and for weights that are none of what a run writes: its folder, what it exported or one of its checkpoints.
    """
    source, declared = declaration(model)
    with only_errors():
        family = family_of(declared["_class_name"])
        try:
            pipeline: Any = family.pipeline_class.from_pretrained(source, dtype=torch.float32, **_left_out(declared))
        except OSError as error:
            raise _not_loaded(model, error) from error
        if weights is not None:
            _load_weights(pipeline, family, weights)
        if resolution is None and model == "shapes-flow":
            resolution = PIXELS  # neither its folder nor the stock pipeline says so
        return PipelinePolicy(
            family(pipeline, device=device, dtype=dtype, resolution=resolution), device=device, dtype=dtype
        )


def declaration(model: str) -> tuple[str, dict[str, Any]]:
    """What diffusers loads `model` from, and its model_index.json: the class of the pipeline, and its parts.

    Raises FileNotFoundError or ValueError, saying what is missing, for a path that is no pipeline.
    """
    path = {"shapes": BUILT_IN, "shapes-flow": BUILT_IN_FLOW}.get(model, Path(model))
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{str(path)!r} is not a diffusers pipeline: it has no model_index.json. Give the folder that "
            f"a pipeline's `save_pretrained` wrote, or a Hub id."
        )
    if not path.exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"There is no model folder {model!r}. Give 'shapes' or 'shapes-flow' for a built-in model, the folder of a "
            f"diffusers pipeline, or a Hub id such as 'owner/name'."
        )
    source = str(path) if path.exists() else model
    with only_errors():
        try:
            return source, DiffusionPipeline.load_config(source)
        except OSError as error:
            raise _not_loaded(model, error) from error


def _not_loaded(model: str, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(f"The model {model!r} could not be loaded, neither as a folder nor from the Hub: {error}")


def lacking_parts(declared: dict[str, Any]) -> dict[str, Any]:
    """Parts that a pipeline lacks (T5 of an SD 3), of which diffusers wants to be told, from its model_index.json."""
    return {name: None for name, part in declared.items() if part == [None, None]}


def _left_out(declared: dict[str, Any]) -> dict[str, Any]:
    """Those, and what nobody here asks."""
    if declared["_class_name"] == "StableDiffusionPipeline":
        return {**lacking_parts(declared), "safety_checker": None, "requires_safety_checker": False}
    return lacking_parts(declared)


def _load_weights(pipeline: Any, family: FamilyClass, path: Path) -> None:
    """Put what a run learnt into a pipeline, whichever of its folders is given."""
    network = getattr(pipeline, family.component)
    if stored := stored_weights(path):
        config: dict[str, Any] = yaml.safe_load((path.parent.parent / "config.yaml").read_text())
        if config["lora_rank"] is not None:
            add_lora(
                network,
                rank=config["lora_rank"],
                alpha=float(config["lora_alpha"] or config["lora_rank"]),
                seed=0,
                targets=family.lora_targets,
            )
        unknown = stored.keys() - network.state_dict().keys()
        if unknown:
            raise ValueError(f"The checkpoint {str(path)!r} is of another model: it has {sorted(unknown)[:3]}.")
        network.load_state_dict(stored, strict=False)
        return
    for folder in (path, path / "lora", path / family.component):
        if (folder / "pytorch_lora_weights.safetensors").is_file():
            pipeline.load_lora_weights(folder)
            return
        if any(folder.glob("diffusion_pytorch_model*.safetensors")):
            trained = type(network).from_pretrained(folder, dtype=torch.float32)
            network.load_state_dict(trained.state_dict())
            return
    raise FileNotFoundError(
        f"{str(path)!r} holds no trained weights. Give a finished run's folder, the 'lora', 'unet' or 'transformer' "
        f"folder in it, or one of its checkpoints."
    )
