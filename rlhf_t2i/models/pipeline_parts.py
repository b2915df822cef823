"""The parts of a diffusers pipeline on disk: a folder, a Hub id or a single file; a bad part is refused by name."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

SINGLE_FILES = (".safetensors", ".ckpt")
"""Suffixes of a checkpoint that holds a whole pipeline in one file."""
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
) -> Any:
    """Load a pipeline in float32, with the parts in `given` in place of its own.

    Parts that no family uses are left out, or with `whole` only where they are missing. `source` is a folder, a Hub id
    or a single file with `config_folder` beside it. Raises OSError or ValueError, naming the part, for one that is
    missing, damaged or incomplete.
    """
    known = set(index) | set(pipeline_class._optional_components)
    unused = [name for name in _UNUSED if name in known and not (whole and (Path(source) / name).is_dir())]
    parts = {**dict.fromkeys(unused), **missing_parts(index), **(given or {})}
    if "safety_checker" in unused:
        parts["requires_safety_checker"] = False
    path = Path(source)
    if path.is_file():
        return _single_file(pipeline_class, path, parts)
    folder = path if path.is_dir() else _downloaded(pipeline_class, source, parts)
    listed = {name: part for name, part in index.items() if isinstance(part, list) and name not in parts}
    for name in listed:
        if not (folder / name).is_dir():
            raise ValueError(f"{source!r} has no folder {name!r}, which its model_index.json lists.")
    for name, (library, class_name) in listed.items():
        kind = getattr(import_module(library), class_name, None) if library in ("diffusers", "transformers") else None
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            parts[name] = _load_part(kind, folder / name)
    return pipeline_class.from_pretrained(folder, dtype=torch.float32, **parts)


def missing_parts(index: Mapping[str, Any]) -> dict[str, None]:
    """Return keywords that tell `from_pretrained` which parts a pipeline lacks (such as the T5 of an SD 3)."""
    return {name: None for name, part in index.items() if part == [None, None]}


def config_folder(file: Path) -> Path:
    """Return the folder with the configs and tokenizers of a single-file checkpoint: its name without the suffix."""
    return file.with_suffix("")


def _load_part(kind: Any, folder: Path) -> Any:
    """Load a network in float32, from the files of a variant such as fp16 if there are no others."""
    try:
        part, report = kind.from_pretrained(
            folder, dtype=torch.float32, variant=variant_of(folder), output_loading_info=True
        )
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
    stems = [file.name.removesuffix(".safetensors") for file in sorted(folder.glob("*.safetensors"))]
    variants = [stem.partition(".")[2].partition("-")[0] or None for stem in stems]
    return None if None in variants or not variants else variants[0]


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
