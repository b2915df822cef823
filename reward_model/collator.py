"""Batches of preference records for reward training; their images are decoded when a batch is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reward_model.datasets.refill import Refill, UnusableError, unusable
from reward_model.datasets.usable import flaw_of_equal_sides, flaw_of_input
from reward_model.images import to_tensor
from reward_model.model import RewardModel
from reward_model.stored_images import ImageSource
from reward_model.types import Inputs, LabelledImage, PreferencePair, Record


@dataclass(frozen=True, slots=True)
class Collator:
    """Collate record indices to a batch: the backbone's inputs, and `tie`, `gap` and `label` for the objective.

    Images are decoded here, in the processes of the data loader. A record that cannot be used is replaced or refused,
    as `refill` does.
    """

    model: RewardModel
    records: Sequence[Record]
    refill: Refill

    def __call__(self, examples: Sequence[dict[str, int]]) -> Inputs:
        indices = [example["record"] for example in examples]
        return self.refill.collate(indices, self._batch, where=lambda index: self.records[index].where)

    def _batch(self, indices: Sequence[int]) -> Inputs:
        records = [self.records[index] for index in indices]
        pairs = [(i, record) for i, record in enumerate(records) if isinstance(record, PreferencePair)]
        labelled = [(i, record) for i, record in enumerate(records) if isinstance(record, LabelledImage)]
        rows = [(i, pair.winner, pair.winner_prompt) for i, pair in pairs]
        rows += [(i, pair.loser, pair.loser_prompt) for i, pair in pairs]
        rows += [(i, one.image, one.prompt) for i, one in labelled]
        for i, pair in pairs:
            if flaw := self._flaw_of_sides(pair):
                raise UnusableError(i, flaw)
        images = (self._image(*row) for row in rows)
        try:
            inputs = self.model.backbone.prepare(images, [prompt for *_, prompt in rows])
        except UnusableError:
            raise
        except ValueError as error:
            raise ValueError(f"One of {', '.join(record.where for record in records)}: {error}") from error
        return {
            **inputs,
            "tie": torch.tensor([pair.tie for _, pair in pairs], dtype=torch.bool),
            "gap": torch.tensor([pair.rating_gap for _, pair in pairs], dtype=torch.float32),
            "label": torch.tensor([one.label for _, one in labelled], dtype=torch.float32),
        }

    def _flaw_of_sides(self, pair: PreferencePair) -> str | None:
        try:
            return flaw_of_equal_sides(pair)
        except ConnectionError:
            raise
        except (OSError, ValueError) as error:
            return str(error)

    def _image(self, position: int, source: ImageSource, prompt: str) -> Tensor:
        with unusable(position):
            image = to_tensor(source)
        if flaw := flaw_of_input(self.model.backbone, (image.shape[1], image.shape[2]), prompt):
            raise UnusableError(position, flaw)
        return image
