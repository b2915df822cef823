"""The prompts to train on and those to evaluate on, with what both have in common."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.models.reference_images import check_edits
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import EVALUATION_PROMPTS
from rlhf_t2i.prompt_rows import metadata_of
from rlhf_t2i.rewards.rows import check_prompts
from rlhf_t2i.settings.groups import TrainerConfig

_SHARE = 10
"""One of so many prompts is held back."""
_MOST = 64
"""Largest number of prompts that are held back."""


@dataclass(frozen=True, slots=True)
class PromptSets:
    """Prompts to train on and to evaluate on."""

    training: list[str]
    """Empty if training uses preference pairs of the user's own."""
    evaluation: list[str]
    chosen_here: bool
    """True if the evaluation prompts were chosen from the training prompts."""

    @property
    def held_back(self) -> bool:
        """True if the evaluation prompts were taken out of the training prompts."""
        return self.chosen_here and not self.num_shared

    @property
    def num_shared(self) -> int:
        """Distinct evaluation prompts that are also trained on."""
        return len(set(self.evaluation) & set(self.training))

    @property
    def title(self) -> str:
        """The evaluation prompts in two words: held-out only if none of them is trained on."""
        return "evaluation prompts" if self.num_shared or not self.training else "held-out prompts"

    def text(self) -> str:
        """Return one line about the prompts, with the overlap of both sets."""
        distinct = len(set(self.evaluation))
        if self.held_back:
            return f"{len(set(self.training))} prompts to train on, {distinct} held back for evaluation"
        trained = f", of which {self.num_shared} are also trained on" if self.num_shared else ""
        return f"{distinct} evaluation prompts{trained}"

    def save(self, folder: Path) -> None:
        """Write the evaluation prompts into a run folder, if no file names them."""
        if self.chosen_here:
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in metadata_of(self.evaluation))
            write_atomically(folder / EVALUATION_PROMPTS, rows)


def load_prompt_sets(config: TrainerConfig) -> PromptSets:
    """Load both sets of prompts. Without evaluation_prompts, a tenth of the distinct prompts is held back, at most 64.

    The choice depends on the prompts alone, so that runs with other seeds are evaluated on the same ones. A single
    prompt is trained and evaluated on. Raises what `load_prompts` and `check_edits` raise, and ValueError, with its
    place, for a row without what a reward that scores it needs.
    """
    config.check_complete()
    sets = _prompt_sets(config)
    for prompts in (sets.training, sets.evaluation):
        check_edits(prompts, model=config.model)
    if "rewards" not in config.unused():
        check_prompts(config.scored_rewards, sets.training)
    check_prompts(config.evaluation_rewards, sets.evaluation)
    return sets


def _prompt_sets(config: TrainerConfig) -> PromptSets:
    training = load_prompts(config.prompts) if config.prompts else []
    if config.evaluation_prompts is not None:
        return PromptSets(training, load_prompts(config.evaluation_prompts, held_out=True), chosen_here=False)
    distinct = list(dict.fromkeys(training))
    if len(distinct) == 1:
        return PromptSets(training, distinct, chosen_here=True)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = {distinct[i] for i in order[: min(_MOST, max(1, len(distinct) // _SHARE))]}
    return PromptSets(
        [prompt for prompt in training if prompt not in chosen],
        [prompt for prompt in distinct if prompt in chosen],
        chosen_here=True,
    )
