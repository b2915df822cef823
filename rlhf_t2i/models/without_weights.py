"""Pipelines without weights: every network is built from its config, on fake tensors."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from torch import nn

from rlhf_t2i.models.architectures import published_architecture
from rlhf_t2i.models.load import family_of, pipeline_index
from rlhf_t2i.models.pipeline_parts import missing_parts

NetworkT = TypeVar("NetworkT", bound=nn.Module)
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")


class TokenizerStandIn:
    """Tokenizer without a vocabulary: every prompt has as many tokens as the text encoder takes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model_max_length = int(min(config["model_max_length"], 1 << 20))

    def __call__(self, texts: str | Sequence[str], *, max_length: int | None = None, **_: Any) -> SimpleNamespace:
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=[1])
        ids = torch.ones(len(texts), max_length or self.model_max_length, dtype=torch.int64)
        return SimpleNamespace(input_ids=ids, attention_mask=ids)

    def encode(self, text: str) -> list[int]:
        """Return one token a word, for a text that is counted alone, such as an instruction."""
        return [1] * len(text.split())

    def apply_chat_template(self, messages: Sequence[Any], **_: Any) -> str:
        return str(messages)


def architecture_of(model: str) -> dict[str, Any]:
    """Return the pipeline class and the config of each part of a model: published ones, or those of its folder.

    Raises ValueError for a model whose configs are neither here nor in a folder, and what `pipeline_index` does.
    """
    if (published := published_architecture(model)) is not None:
        return published
    source, index = pipeline_index(model)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"The configs of {model!r} are not known here; give the folder of the pipeline.")
    parts: dict[str, Any] = {}
    for name, part in index.items():
        file = next((folder / name / each for each in _CONFIGS if (folder / name / each).is_file()), None)
        if isinstance(part, list) and part[1] is not None and file is not None:
            parts[name] = {"_class_name": part[1], **json.loads(file.read_text(encoding="utf-8"))}
    options = {name: value for name, value in index.items() if isinstance(value, bool) and not name.startswith("_")}
    return {
        "_class_name": index["_class_name"], "parts": parts, "missing": list(missing_parts(index)), "options": options,
    }  # fmt: skip


def build_without_weights(
    architecture: Mapping[str, Any], *, dtype: torch.dtype, denoiser_dtype: torch.dtype,
    empty: Callable[..., torch.Tensor],
) -> Any:  # fmt: skip
    """Return the pipeline of an architecture; `empty(shape, dtype=...)` makes the tensors of its networks.

    Text encoders are in `dtype`, the denoiser in `denoiser_dtype` and the autoencoder in float32, as
    `load_stock_pipeline` loads them.
    """
    family = family_of(architecture["_class_name"])
    parts: dict[str, Any] = dict.fromkeys(architecture.get("missing", ()))
    for name, given in architecture["parts"].items():
        config = dict(given)
        if name.startswith("tokenizer"):
            parts[name] = TokenizerStandIn(config)
            continue
        class_name = config.pop("_class_name")
        kind: Any = getattr(diffusers, class_name, None) or getattr(transformers, class_name)
        precision = {family.component: denoiser_dtype, "vae": torch.float32}.get(name, dtype)
        parts[name] = _part(kind, config, precision, empty)
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    optional = {name: None for name in unused if name in family.pipeline_class._optional_components}
    if "safety_checker" in optional:
        optional["requires_safety_checker"] = False  # pyright: ignore[reportArgumentType]
    return family.pipeline_class(**{**optional, **architecture.get("options", {}), **parts})


def _part(kind: Any, config: Mapping[str, Any], dtype: torch.dtype, empty: Callable[..., torch.Tensor]) -> Any:
    if not issubclass(kind, nn.Module):
        return kind.from_config(config)
    family: Any = kind  # untyped again
    with torch.device("meta"):
        network = family.from_config(config) if hasattr(kind, "from_config") else family(family.config_class(**config))
    return replace_tensors(network, dtype=dtype, empty=empty)


def replace_tensors(network: NetworkT, *, dtype: torch.dtype, empty: Callable[..., torch.Tensor]) -> NetworkT:
    """Return a network, frozen and with each tensor made anew by `empty`; floats of the state are in `dtype`."""
    made, replaced = dict[int, torch.Tensor](), list[torch.Tensor]()  # tensors that two modules share stay one
    for module in network.modules():
        groups: tuple[Any, ...] = (module._parameters, module._buffers)
        for name, old in vars(module).items():  # as the positions of Qwen-Image's tokens
            if isinstance(old, torch.Tensor):
                setattr(module, name, empty(old.shape, dtype=old.dtype))
        for tensors in groups:
            for name, old in tensors.items():
                if old is not None and id(old) not in made:
                    kept = empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype)
                    made[id(old)] = nn.Parameter(kept, requires_grad=False) if isinstance(old, nn.Parameter) else kept
                    replaced.append(old)
                if old is not None:
                    tensors[name] = made[id(old)]
    return network.eval()
