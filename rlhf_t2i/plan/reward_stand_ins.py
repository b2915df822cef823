"""The smallest parts of reward training that fake tensors cannot follow, each replaced by one of the same shapes."""

# A dry run replaces some methods of transformers' trainer, which has no usable types, for its duration.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from reward_model import collator, training
from reward_model.backbones import load, phi3_v_model
from reward_model.model import RewardModel
from reward_model.training import RewardModelTrainer
from reward_model.types import Inputs
from rlhf_t2i.plan.backbones import build_backbone
from rlhf_t2i.plan.stand_ins import StepFinished, all_fake, convert
from rlhf_t2i.plan.tracker import Counts, Tracker
from rlhf_t2i.plan.types import bytes_of


@dataclass
class RewardRehearsal:
    """One step of reward training as it runs under a tracker, and what was seen of it."""

    tracker: Tracker
    config: Any
    validation_share: float
    """Batches of validation to an optimiser step, on average."""
    in_float32: bool = False
    """True to load the backbone in float32, as with fp16."""
    repeats: bool = False
    """True to run each microbatch."""
    loaded: int = 0
    """Bytes of the backbone as it is loaded."""
    trainer: Any = None
    _collate: Any = None
    _batches: dict[int, dict[str, Callable[[], Tensor]]] = field(default_factory=dict[int, Any])
    """What makes the tensors of a batch again, by its number of records."""
    _cost: Counts | None = None
    """Costs of a microbatch."""

    @property
    def model(self) -> RewardModel:
        return self.trainer.reward_model

    # --- the steps of the trainer ---

    def begin(self, optimizer: Any) -> None:
        """Take the optimiser's step before the first one, so that its state exists, as in all later steps."""
        for size in (self.config.microbatch_size, 2 * self.config.microbatch_size):
            self.collate([{"record": i % self.config.microbatch_size} for i in range(size)])
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        self.tracker.counts.clear()
        self.tracker.phase = "optimizer"

    def training_step(self, run: Callable[..., Tensor], trainer: Any, *args: Any) -> Tensor:
        """Run the first microbatch of a step for all; of several, gradients exist from the start, as in the others."""
        self.trainer = trainer
        with self.tracker.during("update"):
            if self.repeats or self.tracker.fake is None:
                return run(trainer, *args)
            if self._cost is not None:
                self.tracker.count_again(self._cost)
                return torch.zeros(())
            if self.config.accumulation_steps > 1:
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = self.tracker.empty(parameter.shape, dtype=parameter.dtype)
            loss, self._cost = self.tracker.measured(lambda: run(trainer, *args))
            return loss

    def end(self) -> None:
        """Run a batch of the validation, and end the dry run."""
        trainer = self.trainer
        trainer.model.eval()
        batch = next(iter(trainer.get_eval_dataloader()))
        with self.tracker.during("validation", weight=self.validation_share):
            trainer.prediction_step(trainer.model, batch, True)
        raise StepFinished

    # --- its parts ---

    def collator(self, *args: Any) -> Callable[[Sequence[dict[str, int]]], Inputs]:
        """Return what collates records: once for each size of a batch."""
        self._collate = self._real_collator(*args)
        return self.collate

    def collate(self, examples: Sequence[dict[str, int]]) -> Inputs:
        """Return the first batch of this size again."""
        if len(examples) not in self._batches:
            batch = self._collate(examples)
            self._batches[len(examples)] = {name: self._maker(tensor) for name, tensor in batch.items()}
        return {name: make() for name, make in self._batches[len(examples)].items()}

    def image(self, source: Any) -> Tensor:
        """Return an image without data."""
        del source
        return self.tracker.empty((3, *[self.config.dry_run_image_side] * 2), dtype=torch.float32)

    def load(self, source: str, *, dtype: torch.dtype) -> Any:
        """Return a backbone without weights."""
        model = build_backbone(source, dtype=torch.float32 if self.in_float32 else dtype, empty=self.tracker.empty)
        self.loaded = bytes_of(model)
        return model

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Context in which parts of the trainer and the loading of weights are those of this rehearsal."""
        rehearsal, step, add = self, RewardModelTrainer.training_step, RewardModel.add
        self._real_collator = training.Collator

        class Steps(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
                rehearsal.begin(parts["optimizer"].optimizer)

            def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
                rehearsal.end()

        def add_fake(model: RewardModel, *args: Any, **kwargs: Any) -> None:
            with all_fake(self.tracker):
                add(model, *args, **kwargs)

        replaced: list[tuple[Any, str, Any]] = [
            (training, "Progress", lambda *args, **kwargs: Steps()),
            (training, "Collator", self.collator),
            (collator, "to_tensor", self.image),
            (RewardModelTrainer, "training_step", lambda trainer, *args: self.training_step(step, trainer, *args)),
            (load, "AutoModelForImageTextToText", SimpleNamespace(from_pretrained=self.load)),
            (phi3_v_model, "load_phi3_v", self.load),
            (RewardModel, "add", add_fake),
            *([(nn.Module, "_apply", convert)] if self.tracker.fake else []),
        ]
        with ExitStack() as stack:
            for owner, name, stand_in in replaced:
                stack.enter_context(patch.object(owner, name, stand_in))
            yield

    def _maker(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Return what makes a tensor again; pixels have no data."""
        if not tensor.is_floating_point() or tensor.dim() < 2:
            return tensor.clone
        shape, dtype = tuple(tensor.shape), tensor.dtype
        return lambda: self.tracker.empty(shape, dtype=dtype)
