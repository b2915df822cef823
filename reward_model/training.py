"""Training of a reward model with trl's RewardTrainer: accelerate, DeepSpeed, mixed precision, trackers, resuming.

Own parts: the rows of a batch, the loss on pairs, ties and labels, one optimiser group for each group of parameters,
and checkpoints that hold the adapter instead of the frozen backbone.
"""

# transformers, trl and datasets have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIncompatibleMethodOverride=false, reportOptionalMemberAccess=false
# pyright: reportReturnType=false, reportOptionalSubscript=false
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from trl import RewardConfig, RewardTrainer

from reward_model.checkpoint import WEIGHTS_NAME, adapter_tensors, load_adapter_weights, load_reward_model, save_adapter
from reward_model.checkpoint_files import seal
from reward_model.collator import Collator
from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.order import Numbers, OrderSampler, block_order, mixed_order, random_order
from reward_model.datasets.refill import Refill
from reward_model.datasets.table import RecordTable
from reward_model.losses import Objective
from reward_model.model import GROUPS, RewardModel
from reward_model.progress import History, Progress, continue_tensorboard
from reward_model.types import Inputs, Record

REQUIRED_ARGUMENTS: dict[str, Any] = {
    "disable_dropout": False,
    "max_length": None,
    "remove_unused_columns": False,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "load_best_model_at_end": True,
    "restore_callback_states_from_checkpoint": True,
    "ddp_find_unused_parameters": False,
    "metric_for_best_model": "accuracy",
    "greater_is_better": True,
}
"""Arguments of trl's RewardConfig that `RewardModelTrainer` relies on."""

# --- the trainer ----------------------------------------------------------------------------------


class _TrlModel(nn.Module):
    """A reward model with the attributes that trl and transformers expect of a model."""

    accepts_loss_kwargs = False  # or transformers would not divide the loss by the accumulation steps

    def __init__(self, reward_model: RewardModel) -> None:
        super().__init__()
        self.reward_model = reward_model
        self.config = copy.deepcopy(reward_model.backbone.model.config)
        self.config.num_labels = 1
        # DDP would broadcast quantised weights as plain tensors; each process has loaded the same ones.
        quantized = [name for name, p in self.named_parameters() if type(p) is not nn.Parameter]
        self._ddp_params_and_buffers_to_ignore = quantized

    def forward(self, **inputs: Tensor) -> Float[Tensor, "R d"]:
        return self.reward_model(**inputs)

    def add_model_tags(self, tags: Any) -> None:
        """Do nothing: tags are for trl's model card, which is not written."""

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.reward_model.backbone.model.activation_checkpointing_enable(**options)


class RewardModelTrainer(RewardTrainer):
    """trl's RewardTrainer for a `RewardModel`: it trains, logs, validates and saves the active perspective."""

    def __init__(  # noqa: PLR0913  # one keyword for each part of a training
        self,
        reward_model: RewardModel,
        *,
        objective: Objective,
        training: Sequence[Record],
        validation: Sequence[Record],
        args: RewardConfig,
        learning_rates: dict[str, float],
        skipped: Path | None = None,
        lora_only: bool = False,
        weights: Sequence[float] = (),
        callbacks: list[Any] | None = None,
        on_validation: Callable[[History], object] = lambda history: None,
    ) -> None:
        """`learning_rates` has one for each of `GROUPS`. With `lora_only` only the LoRA is trained, as published.

        Records whose images or prompts cannot be used are written to the file `skipped` if there is one; without, the
        first one that is met raises BadRecordError. `weights` are those of the sources of the training records, as
        `mixed_order` takes them; without, an epoch has every record once.

        `on_validation` takes the training log after each validation, on the main process.
        """
        tables = [RecordTable.of(training), RecordTable.of(validation)]
        for table in tables:
            objective.check(table.first_of_each_kind())
        if len(validation) and tables[1].column("tie").all():
            raise ValueError(f"All {len(validation)} validation records are ties, which have no accuracy.")
        reward_model.set_trainable(("lora",) if lora_only else GROUPS)
        self.objective, self.learning_rates = objective, learning_rates
        self._training, self._weights = tables[0], weights
        ends, any_dataset = (0, len(training), len(training) + len(validation)), Dataset.from_dict({})
        self._numbers = {"train": Numbers(*ends[:2]), "eval": Numbers(*ends[1:])}
        refill = Refill(len(training), len(validation), skipped=skipped)
        super().__init__(
            model=_TrlModel(reward_model),
            args=args,
            data_collator=Collator(reward_model, RecordTable.concatenate(tables), refill),
            train_dataset=any_dataset,
            eval_dataset=any_dataset if len(validation) else None,
            processing_class=copy.deepcopy(reward_model.backbone.prompt_tokenizer.tokenizer),
            callbacks=callbacks,
        )
        self._num_images = 0
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.add_callback(Progress(self._take_num_images, on_validation=on_validation))

    @property
    def reward_model(self) -> RewardModel:
        """The model in training."""
        return self.model.reward_model

    def _take_num_images(self) -> int:
        """Return the images that all processes have trained on since the last call."""
        num_images, self._num_images = self._num_images, 0
        return num_images

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return self._numbers[dataset_name]  # trl insists on a `datasets.Dataset`, which would hold all of them

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return a sampler whose order is a pure function of seed and epoch."""
        blocks = self._training.column("block")
        if self._weights:
            order = partial(mixed_order, blocks, self._training.sources(), self._weights)
        else:
            order = partial(block_order, blocks) if blocks.max() >= 0 else partial(random_order, len(blocks))
        return OrderSampler(partial(order, seed=self.args.seed), len(blocks))

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's loss on one batch; its accuracy and scores are logged."""
        tie, gap, label = (inputs.pop(key) for key in ("tie", "gap", "label"))
        outputs = model(**inputs)
        # DeepSpeed casts all floats of a batch to its own precision.
        loss, correct = self.objective(outputs, tie, gap.float(), label.float())
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.model.training:
            self._num_images += sum(gather_object([len(outputs)]))
        known = [value for value in gather_object(correct.tolist()) if not math.isnan(value)]
        if known:
            metrics["accuracy"].extend(known)
        if self.objective.head == "scalar":
            metrics["score"].extend(gather_object(outputs.detach()[:, 0].tolist()))
        return (loss, {"outputs": outputs}) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW with one parameter group for each of `GROUPS` that is trained."""
        if self.optimizer is None:
            groups = [
                {"params": params, "lr": self.learning_rates[group], "name": group}
                for group, named in self.reward_model.groups(self.reward_model.active).items()
                if (params := [p for p in named.values() if p.requires_grad])
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: checkpoints are for resuming, and a model card is written at publication."""

    # --- checkpoints hold the adapter, not the backbone ---

    def train_from(self, checkpoint: Path | None) -> None:
        """Train from the start or from a checkpoint; if training had ended there, only load the best weights."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            has_more = state.global_step == state.max_steps < self.args.max_steps
            if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"] and not has_more:
                self.state = state
                return self._load_best_model()
            if self.is_world_process_zero():
                continue_tensorboard(self.callback_handler.callbacks, step=state.global_step)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except BadRecordError as error:  # of a worker, with the text of its traceback
            raise BadRecordError(str(error).rpartition("BadRecordError: ")[2].strip()) from error
        except ConnectionError as error:  # of a bucket
            raise ConnectionError(str(error).rpartition("\nConnectionError: ")[2].strip()) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(
                f"A process that loads images ended: {str(error).splitlines()[0]} It was killed, mostly for want of "
                f"memory; give fewer num_workers (now {self.args.dataloader_num_workers}), or 0."
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        model = self.reward_model
        with self._gathered_weights():
            if self.args.should_save:
                tensors = adapter_tensors(model, model.active)
                save_adapter(model.configs[model.active], tensors, Path(output_dir or self.args.output_dir))

    @contextmanager
    def _gathered_weights(self) -> Iterator[None]:
        """Gather the trained weights on every process within the context; under ZeRO-3 they are sharded."""
        if not self.is_sharded:
            yield
            return
        import deepspeed  # takes seconds

        with deepspeed.zero.GatheredParameters([p for p in self.reward_model.parameters() if p.requires_grad]):
            yield

    @property
    def is_sharded(self) -> bool:
        """True if parameters are sharded over the processes (ZeRO-3), so that every process must run each forward."""
        return self.strategy == "ZeRO-3"

    @property
    def strategy(self) -> str:
        """How the processes share the weights: "DDP", also for a single one, or "ZeRO-1", "ZeRO-2", "ZeRO-3"."""
        plugin = self.args.deepspeed_plugin
        return "DDP" if plugin is None else f"ZeRO-{plugin.zero_stage}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes some of the files
        if self.args.should_save:
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with torch.no_grad():
            load_adapter_weights(
                self.reward_model, self.reward_model.active, Path(resume_from_checkpoint) / WEIGHTS_NAME
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        schedule = self.lr_scheduler  # the loaded state has the learning rates of the earlier options
        groups = schedule.optimizer.param_groups
        schedule.base_lrs = [self.learning_rates[group["name"]] for group in groups]
        for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)

    def _load_best_model(self) -> None:
        if not self.is_sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def best_model(self) -> RewardModel:
        """Return the model with the best weights; under ZeRO-3 it is loaded from its checkpoint."""
        if not self.is_sharded:
            return self.reward_model
        unset_hf_deepspeed_config()  # or transformers would shard this one too
        return load_reward_model(Path(self.state.best_model_checkpoint))
