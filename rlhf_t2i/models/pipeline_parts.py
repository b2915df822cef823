"""The parts of a diffusers pipeline on disk: a folder, a Hub id or a single file; a bad part is refused by name."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rlhf_t2i.distributed.meta import without_weights
from rlhf_t2i.models.lazy_encoders import LazyEncoder

SINGLE_FILES = (".safetensors", ".ckpt")
"""Suffixes of a checkpoint that holds a whole pipeline in one file."""
_PIECE = 8
"""Weights that are read and converted at a time; those of 12 billion parameters are under 0.3 GB in float32."""
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that no family uses."""
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
"""What diffusers, transformers, torch and safetensors raise for files that they cannot load."""


def load_pipeline(
    pipeline_class: Any,
    source: str,
    index: Mapping[str, Any],
    *,
    given: Mapping[str, Any] | None = None,
    whole: bool = False,
    dtypes: Mapping[str, torch.dtype | None] | None = None,
    lazily: Callable[[Any], Any] | None = None,
) -> Any:
    """Load a pipeline, with the parts in `given` in place of its own; networks are float32 unless in `dtypes`, by name.

    The networks of a folder are loaded one after another, the largest one last; one of diffusers whose dtype is None is
    built without weights. Those of a single file are float32.
    With `lazily`, which is applied to each of them, text encoders are loaded by their first call, and the pipeline has
    the folder of its files as `source_folder`. Parts that no family uses are left out, or with `whole` only where they
    are missing. `source` is a folder, a Hub id or a single file with `config_folder` beside it. Raises OSError or
    ValueError, naming the part, for one that is missing, damaged or incomplete.
    """
    known = set(index) | set(pipeline_class._optional_components)
    unused = [name for name in _UNUSED if name in known and not (whole and (Path(source) / name).is_dir())]
    parts = {**dict.fromkeys(unused), **missing_parts(index), **(given or {})}
    if "safety_checker" in unused:
        parts["requires_safety_checker"] = False
    path = Path(source)
    if path.is_file() and lazily is not None:
        raise ValueError(f"cache_embeddings needs a pipeline's folder or a Hub id; {source!r} is a single file.")
    if path.is_file():
        return _single_file(pipeline_class, path, parts)
    folder = path if path.is_dir() else _downloaded(pipeline_class, source, parts)
    later = dict[str, LazyEncoder]()
    listed = {name: part for name, part in index.items() if isinstance(part, list) and name not in parts}
    for name in listed:
        if not (folder / name).is_dir():
            raise ValueError(f"{source!r} has no folder {name!r}, which its model_index.json lists.")
    for name, (library, class_name) in sorted(listed.items(), key=lambda item: _num_bytes(folder / item[0])):
        kind = getattr(import_module(library), class_name, None) if library in ("diffusers", "transformers") else None
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            load = partial(_load_part, kind, folder / name, (dtypes or {}).get(name, torch.float32))
            if lazily is None or not name.startswith("text_encoder"):
                parts[name] = load()
                continue
            family: Any = kind  # untyped again
            parts[name], config = None, family.config_class.from_pretrained(folder / name)
            later[name] = LazyEncoder(lambda load=load: lazily(load()), config=config)
    pipeline = pipeline_class.from_pretrained(folder, dtype=torch.float32, **parts)
    for name, encoder in later.items():
        setattr(pipeline, name, encoder)
    pipeline.source_folder = folder
    return pipeline


def missing_parts(index: Mapping[str, Any]) -> dict[str, None]:
    """Return keywords that tell `from_pretrained` which parts a pipeline lacks (such as the T5 of an SD 3)."""
    return {name: None for name, part in index.items() if part == [None, None]}


def config_folder(file: Path) -> Path:
    """Return the folder with the configs and tokenizers of a single-file checkpoint: its name without the suffix."""
    return file.with_suffix("")


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _load_part(kind: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """Load a network, from the files of a variant such as fp16 if there are no others; without weights for None."""
    if dtype is None:
        network = _without_weights(kind, folder)
        _forget_stored_buffers(network)
        return network
    try:
        if dtype != torch.float32 and (part := load_in_pieces(kind, folder, dtype)) is not None:
            return part
        part, report = kind.from_pretrained(folder, dtype=dtype, variant=variant_of(folder), output_loading_info=True)
    except LOADING_ERRORS as error:
        raise ValueError(f"The {folder.name} in {str(folder)!r} could not be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"The {folder.name} in {str(folder)!r} is incomplete: {len(missing)} weights are missing "
            f"({', '.join(missing[:3])})."
        )
    return part


def variant_of(folder: Path) -> str | None:
    """Return the variant of a network's files, such as fp16; None if there are files without one."""
    variants = [_variant(file) for file in sorted(folder.glob("*.safetensors"))]
    return None if None in variants or not variants else variants[0]


def _variant(file: Path) -> str | None:
    return file.name.removesuffix(".safetensors").partition(".")[2].partition("-")[0] or None


def load_in_pieces(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Load a network of diffusers in `dtype` while little of its files is in memory; None for one that has no such way.

    diffusers maps a whole file, whose pages stay in memory until the last weight has been converted.
    """
    files = [file for file in folder.glob("*.safetensors") if _variant(file) == variant_of(folder)]
    if not issubclass(kind, ModelMixin) or kind._keep_in_fp32_modules or not files:
        return None
    network = _without_weights(kind, folder)
    missing = set(network.state_dict())
    _forget_stored_buffers(network)
    for file in files:
        with safe_open(file, "pt") as opened:
            names = sorted(opened.keys())
        for piece in (names[start : start + _PIECE] for start in range(0, len(names), _PIECE)):
            with safe_open(file, "pt") as opened:  # again, so that the pages of the piece before are let go
                weights = {name: _converted(opened.get_tensor(name), dtype) for name in piece if name in missing}
            network.load_state_dict(weights, strict=False, assign=True)
            missing -= weights.keys()
    return None if missing else network.eval()


def _without_weights(kind: Any, folder: Path) -> Any:
    with without_weights():
        return kind.from_config(kind.load_config(folder), _name_or_path=str(folder))


def _forget_stored_buffers(network: nn.Module) -> None:
    """Let go of buffers that the files have, such as the positions of an SD 3, which take 0.9 GB in float32."""
    for module in network.modules():
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            if module._buffers[name] is not None:
                module._buffers[name] = module._buffers[name].to("meta")  # pyright: ignore[reportOptionalMemberAccess]


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _downloaded(pipeline_class: Any, source: str, parts: Mapping[str, Any]) -> Path:
    """Return the local folder of a Hub id; a repository that has half-precision files only gives those."""
    folder = Path(pipeline_class.download(source, **parts))
    networks = [config.parent for config in folder.glob("*/config.json")]
    if all(any((*network.glob("*.safetensors"), *network.glob("*.bin"))) for network in networks):
        return folder
    return Path(pipeline_class.download(source, variant="fp16", **parts))


def _single_file(pipeline_class: Any, file: Path, parts: Mapping[str, Any]) -> Any:
    folder = config_folder(file)
    configs = {"config": str(folder)} if folder.is_dir() else {}
    try:
        return pipeline_class.from_single_file(str(file), dtype=torch.float32, **configs, **parts)
    except LOADING_ERRORS as error:
        raise ValueError(f"The checkpoint {str(file)!r} could not be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
