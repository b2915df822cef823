"""LLaVA-Reward (arXiv:2507.21391): a frozen multimodal LLM, and the small parts that make a judge of it.

    r(image, prompt) = head(SkipCA(h, z))      h: the last real token after the last layer; z: the projected image

One backbone carries any number of perspectives (alignment, fidelity, safety, ...). Each has its own LoRA in the
language model, projector, SkipCA and head; the vision tower and the language model's own weights are shared and
never change.
"""

# peft has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import delete_adapter, set_adapter
from torch import Tensor, nn

from reward_model.backbones.load import LORA_TARGETS
from reward_model.compatibility import looked_at
from reward_model.config import RewardModelConfig
from reward_model.heads import Head
from reward_model.skip_ca import SkipCrossAttention
from reward_model.types import Backbone, BackboneOutput, Inputs

GROUPS = ("lora", "projector", "skip_ca", "head")
"""What learns. All four are trained; the published code put only the first into its optimiser."""


def last_real_token(hidden: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B D"]:
    """The state of each row's last token that is not padding, on whichever side that lies."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class Perspective(nn.Module):
    """What one perspective adds to the backbone, beside its LoRA."""

    def __init__(self, config: RewardModelConfig, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector
        self.skip_ca = None
        if config.skip_ca:
            self.skip_ca = SkipCrossAttention(config.width, num_heads=config.skip_ca_heads, eps=config.skip_ca_eps)
        self.head = Head(config.width, config.head)


class RewardModel(nn.Module):
    """A backbone with perspectives, of which one is in use at a time."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.perspectives = nn.ModuleDict()
        self.configs: dict[str, RewardModelConfig] = {}
        self.active = ""

    def add(self, config: RewardModelConfig, *, seed: int = 0) -> None:
        """A new perspective, untrained: LoRA that changes nothing, the projector in use, random SkipCA and head.

        Its parts are float32, whatever the backbone is. It is then the one in use; `learn` lets it be trained.
        """
        name = config.perspective
        if name in self.configs:
            raise ValueError(f"There already is a perspective {name!r} on this backbone.")
        if config.width != self.backbone.width:
            raise ValueError(
                f"The perspective {name!r} was made for a backbone of width {config.width}; this one has "
                f"{self.backbone.width}."
            )
        device = next(self.model.parameters()).device
        # The first perspective takes the backbone's own projector; each later one is loaded over a copy.
        projector = copy.deepcopy(self.backbone.projector) if self.configs else self.backbone.projector
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.perspectives[name] = Perspective(config, projector).to(device)
            lora = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]: any number will do
                lora_dropout=config.lora_dropout,
                target_modules=list(LORA_TARGETS),
                init_lora_weights="gaussian",
            )
            with warnings.catch_warnings():  # that there are several is the point
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(lora, self.backbone.language_model, adapter_name=name)
        self.configs[name] = config
        for parameters in self.groups(name).values():
            for parameter in parameters.values():
                parameter.data = parameter.data.float()
        self.use(name)

    def remove(self, name: str) -> None:
        """Take away a perspective that is not the one in use."""
        assert name != self.active
        delete_adapter(self.backbone.language_model, name, prefix="lora_")
        known: Any = self.backbone.language_model.peft_config
        del known[name], self.perspectives[name], self.configs[name]

    def use(self, name: str) -> None:
        """Put one perspective's LoRA and projector in place; KeyError, naming those there are, for any other."""
        if name not in self.configs:
            raise KeyError(f"There is no perspective {name!r} here; there are {', '.join(self.configs) or 'none'}.")
        if name != self.active:
            set_adapter(self.backbone.language_model, name, inference_mode=True)
            self.backbone.projector = self._perspective(name).projector
            self.active = name

    def learn(self, groups: Sequence[str] = GROUPS) -> None:
        """Let these groups of the perspective in use be trained, and nothing else."""
        self.requires_grad_(False)
        for group, parameters in self.groups(self.active).items():
            for parameter in parameters.values():
                parameter.requires_grad_(group in groups)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Use one perspective for a while."""
        before = self.active
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def forward(self, **inputs: Tensor) -> Float[Tensor, "B d"]:
        """What the head of the perspective in use says of each row, in float32: a number, or a vector to compare."""
        return self.score(self.backbone.forward(inputs), self.active)

    def score(self, output: BackboneOutput, name: str) -> Float[Tensor, "B d"]:
        """Return the float32 output of a perspective's head; `output` must come from a forward with its LoRA."""
        perspective = self._perspective(name)
        pooled = last_real_token(output.hidden, output.hidden_mask)
        if perspective.skip_ca is not None:
            keys = self.configs[name].skip_ca_keys
            pooled = perspective.skip_ca(pooled, *looked_at(keys, output, self._padding))
        return perspective.head(pooled)

    def encode_image(self, inputs: Inputs) -> Inputs:
        """Run the vision tower, which all perspectives share, once for many."""
        return self.backbone.encode_image(inputs)

    def groups(self, name: str) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that belong to a perspective, in the groups that learn; names as a bundle stores them."""
        part = self._perspective(name)
        lora = {
            key.replace(f"{half}{name}.", half): parameter
            for key, parameter in self.backbone.language_model.named_parameters()
            for half in (".lora_A.", ".lora_B.")
            if f"{half}{name}." in key
        }
        skip_ca = dict(part.skip_ca.named_parameters()) if part.skip_ca is not None else {}
        found = [lora, dict(part.projector.named_parameters()), skip_ca, dict(part.head.named_parameters())]
        return {group: parameters for group, parameters in zip(GROUPS, found, strict=True) if parameters}

    def _padding(self) -> Float[Tensor, " D"]:
        """The embedding of the token that rows are padded with."""
        words = self.model.get_input_embeddings()
        return words(torch.tensor(self.backbone.prompt_tokenizer.padding_id, device=words.weight.device))

    def _perspective(self, name: str) -> Perspective:
        part = self.perspectives[name]
        assert isinstance(part, Perspective)
        return part


def visual_token_table(backbone: Backbone, sides: Sequence[int] = (512, 768, 1024)) -> str:
    """What images of some sizes cost a judge: how many visual tokens each becomes."""
    counts = [f"{side} x {side}: {backbone.num_visual_tokens(side, side):,}" for side in sides]
    return f"visual tokens of an image: {', '.join(counts)}"


def parameter_table(model: RewardModel) -> str:
    """How many parameters learn in each group of the perspective in use, and how many stay as they are."""
    counts = {
        group: sum(p.numel() for p in named.values() if p.requires_grad)
        for group, named in model.groups(model.active).items()
    }
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    total = sum(counts.values())
    rows = [*counts.items(), ("trained", total), ("frozen", frozen)]
    lines = [f"{name:12}{count:>16,}" for name, count in rows]
    return "\n".join([*lines, f"{100 * total / (total + frozen):.1f} % of {total + frozen:,} parameters learn"])
