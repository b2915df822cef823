"""HPSv3 (arXiv:2508.03789): Qwen2-VL 7B with a head on the state of a reward token behind a rubric."""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

from reward_model.backbones.patches import load_patch_preprocessor
from reward_model.backbones.prompts import PromptTokenizer
from reward_model.backbones.qwen2_vl import Qwen2VL
from reward_model.backbones.settings import max_tokens
from reward_model.scorers.hps_v3_rubric import BEFORE, BEHIND, REWARD_TOKEN
from reward_model.scorers.weights import fill, folder_of

NUM_PIXELS = 256 * 28 * 28
"""Pixels to which each image is resized: 256 visual tokens, at most."""
_HEAD = "rm_head."


@dataclass(frozen=True, slots=True)
class HpsV3:
    """score = head(state of the reward token)[0], unbounded; differentiable.

    The head, 3584 -> 1024 -> 16 -> 2 with ReLUs, returns mean and log-spread of a normal distribution; the score is
    the mean, as its package reports.
    """

    backbone: Qwen2VL
    head: nn.Sequential
    """In float32; the backbone has the type of its file, bfloat16."""
    reward_id: int
    batch_size: int = 8
    log_odds_unit: float = 1.0
    """About: trained were the probabilities that one of two normal variables exceeds the other."""

    @property
    def model(self) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": self.backbone.model, "head": self.head})

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        self.model.to(images.device)
        starts = range(0, len(prompts), self.batch_size)
        return torch.cat(
            [self._score(images[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in starts]
        )

    def _score(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        inputs = self.backbone.prepare(list(images), prompts)
        inputs = {name: tensor.to(images.device) for name, tensor in inputs.items()}
        states = self.backbone.forward(inputs).hidden[inputs["input_ids"] == self.reward_id]
        return self.head(states.to(next(self.head.parameters()).dtype))[:, 0]


def load_hps_v3(source: str | Path) -> HpsV3:
    """Load the published HPSv3.safetensors, in a folder with the other files of Qwen/Qwen2-VL-7B-Instruct.

    Raises FileNotFoundError or ValueError, naming what is wrong.
    """
    given = Path(source)
    file = given if given.is_file() else folder_of(source, scorer="HPSv3") / "HPSv3.safetensors"
    if not file.is_file():
        raise ValueError(f"The HPSv3 in {file.parent} has no file {file.name}.")
    return _loaded(file)


@cache
def _loaded(file: Path) -> HpsV3:
    try:
        tensors = load_file(file)
        config: Any = AutoConfig.from_pretrained(file.parent)
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent)
        preprocessor = load_patch_preprocessor(str(file.parent), NUM_PIXELS, NUM_PIXELS)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"The HPSv3 in {file.parent} is not complete: config, tokenizer and preprocessor of "
            f"Qwen/Qwen2-VL-7B-Instruct belong beside {file.name}. ({error})"
        ) from error
    if config.model_type != "qwen2_vl":
        raise ValueError(
            f"The files beside {file} are of a model of type {config.model_type!r}; it must be 'qwen2_vl'."
        )
    if REWARD_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    model = _model(tensors, config, reward_id, file=file)
    prompts = PromptTokenizer(tokenizer, config.image_token_id, _template(), max_tokens(config), answering=True)
    return HpsV3(Qwen2VL(model, prompts, preprocessor), _head(tensors, file), reward_id)


def _model(tensors: dict[str, Tensor], config: Any, reward_id: int, *, file: Path) -> Any:
    """Return the frozen backbone; of the old names of the file's tensors transformers knows the new ones."""
    embeddings = [tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1 or len(embeddings[0]) <= reward_id:
        raise ValueError(f"{file} has no embedding of the token {REWARD_TOKEN} (id {reward_id}), so it is no HPSv3.")
    config.text_config.vocab_size = len(embeddings[0])
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=embeddings[0].dtype, output_loading_info=True
    )
    for kind, names in (("lacks", report["missing_keys"]), ("has the unexpected", report["unexpected_keys"])):
        if names:
            raise ValueError(f"{file} {kind} {min(names)} ({len(names)} such tensors).")
    return model.eval().requires_grad_(False)


def _head(tensors: dict[str, Tensor], file: Path) -> nn.Sequential:
    own = {name.removeprefix(_HEAD): t.float() for name, t in tensors.items() if name.startswith(_HEAD)}
    try:
        (first, width), (second, _), (last, _) = (own[f"{number}.weight"].shape for number in (0, 3, 5))
    except KeyError as error:
        raise ValueError(f"{file} lacks {_HEAD}{str(error)[1:-1]}, so it is no HPSv3.") from error
    head = nn.Sequential(
        nn.Linear(width, first), nn.ReLU(), nn.Identity(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, last)
    )
    fill(head, own, file=file)
    return head.eval().requires_grad_(False)


def _template() -> str:
    """Return the chat template of Qwen2-VL with the rubric around the prompt."""
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    before = f"{system}<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{BEFORE}"
    behind = f"{BEHIND}<|im_end|>\n<|im_start|>assistant\n"
    return f"{{{{ {json.dumps(before)} }}}}{{{{ messages[0]['content'][1]['text'] }}}}{{{{ {json.dumps(behind)} }}}}"
