"""Types of the reward model: records of a data set, the output of a backbone, and the protocol of a backbone.

A data set yields `PreferencePair` and `LabelledImage` records. A backbone turns images and prompts into `Inputs` and
these into a `BackboneOutput`; code behind that does not depend on the family of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from reward_model.stored_images import ImageSource

Inputs = dict[str, Tensor]
"""A batch for a backbone: input_ids (B, L), attention_mask (B, L), and the tensors of its family."""


Tags = Mapping[str, tuple[str, ...]]
"""Groups that an evaluation counts a record in, by criterion: {"tier": ("binding",), "generator": ("sdxl", "flux")}."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two images of which the first fits its prompt better, or a tie of both."""

    winner: ImageSource
    loser: ImageSource
    winner_prompt: str
    loser_prompt: str
    """Equal to the winner's, except in a hard negative: there one image may be paired with itself under two prompts."""
    tie: bool = False
    """True if both are equally good; winner and loser are then only the first and the second."""
    rating_gap: float = 0.0
    """Rating of the winner minus that of the loser, >= 0, in units of the ratings; 0 without ratings."""
    where: str = ""
    """FILE:LINE or FILE:RECORD of the source, for messages."""
    reference: Path | None = None
    """The image that the prompt says how to edit; winner and loser are two results."""
    tags: Tags = field(default_factory=dict[str, tuple[str, ...]], hash=False)


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image with a binary label: 1 good (safe, sound) or 0 bad (unsafe, flawed)."""

    image: ImageSource
    prompt: str
    label: int
    where: str = ""
    tags: Tags = field(default_factory=dict[str, tuple[str, ...]], hash=False)


Record = PreferencePair | LabelledImage


@dataclass(frozen=True, slots=True)
class BackboneOutput:
    """Hidden states and visual tokens of a batch, at the width D of the language model."""

    hidden: Float[Tensor, "B L D"]
    """States of every token after the last layer and its norm."""
    hidden_mask: Bool[Tensor, "B L"]
    """False at padding."""
    visual: Float[Tensor, "B V D"]
    """Visual tokens as they leave the projector, before the language model."""
    visual_mask: Bool[Tensor, "B V"]
    """False behind the last visual token of a row that has fewer than V."""


@runtime_checkable
class Backbone(Protocol):
    """A multimodal LLM that takes one image and one prompt per row."""

    model: Any
    """The transformers model."""
    prompt_tokenizer: Any
    """Prompts to token ids: a `backbones.prompts.PromptTokenizer`."""

    @property
    def width(self) -> int:
        """D: hidden size of the language model."""
        ...

    @property
    def projector(self) -> nn.Module:
        """Vision features to visual tokens; each perspective has its own."""
        ...

    @projector.setter
    def projector(self, module: nn.Module) -> None: ...

    @property
    def language_model(self) -> nn.Module:
        """The decoder, which carries the LoRA."""
        ...

    def num_visual_tokens(self, height: int, width: int) -> int:
        """Return the number of visual tokens of an image of this size in pixels."""
        ...

    def prepare(self, images: Iterable[Float[Tensor, "3 _ _"]], prompts: Sequence[str]) -> Inputs:
        """Return the model's inputs for RGB images in [0, 1] of any size and as many prompts.

        Takes the images one by one, once, so that those of an iterator that opens files are not in memory together.
        """
        ...

    def encode_image(self, inputs: Inputs) -> Inputs:
        """Replace the pixels of `inputs` by the vision tower's features, which all perspectives share."""
        ...

    def forward(self, inputs: Inputs) -> BackboneOutput:
        """Run projector and language model; and the vision tower first, if `encode_image` has not."""
        ...
