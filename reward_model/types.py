"""The vocabulary of the judge: what people said of images, and what a backbone reads in one.

A record of a data set is a `PreferencePair` or a `LabelledImage`. A backbone turns images and prompts into `Inputs`
and these into a `Reading`; nothing behind the reading knows which family of models it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

Inputs = dict[str, Tensor]
"""What a backbone reads, row by row: input_ids (B, L), attention_mask (B, L), and what its family needs besides."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two images, and which of them serves its prompt better."""

    winner: Path
    loser: Path
    winner_prompt: str
    loser_prompt: str
    """The same as the winner's, but in a hard negative, where one image may stand against itself under two."""
    tie: bool = False
    """Whether both are equally good; winner and loser are then just the first and the second."""
    rating_gap: float = 0.0
    """How far the ratings lay apart, >= 0, in the units of the ratings; 0 where there were none."""
    where: str = ""
    """FILE:LINE (or FILE:RECORD) that this came from, for messages."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image that was called good (1) or bad (0) on its own: safe or unsafe, sound or flawed."""

    image: Path
    prompt: str
    label: int
    where: str = ""


Record = PreferencePair | LabelledImage


@dataclass(frozen=True, slots=True)
class BackboneOutput:
    """What a backbone made of a batch of images and prompts, at the width D of its language model."""

    hidden: Float[Tensor, "B L D"]
    """States of every token after the last layer and its norm."""
    hidden_mask: Bool[Tensor, "B L"]
    """False where a row is padded."""
    visual: Float[Tensor, "B V D"]
    """Visual tokens as they leave the projector, before the language model saw them."""
    visual_mask: Bool[Tensor, "B V"]
    """False behind the last visual token of a row that has fewer than others."""


@runtime_checkable
class Backbone(Protocol):
    """A family of multimodal LLMs, seen as a reader of one image and one prompt a row."""

    model: Any
    """The whole model, as transformers has it."""
    prompt_tokenizer: Any
    """Prompts to token ids: a `backbones.prompts.PromptTokenizer`."""

    @property
    def width(self) -> int:
        """D: the width of the language model."""
        ...

    @property
    def projector(self) -> nn.Module:
        """From vision features to visual tokens; may be replaced by another of its kind."""
        ...

    @projector.setter
    def projector(self, module: nn.Module) -> None: ...

    @property
    def language_model(self) -> nn.Module:
        """The decoder, which carries the LoRA."""
        ...

    def num_visual_tokens(self, height: int, width: int) -> int:
        """What an image of this size becomes: the greater part of what reading it costs."""
        ...

    def prepare(self, images: Sequence[Float[Tensor, "3 _ _"]], prompts: Sequence[str]) -> Inputs:
        """RGB images in [0, 1] of any size, and as many prompts, as the model's own inputs."""
        ...

    def encode_image(self, inputs: Inputs) -> Inputs:
        """The same inputs with the vision tower's features in place of the pixels: what several bundles share."""
        ...

    def forward(self, inputs: Inputs) -> BackboneOutput:
        """Run projector and language model, and the vision tower if `encode_image` has not."""
        ...
