"""Train a judge on trl's RewardTrainer, which brings accelerate, DeepSpeed, mixed precision, trackers and resuming.

What is ours: the rows of a batch, the loss on pairs, ties and labels, one optimiser group for each part that learns,
and checkpoints that hold the bundle instead of the frozen backbone.
"""

# transformers, trl and datasets have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIncompatibleMethodOverride=false, reportOptionalMemberAccess=false
# pyright: reportReturnType=false, reportOptionalSubscript=false
from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from trl import RewardConfig, RewardTrainer

from reward_model.checkpoint import WEIGHTS_NAME, adapter_tensors, load_adapter_weights, load_reward_model, save_adapter
from reward_model.heads import HeadKind, preference_logits
from reward_model.images import to_tensor
from reward_model.losses import label_losses, preference_losses
from reward_model.model import GROUPS, RewardModel
from reward_model.types import Inputs, LabelledImage, PreferencePair, Record

LossName = Literal["bradley_terry", "general_preference", "cross_entropy"]
_SEAL = "complete.json"


# --- what is minimised ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How verdicts are turned into a loss: bradley_terry and general_preference compare, cross_entropy labels.

    cross_entropy takes a pair for two labels, the winner good and the loser bad: -log s(winner) - log(1 - s(loser)).
    """

    loss: LossName = "bradley_terry"
    temperature: float = 0.1
    tie_width: float = 0.0
    margin_per_rating: float = 0.0
    """Log-odds by which a winner is asked to be ahead, for each unit that its rating is higher."""

    @property
    def head(self) -> HeadKind:
        """The head that this loss trains."""
        return "general_preference" if self.loss == "general_preference" else "scalar"

    def __call__(
        self, verdicts: Float[Tensor, "R d"], tie: Tensor, gap: Tensor, label: Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """The mean loss over the records of a batch, and of each record whether the judge was right (nan for ties).

        Rows are the winners of all pairs, then their losers, then the labelled images.
        """
        winners, losers, labelled = verdicts.split([len(tie), len(tie), len(label)])
        logits = preference_logits(winners, losers, kind=self.head, temperature=self.temperature)
        if self.loss == "cross_entropy":
            of_pairs = label_losses(winners[:, 0], torch.ones_like(gap))
            of_pairs = (of_pairs + label_losses(losers[:, 0], torch.zeros_like(gap))) / 2
        else:
            of_pairs = preference_losses(logits, tie, margin=self.margin_per_rating * gap, tie_width=self.tie_width)
        of_labels = label_losses(labelled[:, 0], label)
        right = torch.where(tie, torch.nan, (logits > 0).float())
        loss = torch.cat([of_pairs, of_labels]).mean()
        return loss, torch.cat([right, ((labelled[:, 0] > 0) == (label > 0.5)).float()]).detach()

    def check(self, records: Sequence[Record]) -> None:
        """Refuse records that this loss cannot learn from, naming the first."""
        for record in records:
            if isinstance(record, LabelledImage) and self.head != "scalar":
                raise ValueError(
                    f"{record.where} is a label, and general_preference only learns from pairs; use bradley_terry or "
                    f"cross_entropy."
                )
            if isinstance(record, PreferencePair) and record.tie and self.loss == "cross_entropy":
                raise ValueError(
                    f"{record.where} is a tie, which has neither a good image nor a bad one; use bradley_terry."
                )
            if isinstance(record, PreferencePair) and record.tie and self.tie_width <= 0:
                raise ValueError(f"{record.where} is a tie, which needs tie_width > 0; it is {self.tie_width}.")


# --- batches --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Collator:
    """From the numbers of records to what a step needs: the backbone's inputs, and what people said."""

    model: RewardModel
    records: Sequence[Record]

    def __call__(self, examples: Sequence[dict[str, int]]) -> Inputs:
        records = [self.records[example["record"]] for example in examples]
        pairs = [record for record in records if isinstance(record, PreferencePair)]
        labelled = [record for record in records if isinstance(record, LabelledImage)]
        rows = [(pair.winner, pair.winner_prompt, pair.where) for pair in pairs]
        rows += [(pair.loser, pair.loser_prompt, pair.where) for pair in pairs]
        rows += [(one.image, one.prompt, one.where) for one in labelled]
        images = [_image(path, where) for path, _, where in rows]
        try:
            inputs = self.model.backbone.prepare(images, [prompt for _, prompt, _ in rows])
        except ValueError as error:
            raise ValueError(f"One of {', '.join(dict.fromkeys(where for *_, where in rows))}: {error}") from error
        return {
            **inputs,
            "tie": torch.tensor([pair.tie for pair in pairs], dtype=torch.bool),
            "gap": torch.tensor([pair.rating_gap for pair in pairs], dtype=torch.float32),
            "label": torch.tensor([one.label for one in labelled], dtype=torch.float32),
        }


def _image(path: Path, where: str) -> Tensor:
    try:
        return to_tensor(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


# --- the trainer ----------------------------------------------------------------------------------


class _AsTrlExpects(nn.Module):
    """The judge with what trl and transformers ask of any model they train."""

    accepts_loss_kwargs = False  # or transformers would not divide the loss by the accumulation steps

    def __init__(self, judge: RewardModel) -> None:
        super().__init__()
        self.judge = judge
        self.config = copy.deepcopy(judge.backbone.model.config)
        self.config.num_labels = 1

    def forward(self, **inputs: Tensor) -> Float[Tensor, "R d"]:
        return self.judge(**inputs)

    def add_model_tags(self, tags: Any) -> None:
        """Tags are for model cards, which a judge has its own of."""

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.judge.backbone.model.activation_checkpointing_enable(**options)


class RewardModelTrainer(RewardTrainer):
    """trl's RewardTrainer for a `RewardModel`: it optimises, logs, validates and saves the perspective in use."""

    def __init__(
        self,
        judge: RewardModel,
        *,
        objective: Objective,
        training: Sequence[Record],
        validation: Sequence[Record],
        args: RewardConfig,
        learning_rates: dict[str, float],
        lora_only: bool = False,
        callbacks: list[Any] | None = None,
    ) -> None:
        """`learning_rates` has one for each of `GROUPS`. With `lora_only` nothing but the LoRA learns, as published."""
        objective.check([*training, *validation])
        if validation and all(isinstance(record, PreferencePair) and record.tie for record in validation):
            raise ValueError(f"All {len(validation)} validation records are ties, by which no judge can be chosen.")
        judge.learn(("lora",) if lora_only else GROUPS)
        self.objective, self.learning_rates = objective, learning_rates
        records = [*training, *validation]
        numbers = list(range(len(records)))
        super().__init__(
            model=_AsTrlExpects(judge),
            args=args,
            data_collator=Collator(judge, records),
            train_dataset=Dataset.from_dict({"record": numbers[: len(training)]}),
            eval_dataset=Dataset.from_dict({"record": numbers[len(training) :]}) if validation else None,
            processing_class=copy.deepcopy(judge.backbone.prompt_tokenizer.tokenizer),
            callbacks=callbacks,
        )

    @property
    def judge(self) -> RewardModel:
        return self.model.judge

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # records are read when they are collated

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss on one batch; what it says of the judge is logged with it."""
        tie, gap, label = (inputs.pop(key) for key in ("tie", "gap", "label"))
        verdicts = model(**inputs)
        # DeepSpeed casts whatever floats a batch holds to its own precision.
        loss, right = self.objective(verdicts, tie, gap.float(), label.float())
        metrics = self._metrics["train" if self.model.training else "eval"]
        known = [value for value in gather_object(right.tolist()) if not math.isnan(value)]
        if known:
            metrics["accuracy"].extend(known)
        if self.objective.head == "scalar":
            metrics["score"].extend(gather_object(verdicts.detach()[:, 0].tolist()))
        return (loss, {"verdicts": verdicts}) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group for each part that learns."""
        if self.optimizer is None:
            groups = [
                {"params": params, "lr": self.learning_rates[group], "name": group}
                for group, named in self.judge.groups(self.judge.active).items()
                if (params := [p for p in named.values() if p.requires_grad])
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A checkpoint is for resuming; a judge is described when it is published."""

    # --- checkpoints hold the bundle, not the backbone ---

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, or go on from a checkpoint; from one at which training had ended, just take up the best judge."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
                self.state = state
                return self._load_best_model()
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        judge = self.judge
        with self._whole_weights():
            if self.args.should_save:
                tensors = adapter_tensors(judge, judge.active)
                save_adapter(judge.configs[judge.active], tensors, Path(output_dir or self.args.output_dir))

    @contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Within it each process has whole what is trained, which under ZeRO-3 is in parts."""
        if not self.is_sharded:
            yield
            return
        import deepspeed  # takes seconds

        with deepspeed.zero.GatheredParameters([p for p in self.judge.parameters() if p.requires_grad]):
            yield

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole judge, so that all of them must be asked whenever it is."""
        plugin = self.args.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes a part
        if self.args.should_save:
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with torch.no_grad():
            load_adapter_weights(self.judge, self.judge.active, Path(resume_from_checkpoint) / WEIGHTS_NAME)

    def _load_best_model(self) -> None:
        if not self.is_sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def finished(self) -> RewardModel:
        """The best judge, whole; under ZeRO-3 read anew from its checkpoint."""
        if not self.is_sharded:
            return self.judge
        unset_hf_deepspeed_config()  # or transformers would cut this one into parts too
        return load_reward_model(Path(self.state.best_model_checkpoint))


def seal(folder: Path) -> None:
    """Write down, last of all, what a finished checkpoint holds; without that it does not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SEAL)
    part = folder / (_SEAL + ".part")
    part.write_text(json.dumps({str(path.relative_to(folder)): _sha256(path) for path in files}, indent=1))
    os.replace(part, folder / _SEAL)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was sealed; one that a killed run was still writing is passed over."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.partition("-")[2]), reverse=True):
        try:
            sealed: dict[str, str] = json.loads((path / _SEAL).read_text())
        except (OSError, ValueError):
            continue
        if all((path / name).is_file() and _sha256(path / name) == sum_ for name, sum_ in sealed.items()):
            return path
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
