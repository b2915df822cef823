"""Multimodal LLMs without weights: published sizes, and files from which the reward model's own code loads them."""

# tokenizers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from reward_model.backbones.load import FAMILIES, backbone_family
from reward_model.backbones.settings import max_tokens
from rlhf_t2i.models.without_weights import replace_tensors
from rlhf_t2i.shapes.names import TOY_BACKBONE, TOY_BACKBONE_FOLDER


@functools.cache
def published_backbones() -> dict[str, dict[str, Any]]:
    """Return what is published of each Hub id: config, settings of the image processor, and special tokens."""
    files = sorted((Path(__file__).parent / "architectures").glob("*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {name: architecture for architecture in found for name in architecture["ids"]}


def backbone_files(backbone: str, folder: Path) -> Path:
    """Return the folder of a backbone's files: its own, or `folder`, to which those of a published one are written.

    Raises ValueError for a Hub id whose sizes are not known here.
    """
    source = TOY_BACKBONE_FOLDER if backbone == TOY_BACKBONE else Path(backbone)
    if source.is_dir():
        return source.absolute()
    architecture = published_backbones().get(backbone)
    if architecture is None:
        raise ValueError(
            f"The sizes of the backbone {backbone!r} are not known here, only those of "
            f"{', '.join(published_backbones())}; give a folder that has its config.json and tokenizer."
        )
    folder.mkdir()
    for name, content in (("config", architecture["config"]), ("preprocessor_config", architecture["preprocessor"])):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    _save_tokenizer(folder, architecture["config"]["model_type"], **architecture["tokenizer"])
    return folder


def _save_tokenizer(folder: Path, family: str, *, special: dict[str, int], **options: str) -> None:
    """Write a tokenizer with the special tokens of a model, for which each word of a prompt is one unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    unknown, start = options.get("unk_token", "<unk>"), options.pop("starts_with", None)
    core = Tokenizer(models.WordLevel({unknown: 0, **special}, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if start:
        core.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, special[start])]
        )
    options["unk_token"] = unknown
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=list(special), **options)
    tokenizer.chat_template = import_module(f"reward_model.backbones.{FAMILIES[family]}").PUBLISHED_TEMPLATE
    tokenizer.save_pretrained(folder)


def build_backbone(source: str, *, dtype: torch.dtype, empty: Callable[..., Tensor]) -> Any:
    """Return the model of a folder with a config.json; `empty(shape, dtype=...)` makes its tensors."""
    with torch.device("meta"):
        if backbone_family(source) == "phi3_v":
            from reward_model.backbones.phi3_v_model import Phi3V, Phi3VConfig

            model: Any = Phi3V(Phi3VConfig.from_pretrained(source))
        else:
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source))
    return replace_tensors(model, dtype=dtype, empty=empty)


def most_tokens(source: str) -> int:
    """Return the most tokens of a row, of an image and a prompt, of the model of a folder with a config.json."""
    from reward_model.backbones.phi3_v_model import Phi3VConfig

    kind: Any = Phi3VConfig if backbone_family(source) == "phi3_v" else AutoConfig
    return max_tokens(kind.from_pretrained(source))
