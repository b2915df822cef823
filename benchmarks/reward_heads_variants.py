"""The heads that `benchmarks/reward_heads.py` compares: from a backbone's output to what a preference is read from."""

# transformers has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reward_model.heads import Head, HeadKind, preference_logits
from reward_model.model import last_real_token
from reward_model.prompt_likelihood import prompt_log_likelihood
from reward_model.skip_ca import SkipCrossAttention
from reward_model.types import Backbone, BackboneOutput

TEMPERATURE = 0.1
"""As in LLaVA-Reward: differences of scores divided by it are log-odds."""


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What a head may use of one batch of images with their prompts."""

    output: BackboneOutput
    vision: Float[Tensor, "B P C"]
    """States of the patches after the vision tower's last layer."""
    middle: Float[Tensor, "B P C"]
    """The same after its middle layer."""
    tokens: Int[Tensor, "B L"]
    """Token ids: image, prompt and padding behind it."""

    @property
    def last(self) -> Float[Tensor, "B D"]:
        """The state of the last token, after the last layer and its norm."""
        return last_real_token(self.output.hidden, self.output.hidden_mask)


class Variant(nn.Module, ABC):
    """A head: `forward` gives outputs for each row, `logits` the log-odds of the first of two rows."""

    kind: HeadKind = "scalar"
    prompt_end = ""
    """Text behind each prompt."""
    ignores_prompt = False
    ignores_image = False
    """True: the language model sees no image; the head itself reads `vision`."""
    reads_both = False
    """True: a row shows two images, the one to score first; outputs have no meaning without the other."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.width = backbone.width

    @abstractmethod
    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        """Return the outputs of each row."""

    def logits(self, first: Float[Tensor, "P d"], second: Float[Tensor, "P d"]) -> Float[Tensor, " P"]:
        return preference_logits(first, second, kind=self.kind, temperature=TEMPERATURE)


class LastToken(Variant):
    """A linear layer on the last token, without SkipCA."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.head = Head(self.width, self.kind)

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        return self.head(inputs.last)


class ImageOnly(LastToken):
    """The same with an empty prompt: a floor, what images of losers look like."""

    ignores_prompt = True


class GeneralPreference(LastToken):
    """A linear layer with two outputs on the last token; compares, and gives no score (arXiv:2410.02197)."""

    kind = "general_preference"


class SkipCa(LastToken):
    """SkipCA as published, or with more heads; with `middle` its keys are the vision tower's middle layer."""

    def __init__(self, backbone: Backbone, *, num_heads: int = 1, middle: bool = False) -> None:
        super().__init__(backbone)
        self.skip_ca = SkipCrossAttention(self.width, num_heads=num_heads)
        vision_width = backbone.model.config.vision_config.hidden_size
        self.project = nn.Linear(vision_width, self.width) if middle else None

    def _visual(self, inputs: HeadInputs) -> Float[Tensor, "B V D"]:
        return inputs.output.visual if self.project is None else self.project(inputs.middle)

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        return self.head(self.skip_ca(inputs.last, self._visual(inputs), inputs.output.visual_mask))

    def attention(self, inputs: HeadInputs) -> Float[Tensor, "B V"]:
        """Return the attention to each visual token, the mean of the heads."""
        return self.skip_ca.attention_weights(inputs.last, self._visual(inputs), inputs.output.visual_mask).mean(dim=1)


class MeanPooled(LastToken):
    """SkipCA with uniform attention: norm(h + W_v mean(z))."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.value = nn.Linear(self.width, self.width, bias=False)
        nn.init.normal_(self.value.weight, std=1 / (self.width + 1))
        self.norm = nn.RMSNorm(self.width, eps=1e-5)

    def weights(self, inputs: HeadInputs) -> Float[Tensor, "B V"]:
        mask = inputs.output.visual_mask.float()
        return mask / mask.sum(1, keepdim=True)

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        pooled = torch.einsum("bv,bvd->bd", self.weights(inputs), inputs.output.visual.float())
        return self.head(self.norm(inputs.last.float() + self.value(pooled)))


class AttentionPooled(MeanPooled):
    """The same with attention by a learned query that knows no prompt."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.query = nn.Parameter(torch.zeros(self.width))

    def weights(self, inputs: HeadInputs) -> Float[Tensor, "B V"]:
        logits = inputs.output.visual.float() @ self.query / math.sqrt(self.width)
        return logits.masked_fill(~inputs.output.visual_mask, -torch.inf).softmax(dim=1)


class RewardToken(Variant):
    """A token of its own at the end, with a trained embedding, and an MLP on its state (HPSv3, arXiv:2508.03789)."""

    prompt_end = " ~"
    num_outputs = 1

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        embedding = backbone.model.get_input_embeddings()
        self.token = int(backbone.prompt_tokenizer.tokenizer.convert_tokens_to_ids("~</w>"))
        self.embedding = nn.Parameter(embedding.weight[self.token].detach().clone())
        embedding.register_forward_hook(self._replaced)
        self.head = nn.Sequential(nn.Linear(self.width, self.width), nn.SiLU(), Head(self.width, "scalar"))
        if self.num_outputs > 1:
            self.head[2] = nn.Linear(self.width, self.num_outputs)

    def _replaced(self, _: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.where((arguments[0] == self.token)[..., None], self.embedding, output)

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        return self.head(inputs.last)


class MeanAndSpread(RewardToken):
    """Mean and log standard deviation of a score, by the reward token's MLP (HPSv3).

    HPSv3's likelihood is the expectation of sigmoid(a - b) over both normal distributions; here by MacKay's
    approximation, sigmoid((mean_a - mean_b) / sqrt(1 + pi / 8 (var_a + var_b))).
    """

    num_outputs = 2

    def logits(self, first: Float[Tensor, "P d"], second: Float[Tensor, "P d"]) -> Float[Tensor, " P"]:
        variance = (2 * first[:, 1]).exp() + (2 * second[:, 1]).exp()
        return (first[:, 0] - second[:, 0]) / TEMPERATURE / (1 + math.pi / 8 * variance / TEMPERATURE**2).sqrt()


class TokenLogits(Variant):
    """The language model's own logits of some answers at the last token; only LoRA and projector are trained."""

    answers: tuple[str, ...] = ()
    values: tuple[float, ...] = ()

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        ids = backbone.prompt_tokenizer.tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in self.answers])
        self.register_buffer("rows", backbone.model.lm_head.weight[ids].detach().clone())
        self.register_buffer("weights", torch.tensor(self.values))

    def answer_logits(self, inputs: HeadInputs) -> Float[Tensor, "B A"]:
        rows: Any = self.rows
        return inputs.last @ rows.T


class YesProbability(TokenLogits):
    """Log-odds of yes against no at the last token (VQAScore, arXiv:2404.01291)."""

    answers = ("y", "n")

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        yes, no = self.answer_logits(inputs).unbind(1)
        return TEMPERATURE * (yes - no)[:, None]


class DigitExpectation(TokenLogits):
    """Expectation of the digits 0 to 5 at the last token, in units of a temperature of log-odds."""

    answers = ("0", "1", "2", "3", "4", "5")
    values = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        weights: Any = self.weights
        return (self.answer_logits(inputs).softmax(dim=1) @ weights)[:, None]


class PromptLikelihood(Variant):
    """The log-likelihood of the prompt given the image (readout prompt_likelihood); only LoRA and projector learn."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.backbone = [backbone]  # in a list: its parameters are not the head's

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        return TEMPERATURE * prompt_log_likelihood(inputs.output, inputs.tokens, self.backbone[0])


class TwoTowers(Variant):
    """The last token of the prompt, read without an image, times the mean of the visual tokens: as CLIP compares them.

    A floor: no layer sees the image and the prompt together.
    """

    ignores_image = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.backbone = [backbone]  # in a list: its parameters are not the head's
        self.text, self.image = (nn.Linear(self.width, self.width, bias=False) for _ in range(2))

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "B d"]:
        visual = self.backbone[0].projector(inputs.vision).mean(dim=1)
        return F.cosine_similarity(self.text(inputs.last), self.image(visual), dim=-1)[:, None]


class BothImages(LastToken):
    """A linear layer on the last token behind both images and the prompt; gives no score of one image.

    Each pair is read in both orders, so that the log-odds change sign with the order.
    """

    reads_both = True


VARIANTS: dict[str, Callable[[Backbone], Variant]] = {
    "last token": LastToken,
    "SkipCA": SkipCa,
    "prompt likelihood": PromptLikelihood,
    "mean pooling": MeanPooled,
    "attention pooling": AttentionPooled,
    "SkipCA, 8 heads": lambda backbone: SkipCa(backbone, num_heads=8),
    "SkipCA, middle layer": lambda backbone: SkipCa(backbone, middle=True),
    "reward token": RewardToken,
    "mean and spread": MeanAndSpread,
    "yes probability": YesProbability,
    "digit expectation": DigitExpectation,
    "general preference": GeneralPreference,
    "both images": BothImages,
    "two towers": TwoTowers,
    "image only": ImageOnly,
}
"""All heads, the most telling first."""
WITHOUT_SCORES = ("general preference", "both images")
"""Heads that compare two images and have no score of one."""
