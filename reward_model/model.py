"""LLaVA-Reward (arXiv:2507.21391): a frozen multimodal LLM with small trained modules that make it a reward model.

    r(image, prompt) = head(SkipCA(h, z))      h: the last real token after the last layer; z: the visual tokens

or, as an option that is not the paper's, temperature * log p(prompt | image) by the language model with its LoRA.

One backbone carries any number of perspectives (alignment, fidelity, safety, ...). Each has its own LoRA in the
language model, projector, SkipCA and head; the vision tower and the language model's own weights are shared and
frozen.
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
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import delete_adapter, set_adapter
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from reward_model.backbones.load import LORA_TARGETS
from reward_model.config import RewardModelConfig
from reward_model.heads import Head
from reward_model.prompt_likelihood import check_language_head, prompt_log_likelihood
from reward_model.quantization import num_elements
from reward_model.skip_ca import SkipCrossAttention, skip_ca_inputs
from reward_model.types import Backbone, BackboneOutput, Inputs

GROUPS = ("lora", "projector", "skip_ca", "head")
"""The parameter groups of a perspective. All four are trained; the published code optimised only the first."""


def last_real_token(hidden: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B D"]:
    """Return the state of each row's last token that is not padding, for padding on either side."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class Perspective(nn.Module):
    """The modules of one perspective, besides its LoRA."""

    def __init__(self, config: RewardModelConfig, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector
        self.skip_ca = self.head = None
        if config.skip_ca:
            self.skip_ca = SkipCrossAttention(config.width, num_heads=config.skip_ca_heads, eps=config.skip_ca_eps)
        if config.readout == "last_token":
            self.head = Head(config.width, config.head)


class RewardModel(nn.Module):
    """A backbone with perspectives, one of which is active at a time."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.perspectives = nn.ModuleDict()
        self.configs: dict[str, RewardModelConfig] = {}
        self.active = ""
        self.is_merged = False
        """True if the LoRA is part of the weights that it adapts, and no perspective can be added."""

    def add(self, config: RewardModelConfig, *, seed: int = 0) -> None:
        """Add an untrained perspective and make it active.

        Its LoRA is without effect, its projector is the one in use, SkipCA and head are random, drawn by `seed`. Its
        parameters are float32, whatever the backbone is; `set_trainable` decides which of them are trained.
        """
        name = config.perspective
        if self.is_merged:
            raise ValueError(f"The perspective {name!r} cannot be added to a backbone that a LoRA was merged into.")
        if name in self.configs:
            raise ValueError(f"There already is a perspective {name!r} on this backbone.")
        if config.width != self.backbone.width:
            raise ValueError(
                f"The perspective {name!r} was made for a backbone of width {config.width}; this one has "
                f"{self.backbone.width}."
            )
        if config.readout == "prompt_likelihood":
            check_language_head(self.backbone)
        device = next(self.model.parameters()).device
        # The first perspective takes the backbone's own projector; each later one is loaded over a copy.
        projector = copy.deepcopy(self.backbone.projector) if self.configs else self.backbone.projector
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.perspectives[name] = Perspective(config, projector).to(device)
            lora = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]: peft accepts floats
                lora_dropout=config.lora_dropout,
                target_modules=list(LORA_TARGETS),
                init_lora_weights="gaussian",
            )
            with warnings.catch_warnings():  # several adapters are intended
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # cannot be merged
                inject_adapter_in_model(lora, self.backbone.language_model, adapter_name=name)
        self.configs[name] = config
        for parameters in self.groups(name).values():
            for parameter in parameters.values():
                parameter.data = parameter.data.float()
        self.use(name)

    def remove(self, name: str) -> None:
        """Remove a perspective that is not active."""
        assert name != self.active
        delete_adapter(self.backbone.language_model, name, prefix="lora_")
        known: Any = self.backbone.language_model.peft_config
        del known[name], self.perspectives[name], self.configs[name]

    def merge_lora(self) -> None:
        """Add the LoRA of the only perspective to the weights that it adapts, for a model that only scores.

            W <- W + (alpha / rank) * B A

        Exact up to the rounding of the backbone's precision: outputs in float32 change by about 1e-6. Does nothing if
        that was done. Raises ValueError for several perspectives, which share the weights, and for quantised weights.
        """
        if len(self.configs) > 1:
            raise ValueError(
                f"There are {len(self.configs)} perspectives; only the LoRA of a single one can be merged."
            )
        adapted = [(name, m) for name, m in self.backbone.language_model.named_modules() if isinstance(m, LoraLayer)]
        if any(type(layer.get_base_layer().weight) is not nn.Parameter for _, layer in adapted):
            raise ValueError("The LoRA cannot be merged into weights of 8 or 4 bits, which would round it away.")
        for name, layer in adapted:
            one: Any = layer
            one.merge(adapter_names=[self.active])
            parent, _, child = name.rpartition(".")
            setattr(self.backbone.language_model.get_submodule(parent), child, one.get_base_layer())
        self.is_merged = True

    def use(self, name: str) -> None:
        """Activate one perspective's LoRA and projector; KeyError, naming those there are, for an unknown name."""
        if name not in self.configs:
            raise KeyError(f"There is no perspective {name!r} here; there are {', '.join(self.configs) or 'none'}.")
        if name != self.active:
            set_adapter(self.backbone.language_model, name, inference_mode=True)
            self.backbone.projector = self._perspective(name).projector
            self.active = name

    def set_trainable(self, groups: Sequence[str] = GROUPS) -> None:
        """Make these parameter groups of the active perspective trainable, and freeze everything else."""
        self.requires_grad_(False)
        for group, parameters in self.groups(self.active).items():
            for parameter in parameters.values():
                parameter.requires_grad_(group in groups)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Activate a perspective within the context."""
        before = self.active
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def forward(self, **inputs: Tensor) -> Float[Tensor, "B d"]:
        """Return the active perspective's head outputs in float32: a score, or a vector to compare, for each row."""
        return self.score(self.backbone.forward(inputs), inputs["input_ids"], self.active)

    def score(self, output: BackboneOutput, ids: Int[Tensor, "B L"], name: str) -> Float[Tensor, "B d"]:
        """Return a perspective's outputs in float32; `output` must come from a forward of `ids` with its LoRA."""
        perspective = self._perspective(name)
        if perspective.head is None:
            return self.configs[name].temperature * prompt_log_likelihood(output, ids, self.backbone)
        pooled = last_real_token(output.hidden, output.hidden_mask)
        if perspective.skip_ca is not None:
            keys = self.configs[name].skip_ca_keys
            pooled = perspective.skip_ca(pooled, *skip_ca_inputs(keys, output, self._padding))
        return perspective.head(pooled)

    def attention_weights(self, output: BackboneOutput, name: str) -> Float[Tensor, "B H K"]:
        """Return how much a perspective's SkipCA attends to each of its keys; `output` as for `score`.

        The keys are the visual tokens, or padding where its `skip_ca_keys` say so. ValueError without SkipCA.
        """
        skip_ca = self._perspective(name).skip_ca
        if skip_ca is None:
            raise ValueError(f"The perspective {name!r} has no SkipCA, and so no attention to visual tokens.")
        pooled = last_real_token(output.hidden, output.hidden_mask)
        return skip_ca.attention_weights(
            pooled, *skip_ca_inputs(self.configs[name].skip_ca_keys, output, self._padding)
        )

    def encode_image(self, inputs: Inputs) -> Inputs:
        """Run the vision tower, which all perspectives share, once for several of them."""
        return self.backbone.encode_image(inputs)

    def groups(self, name: str) -> dict[str, dict[str, nn.Parameter]]:
        """Return a perspective's parameters by group (`GROUPS`), named as in an adapter checkpoint."""
        part = self._perspective(name)
        lora = {
            key.replace(f"{half}{name}.", half): parameter
            for key, parameter in self.backbone.language_model.named_parameters()
            for half in (".lora_A.", ".lora_B.")
            if f"{half}{name}." in key
        }
        parts = (part.projector, part.skip_ca, part.head)
        found = [lora, *({} if module is None else dict(module.named_parameters()) for module in parts)]
        return {group: parameters for group, parameters in zip(GROUPS, found, strict=True) if parameters}

    def _padding(self) -> Float[Tensor, " D"]:
        """Return the embedding of the padding token."""
        embedding = self.model.get_input_embeddings()
        return embedding(torch.tensor(self.backbone.prompt_tokenizer.padding_id, device=embedding.weight.device))

    def _perspective(self, name: str) -> Perspective:
        part = self.perspectives[name]
        assert isinstance(part, Perspective)
        return part


def visual_token_table(backbone: Backbone, sides: Sequence[int] = (512, 768, 1024)) -> str:
    """Return a line with the number of visual tokens of square images of some sizes."""
    counts = [f"{side} x {side}: {backbone.num_visual_tokens(side, side):,}" for side in sides]
    return f"visual tokens of an image: {', '.join(counts)}"


def parameter_table(model: RewardModel) -> str:
    """Return the number of trained parameters in each group of the active perspective, and of frozen ones."""
    counts = {
        group: sum(p.numel() for p in named.values() if p.requires_grad)
        for group, named in model.groups(model.active).items()
    }
    frozen = sum(num_elements(p) for p in model.parameters() if not p.requires_grad)
    total = sum(counts.values())
    rows = [*counts.items(), ("trained", total), ("frozen", frozen)]
    lines = [f"{name:12}{count:>16,}" for name, count in rows]
    return "\n".join([*lines, f"{100 * total / (total + frozen):.1f} % of {total + frozen:,} parameters are trained"])
