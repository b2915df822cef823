"""A multimodal LLM that reads the text in images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jaxtyping import Float
from torch import Tensor

from reward_model.scorers.greedy_answers import greedy_answers, load_answering
from reward_model.types import Backbone

QUESTION = "Which text is written in this image? Answer with that text alone, and with nothing if there is none."
MAX_TOKENS = 64
"""Length of an answer; what follows is not read."""


@dataclass(frozen=True, slots=True)
class TextReader:
    """The greedy answer to the question which text is in an image; no gradient."""

    backbone: Backbone
    batch_size: int = 8
    """Images in one forward pass."""

    def __call__(self, images: Float[Tensor, "B 3 Y X"]) -> Sequence[str]:
        """Return the text in each image, on one line or several; "" is none."""
        questions = [QUESTION] * len(images)
        return greedy_answers(self.backbone, images, questions, max_tokens=MAX_TOKENS, batch_size=self.batch_size)


@cache
def load_text_reader(source: str) -> TextReader:
    """Load a multimodal LLM as a reader; raises what `load_answering` does."""
    return TextReader(load_answering(source))
