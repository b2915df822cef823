"""Load a pipeline folder or Hub id as a policy."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAssignmentType=false, reportReturnType=false
from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

from reward_model.quantization import Quantization, check_installed, quantize
from rlhf_t2i.distributed.meta import has_no_weights
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.lazy_encoders import LazyEncoder, fingerprint_of_files
from rlhf_t2i.models.pipeline_parts import (
    LOADING_ERRORS,
    SINGLE_FILES,
    config_folder,
    first_line,
    load_pipeline,
)
from rlhf_t2i.models.quiet import only_errors
from rlhf_t2i.models.table import FAMILIES, family_entry
from rlhf_t2i.models.text_encoders import PromptStore, in_precision
from rlhf_t2i.models.weights import load_weights
from rlhf_t2i.passed import passed
from rlhf_t2i.shapes.names import TOY_MODELS, default_resolution
from rlhf_t2i.types import Resolution


def family_of(pipeline_class: str) -> type[DiffusionPolicy]:
    """Return the family of a diffusers pipeline class, by name. Raises ValueError, listing those that are supported."""
    entry = family_entry(pipeline_class)
    return getattr(import_module(f"rlhf_t2i.models.{entry.module}"), entry.name)


def as_policy(pipeline: Any, *, resolution: Resolution | None = None) -> DiffusionPolicy:
    """Wrap a loaded diffusers pipeline, on its device and in its precision; its networks are shared, not copied.

    Images are of `resolution` pixels; None is the model's own size. Raises ValueError for a pipeline of an
    unsupported family.
    """
    family = family_of(type(pipeline).__name__)
    dtype = getattr(pipeline, family.component).dtype
    return family(pipeline, device=pipeline.device, dtype=dtype, resolution=resolution)


def load_policy(  # noqa: PLR0913  # one keyword for each option of a model
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    weights: Path | None = None,
    resolution: Resolution | None = None,
    whole: bool = False,
    offload_text_encoders: bool = False,
    quantization: Quantization | None = None,
    complex_human_instruction: bool = True,
    prompt_store: Callable[[str], PromptStore] | None = None,
    only_encodes: bool = False,
) -> DiffusionPolicy:
    """Load a toy model by name (`shapes.names.TOY_MODELS`), a pipeline folder, a Hub id or a single-file checkpoint.

    All networks are loaded in `dtype`, but with `whole`, for training all weights, the denoiser is float32. `weights`
    are trained ones to load into it, as in `load_weights`. Images are of `resolution` pixels; None is the
    model's own size. `offload_text_encoders` is as in `DiffusionPolicy`; `quantization`, of denoiser and text encoders,
    as in `quantize`. Without `complex_human_instruction` prompts are encoded without that of the stock pipeline.
    `prompt_store` opens a store of encoded prompts for a fingerprint of the text encoders, which are then loaded only
    for a prompt that is not in it; with `only_encodes` the denoiser has no weights. A pipeline that a caller in Python
    passed under the name is not loaded again, not quantised and not given a store. Raises FileNotFoundError or
    ValueError for a path that is not a pipeline of a supported family, and for weights that are missing or do not fit.
    """
    pipeline = passed().pipelines.get(model)
    _check_passed(pipeline, quantization, prompt_store)
    if quantization:
        check_installed(quantization)  # before minutes of loading

    def quantized(network: Any) -> Any:
        if quantization and network is not None and not has_no_weights(network):
            quantize(network, quantization, device=device, dtype=dtype)
        return network

    if pipeline is None:
        pipeline = load_stock_pipeline(
            model, dtype=dtype, denoiser_dtype=None if only_encodes else torch.float32 if whole else dtype,
            lazily=(lambda network: quantized(in_precision(network, dtype))) if prompt_store else None,
        )  # fmt: skip
    family = family_of(type(pipeline).__name__)
    encoders = [name for name in pipeline.components if name.startswith(("text_encoder", "tokenizer"))]
    with only_errors():
        if weights is not None:
            load_weights(pipeline, family, weights, model=model)
        for name in (family.component, *(name for name in encoders if name.startswith("text_encoder"))):
            if not isinstance(getattr(pipeline, name), LazyEncoder):
                quantized(getattr(pipeline, name))
        settings = [family.__name__, str(dtype), quantization, complex_human_instruction]
        store = prompt_store and prompt_store(fingerprint_of_files(pipeline.source_folder, encoders, settings=settings))
        policy = family(
            pipeline, device=device, dtype=dtype, resolution=resolution or default_resolution(model),
            offload_text_encoders=offload_text_encoders, prompt_store=store,
        )  # fmt: skip
    if not complex_human_instruction:
        policy.leave_out_instruction()
    return policy


def _check_passed(pipeline: Any, quantization: Quantization | None, prompt_store: Any) -> None:
    """Raise ValueError for options that a pipeline of the caller, which may not be changed, cannot have."""
    if pipeline is not None and quantization:
        raise ValueError(
            f"quantization is {quantization}; it must be null for a pipeline of the caller, which it would change."
        )
    if pipeline is not None and prompt_store:
        raise ValueError("cache_embeddings must be null for a pipeline of the caller, whose text encoders are loaded.")


def load_stock_pipeline(
    model: str, *, dtype: torch.dtype = torch.float32, denoiser_dtype: torch.dtype | None = torch.float32,
    lazily: Callable[[Any], Any] | None = None,
) -> Any:  # fmt: skip
    """Return the diffusers pipeline of a model, without unused parts; raises what `load_policy` does.

    Text encoders are in `dtype`, and loaded `lazily` as in `load_pipeline`; the autoencoder, which some families
    compute in another precision, is float32. A denoiser whose dtype is None has no weights.
    """
    source, index = pipeline_index(model)
    family = family_of(index["_class_name"])
    dtypes = {name: dtype for name in index if name.startswith("text_encoder")} | {family.component: denoiser_dtype}
    with only_errors():
        try:
            pipeline = load_pipeline(family.pipeline_class, source, index, dtypes=dtypes, lazily=lazily)
            if denoiser_dtype is not None:
                getattr(pipeline, family.component).to(denoiser_dtype)  # of a single file
            return pipeline
        except OSError as error:
            raise _not_loaded(model, error) from error


def pipeline_index(model: str) -> tuple[str, dict[str, Any]]:
    """Return the path or Hub id that diffusers loads `model` from, and its model_index.json.

    Raises FileNotFoundError or ValueError for a path that is not a pipeline.
    """
    path = TOY_MODELS.get(model, Path(model))
    if path.is_file() and path.suffix in SINGLE_FILES:
        return str(path), _index_of_file(path)
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
    return source, _index_of(source)


def _index_of(source: str) -> dict[str, Any]:
    """Return the model_index.json of a folder or Hub id; FileNotFoundError or ValueError without one."""
    with only_errors():
        try:
            index: Any = DiffusionPipeline.load_config(source)
        except OSError as error:
            raise _not_loaded(source, error) from error
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"The model_index.json of {source!r} has no _class_name, the diffusers pipeline class; supported are "
            f"{', '.join(FAMILIES)}."
        )
    return index


def _index_of_file(file: Path) -> dict[str, Any]:
    """Return the model_index.json of a single-file checkpoint: of the folder beside it, or of the Hub."""
    folder = config_folder(file)
    if (folder / "model_index.json").is_file():
        return _index_of(str(folder))
    try:
        hub_id = fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    except LOADING_ERRORS as error:
        raise ValueError(f"The checkpoint {str(file)!r} could not be read: {first_line(error)}") from error
    try:
        return _index_of(hub_id)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The configs of the checkpoint {str(file)!r} are neither in the folder {str(folder)!r} (as of a "
            f"pipeline, without weights) nor could they be loaded from {hub_id!r} on the Hub."
        ) from error


def _not_loaded(model: str, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(
        f"The model {model!r} could not be loaded, neither as a folder nor from the Hub: {first_line(error)}"
    )
