"""Load a pipeline folder or Hub id as a policy."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAssignmentType=false, reportReturnType=false
from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rlhf_t2i.distributed.state import stored_weights
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.lora import add_lora
from rlhf_t2i.models.quiet import only_errors
from rlhf_t2i.models.table import family_entry
from rlhf_t2i.run_folder import read_config
from rlhf_t2i.shapes.names import TOY_MODELS, default_resolution


def family_of(pipeline_class: str) -> type[DiffusionPolicy]:
    """Return the family of a diffusers pipeline class, by name. Raises ValueError, listing those that are supported."""
    entry = family_entry(pipeline_class)
    return getattr(import_module(f"rlhf_t2i.models.{entry.module}"), entry.name)


def as_policy(pipeline: Any, *, resolution: int | None = None) -> DiffusionPolicy:
    """Wrap a loaded diffusers pipeline, on its device and in its precision; its networks are shared, not copied.

    Images are squares of `resolution` pixels; None is the model's own size. Raises ValueError for a pipeline of an
    unsupported family.
    """
    family = family_of(type(pipeline).__name__)
    dtype = getattr(pipeline, family.component).dtype
    return family(pipeline, device=pipeline.device, dtype=dtype, resolution=resolution)


def load_policy(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    weights: Path | None = None,
    resolution: int | None = None,
) -> DiffusionPolicy:
    """Load a toy model by name (`shapes.names.TOY_MODELS`), a pipeline folder or a Hub id.

    `weights` are trained ones to load into it: the folder of a finished run, its exported `lora`, `unet` or
    `transformer`, or one of its checkpoints. Images are squares of `resolution` pixels; None is the model's own size.
    Raises FileNotFoundError or ValueError for a path that is not a pipeline of a supported family, or holds no weights.
    """
    source, index = pipeline_index(model)
    with only_errors():
        family = family_of(index["_class_name"])
        try:
            pipeline: Any = family.pipeline_class.from_pretrained(source, dtype=torch.float32, **_unused_parts(index))
        except OSError as error:
            raise _not_loaded(model, error) from error
        if weights is not None:
            _load_weights(pipeline, family, weights)
        resolution = resolution or default_resolution(model)
        return family(pipeline, device=device, dtype=dtype, resolution=resolution)


def pipeline_index(model: str) -> tuple[str, dict[str, Any]]:
    """Return the path or Hub id that diffusers loads `model` from, and its model_index.json.

    Raises FileNotFoundError or ValueError for a path that is not a pipeline.
    """
    path = TOY_MODELS.get(model, Path(model))
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{str(path)!r} is not a diffusers pipeline: it has no model_index.json. Give the folder that "
            f"a pipeline's `save_pretrained` wrote, or a Hub id."
        )
    if not path.exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"There is no model folder {model!r}. Give {' or '.join(map(repr, TOY_MODELS))} for a built-in model, the "
            f"folder of a diffusers pipeline, or a Hub id such as 'owner/name'."
        )
    source = str(path) if path.exists() else model
    with only_errors():
        try:
            return source, DiffusionPipeline.load_config(source)
        except OSError as error:
            raise _not_loaded(model, error) from error


def _not_loaded(model: str, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(f"The model {model!r} could not be loaded, neither as a folder nor from the Hub: {error}")


def missing_parts(index: dict[str, Any]) -> dict[str, None]:
    """Return keywords that tell `from_pretrained` which parts a pipeline lacks (such as the T5 of an SD 3)."""
    return {name: None for name, part in index.items() if part == [None, None]}


def _unused_parts(index: dict[str, Any]) -> dict[str, Any]:
    """Return keywords for the missing parts and for those that are not used here."""
    if index["_class_name"] == "StableDiffusionPipeline":
        return {**missing_parts(index), "safety_checker": None, "requires_safety_checker": False}
    return {**missing_parts(index)}


def _load_weights(pipeline: Any, family: type[DiffusionPolicy], path: Path) -> None:
    """Load a run's trained weights into a pipeline, from any of the run's folders that hold them."""
    network = getattr(pipeline, family.component)
    if stored := stored_weights(path):
        config = read_config(path.parent.parent)
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
