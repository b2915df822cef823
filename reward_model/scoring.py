"""Inference: scores of images, and the probability that one is preferred to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.checkpoint import load_adapter, load_reward_model
from reward_model.config import RewardModelConfig
from reward_model.heads import preference_logits
from reward_model.images import ImageInput, to_tensor
from reward_model.losses import win_probability
from reward_model.model import RewardModel
from reward_model.quantization import Quantization
from reward_model.types import Inputs, LabelledImage, PreferencePair, Record


class LlavaReward:
    """A trained reward model with one or several perspectives on one backbone.

        reward_model = LlavaReward.from_pretrained("runs/reward_model")
        reward_model.score(["fox.png"], ["a red fox"])            # float32 (1,): higher is better
        reward_model.compare(a, b, prompts)                       # probability that a is preferred

    Images are PIL images, arrays (Y, X, 3), paths, or float tensors (3, Y, X) in [0, 1]; a batch (B, 3, Y, X) too.
    Scores are differentiable with respect to a tensor's pixels. A score does not depend on the other images of its
    batch, unless the `skip_ca_keys` of an imported model include padding, as published.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model.eval()

    @staticmethod
    def from_pretrained(
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
        device: str | torch.device | None = None,
    ) -> LlavaReward:
        """Load a reward model from a folder or a Hub id.

        `dtype` is the backbone's precision, by default that of training; scores are always float32. `quantization`
        holds the language model's linear layers in 8 or 4 bits (int8, nf4; extra `quant`). `device` is by
        default the accelerator if there is one (a GPU), else the CPU. Raises FileNotFoundError or ValueError, naming
        the file and what is wrong with it.
        """
        reward_model = LlavaReward(load_reward_model(_folder(source), dtype=dtype, quantization=quantization))
        reward_model.model.requires_grad_(False)
        return reward_model.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")

    def to(self, device: str | torch.device) -> LlavaReward:
        """Move the model to a device, where scores are computed from now on; return it."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def __repr__(self) -> str:
        names = ", ".join(f"{config.perspective} ({config.head})" for config in self.model.configs.values())
        return f"LlavaReward({names}; {self.model.configs[self.perspectives[0]].model_type}, {self.device})"

    def add(self, source: str | Path, *, name: str | None = None) -> str:
        """Load another perspective onto the same backbone; return its name, by default its own."""
        name = load_adapter(self.model, _folder(source), name=name)
        self.model.eval().requires_grad_(False)
        return name

    def merge_lora(self) -> LlavaReward:
        """Add the LoRA of the only perspective to the backbone's weights, for faster scores; return the model.

        Exact up to the rounding of the backbone's precision, about 1e-6 in float32. Raises ValueError for several
        perspectives.
        """
        self.model.merge_lora()
        return self

    @property
    def perspectives(self) -> list[str]:
        """Names of the perspectives, in the order in which they were loaded."""
        return list(self.model.configs)

    @property
    def gives_scores(self) -> bool:
        """True if the first perspective has a scalar head; a general-preference head only compares."""
        return self.config().head == "scalar"

    def config(self, perspective: str | None = None) -> RewardModelConfig:
        """Return the config of a perspective, by default of the first; KeyError for an unknown name."""
        return self.model.configs[self._name(perspective)]

    def score(
        self,
        images: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        prompts: Sequence[str],
        *,
        perspective: str | None = None,
        batch_size: int = 32,
    ) -> Float[Tensor, " B"]:
        """Return the score of each image for its prompt, by one perspective (by default the first).

        Only differences have a meaning: (score(a) - score(b)) / temperature are the log-odds that a is preferred.
        Raises ValueError for a general-preference head, which has no scores.
        """
        name = self._name(perspective)
        return self._scores(images, prompts, [name], batch_size)[name]

    def score_all(
        self,
        images: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        prompts: Sequence[str],
        *,
        perspectives: Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> dict[str, Float[Tensor, " B"]]:
        """Return the scores of several perspectives by name, by default of all.

        The vision tower runs once for all of them. The language model runs once for each: a LoRA changes every state
        after the first layer.
        """
        names = self.perspectives if perspectives is None else [self._name(name) for name in perspectives]
        return self._scores(images, prompts, names, batch_size)

    def compare(
        self,
        first: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        second: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        prompts: Sequence[str],
        *,
        second_prompts: Sequence[str] | None = None,
        perspective: str | None = None,
        batch_size: int = 32,
    ) -> Float[Tensor, " B"]:
        """Return the probability that each first image is preferred to its second; a tie counts for half.

        `second_prompts` are the prompts of the second images, by default those of the first.
        """
        config = self.config(perspective)
        logits = self.logits(
            first, second, prompts, second_prompts=second_prompts, perspective=perspective, batch_size=batch_size
        )
        return win_probability(logits, tie_width=config.tie_width)

    def logits(
        self,
        first: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        second: Sequence[ImageInput] | Float[Tensor, "B 3 _ _"],
        prompts: Sequence[str],
        *,
        second_prompts: Sequence[str] | None = None,
        perspective: str | None = None,
        batch_size: int = 32,
    ) -> Float[Tensor, " B"]:
        """Return the log-odds that each first image is preferred to its second, ties left out."""
        name = self._name(perspective)
        if len(first) != len(second):
            raise ValueError(f"{len(first)} first and {len(second)} second images were given; the numbers must agree.")
        one = self._outputs(first, prompts, [name], batch_size)[name]
        two = self._outputs(second, prompts if second_prompts is None else second_prompts, [name], batch_size)[name]
        config = self.model.configs[name]
        return preference_logits(one, two, kind=config.head, temperature=config.temperature)

    def preferences(
        self,
        images: Sequence[ImageInput] | Float[Tensor, "K 3 _ _"],
        prompts: Sequence[str],
        *,
        perspective: str | None = None,
        batch_size: int = 32,
    ) -> Float[Tensor, "K K"]:
        """Return the log-odds that image i is preferred to image j, for all pairs; each image is encoded once."""
        name = self._name(perspective)
        outputs, config = self._outputs(images, prompts, [name], batch_size)[name], self.model.configs[name]
        first, second = (side.flatten() for side in torch.meshgrid(*[torch.arange(len(outputs))] * 2, indexing="ij"))
        logits = preference_logits(outputs[first], outputs[second], kind=config.head, temperature=config.temperature)
        return logits.view(len(outputs), -1)

    def score_statistics(self, records: Sequence[Record], *, batch_size: int = 32) -> dict[str, float]:
        """Return `score_mean` and `score_std` over the images of some records; nothing for a head without scores."""
        if self.config().head != "scalar":
            return {}
        pairs = [record for record in records if isinstance(record, PreferencePair)]
        labelled = [record for record in records if isinstance(record, LabelledImage)]
        rows = [(pair.winner, pair.winner_prompt) for pair in pairs]
        rows += [(pair.loser, pair.loser_prompt) for pair in pairs]
        rows += [(one.image, one.prompt) for one in labelled]
        scores = self.score([image for image, _ in rows], [prompt for _, prompt in rows], batch_size=batch_size)
        return {"score_mean": scores.mean().item(), "score_std": scores.std(correction=0).item()}

    def _name(self, perspective: str | None) -> str:
        name = self.perspectives[0] if perspective is None else perspective
        if name not in self.model.configs:
            raise KeyError(f"There is no perspective {name!r} here; there are {', '.join(self.perspectives)}.")
        return name

    def _scores(
        self, images: Sequence[ImageInput] | Tensor, prompts: Sequence[str], names: Sequence[str], batch_size: int
    ) -> dict[str, Float[Tensor, " B"]]:
        for name in names:
            if self.model.configs[name].head != "scalar":
                raise ValueError(
                    f"The perspective {name!r} has a general-preference head, which compares two images but has no "
                    f"scores. Use compare(first, second, prompts), or a reward model with a scalar head."
                )
        return {name: outputs[:, 0] for name, outputs in self._outputs(images, prompts, names, batch_size).items()}

    def _outputs(
        self, images: Sequence[ImageInput] | Tensor, prompts: Sequence[str], names: Sequence[str], batch_size: int
    ) -> dict[str, Float[Tensor, "B d"]]:
        """Return the head outputs of some perspectives; without a graph unless an image requires its gradient."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts is one text ({prompts[:40]!r}); give a list with one prompt for each image.")
        if isinstance(images, str):
            raise TypeError(f"images is one text ({images[:40]!r}); give a list of images.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts; the numbers must agree.")
        if not len(prompts):
            raise ValueError("There is no image to score.")
        batches: dict[str, list[Tensor]] = {name: [] for name in names}
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            some = images[rows]
            needs_gradient = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in some)
            with torch.set_grad_enabled(needs_gradient):
                inputs = self.model.encode_image(self._prepared(some, prompts[rows]))
                for name in names:
                    with self.model.using(name):
                        batches[name].append(self.model(**inputs))
        return {name: torch.cat(outputs) for name, outputs in batches.items()}

    def _prepared(self, images: Sequence[ImageInput] | Tensor, prompts: Sequence[str]) -> Inputs:
        inputs = self.model.backbone.prepare((to_tensor(image).to(self.device) for image in images), prompts)
        return {key: tensor.to(self.device) for key, tensor in inputs.items()}


def _folder(source: str | Path) -> Path:
    """Return the folder of a reward model, downloaded if `source` is a Hub id; FileNotFoundError if there is none."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if len(folder.parts) != 2 or folder.is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"There is no reward model in {str(source)!r}: no such folder, and it is no Hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source)))
    except (OSError, ValueError) as error:  # a wrong id, no network, or no permission
        raise FileNotFoundError(
            f"There is no folder {str(source)!r}, and fetching it from the Hub failed: {error}"
        ) from error
