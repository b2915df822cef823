"""Train a judge of images: LLaVA-Reward (arXiv:2507.21391).

    accelerate launch recipes/train_reward_model.py                          the built-in judge, minutes on a laptop
    accelerate launch recipes/train_reward_model.py --training pairs.jsonl \\
        --config recipes/configs/reward_qwen2_5_vl_alignment.yaml            Qwen2.5-VL, with the paper's settings

A multimodal LLM reads an image and a prompt. Its last token looks at the image once more (SkipCA), and a linear
head makes a score of what it saw. LoRA, projector, SkipCA and head learn from what people preferred; the rest
stays as it is. Without --config or --backbone, recipes/configs/reward_shapes.yaml is read.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from rlhf_t2i.config import names, parse_config

if TYPE_CHECKING:
    from trl.trainer.reward_config import RewardConfig

    from reward_model.scoring import LlavaReward
    from reward_model.types import Record

BUILT_IN = "shapes"
_FREE_TO_CHANGE = {"resume", "run_folder", "keep_checkpoints", "trackers", "num_cpu_threads", "num_workers", "test"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields in the order of the flow; defaults are the paper's."""

    backbone: str = BUILT_IN
    """A folder or Hub id of a family with an adapter (Phi-3.5-vision, LLaVA-1.5, Qwen2.5-VL, ...), or the built-in
    world's small LLaVA (shapes)."""
    training: str = BUILT_IN
    """Comma-separated FORMAT:PLACE (docs/data.md); a file .jsonl is of our own format, .json as published with
    LLaVA-Reward. Or the built-in world's pairs (shapes)."""
    validation: str | None = None
    """Data files to choose the best judge by; null keeps validation_share of the training prompts back."""
    validation_share: float = 0.05
    test: str | None = None
    """Data files that are only measured at the end; null is none, or those of the built-in world."""
    image_root: str | None = None
    """Where relative image paths start; null is each data file's own folder. No image may lie outside of it."""
    image_prefix: str | None = None
    """OLD=NEW: image paths that start with the folder OLD are read as if they started with NEW."""
    unpack_folder: str = "runs/images"
    """Where images are written that lie within tables and archives."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Stop at a bad record, or leave it out and write it to skipped.jsonl in the run folder."""
    leave_out_test_prompts: bool = False
    """Train on no prompt that occurs in test; how many do is always said."""
    hard_negatives: float = 0.0
    """Share of the training pairs whose winner is also shown against itself under a prompt with one thing wrong."""

    perspective: str = "alignment"
    """What the judge looks at: alignment, fidelity, safety, ranking, or a name of your own."""
    loss: Literal["bradley_terry", "general_preference", "cross_entropy"] = "bradley_terry"
    temperature: float = 0.1
    """Differences of scores are divided by it to become log-odds; cross_entropy takes 1."""
    tie_width: float = 0.5
    """Used if the data has ties: in log-odds, how close two images must be to be called equal."""
    margin_per_rating: float = 0.0
    """Not for cross_entropy: log-odds by which a winner is asked to be ahead for each unit of rating_gap."""
    skip_ca: bool = True
    """Let the last token look at the visual tokens once more; false is the paper's ablation."""
    skip_ca_heads: int = 1
    template: Literal["family", "published"] = "family"
    """How a prompt is shown: by the backbone's chat template, or as the published code did."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Bounds of an image for Qwen's models: more pixels are more tokens. Null is the model's own."""
    num_crops: int | None = None
    """The most crops of an image for models that cut it up: more crops are more tokens. Null is the model's own."""

    lora_rank: int = 128
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    lora_only: bool = False
    """Train only the LoRA, as the published code does by mistake; projector, SkipCA and head stay as they begin."""
    learning_rate: float = 2e-4
    projector_learning_rate: float | None = None
    skip_ca_learning_rate: float | None = None
    head_learning_rate: float | None = None
    """Of each part; null is learning_rate."""
    warmup_share: float = 0.03
    """Of all steps; then the learning rate falls along a cosine."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    microbatch_size: int = 8
    """Records (pairs, ties or labels) in one forward pass of one process."""
    accumulation_steps: int = 4
    num_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many optimiser steps; -1 trains num_epochs."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Null takes what `accelerate launch` says. Scores, SkipCA, head and loss are always float32."""
    gradient_checkpointing: bool = False

    evaluate_every: int = 100
    """Steps between validations; a checkpoint is written at each."""
    patience: int = 5
    """Validations in a row without a better accuracy; 0 never stops early."""
    keep_checkpoints: int = 2
    resume: bool = False
    run_folder: str | None = None
    """Null is runs/reward_model-DATE."""
    trackers: str = ""
    """Comma-separated, of wandb and tensorboard."""
    num_workers: int = 0
    """Processes that read images ahead of the model."""
    num_cpu_threads: int = 0
    """On a CPU; 0 shares all cores among the processes."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        for name, works, rule in (
            ("hard_negatives", 0 <= self.hard_negatives <= 1, "in [0, 1]"),
            ("validation_share", 0 < self.validation_share < 1, "in (0, 1)"),
            ("temperature", self.temperature > 0, "positive"),
            ("tie_width", self.tie_width > 0, "positive"),
            ("margin_per_rating", self.margin_per_rating >= 0, "at least 0"),
            ("skip_ca_heads", self.skip_ca_heads >= 1, "at least 1"),
            ("lora_rank", self.lora_rank >= 1, "at least 1"),
            ("lora_alpha", self.lora_alpha > 0, "positive"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("warmup_share", 0 <= self.warmup_share < 1, "in [0, 1)"),
            ("max_gradient_norm", self.max_gradient_norm > 0, "positive"),
            ("microbatch_size", self.microbatch_size >= 1, "at least 1"),
            ("accumulation_steps", self.accumulation_steps >= 1, "at least 1"),
            ("num_epochs", self.num_epochs > 0, "positive"),
            ("max_steps", self.max_steps == -1 or self.max_steps >= 1, "-1 or at least 1"),
            ("evaluate_every", self.evaluate_every >= 1, "at least 1"),
            ("patience", self.patience >= 0, "at least 0"),
            ("keep_checkpoints", self.keep_checkpoints >= 2, "at least 2: the best and the newest"),
            ("num_workers", self.num_workers >= 0, "at least 0"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not works:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}.")
        if self.loss == "cross_entropy" and self.margin_per_rating:
            raise ValueError(f"margin_per_rating is {self.margin_per_rating}, which cross_entropy has no use for.")

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of each group of parameters."""
        own = {"projector": self.projector_learning_rate, "skip_ca": self.skip_ca_learning_rate}
        own = {"lora": None, **own, "head": self.head_learning_rate}
        return {group: self.learning_rate if rate is None else rate for group, rate in own.items()}


def main(config: Config) -> Path:
    """Read the data, build the judge, train it, keep the best, measure it; returns the folder of the judge."""
    from transformers import EarlyStoppingCallback  # these take seconds

    from reward_model.backbones.load import load_backbone
    from reward_model.checkpoint import adapter_tensors, save_adapter
    from reward_model.config import RewardModelConfig
    from reward_model.datasets.valid_prompts import with_valid_prompts
    from reward_model.losses import Objective
    from reward_model.model import RewardModel, parameter_table, visual_token_table
    from reward_model.scoring import LlavaReward
    from reward_model.training import RewardModelTrainer, newest_checkpoint
    from rlhf_t2i.distributed.processes import end_processes
    from rlhf_t2i.shapes.names import TOY_REWARD_MODEL_FOLDER
    from rlhf_t2i.training.environment import restarted

    args, folder = start(config)
    training, validation, tests = load_data(config, folder)
    has_ties = any(getattr(record, "tie", False) for record in [*training, *validation])
    objective = Objective(
        loss=config.loss,
        temperature=config.temperature if config.loss != "cross_entropy" else 1.0,
        tie_width=config.tie_width if has_ties else 0.0,
        margin_per_rating=config.margin_per_rating,
    )
    objective.check([*training, *validation])
    source = str(TOY_REWARD_MODEL_FOLDER / "backbone") if config.backbone == BUILT_IN else config.backbone
    bounds: Any = {key: getattr(config, key) for key in ("min_pixels", "max_pixels", "num_crops")}
    shown: Any = {"template": config.template, **bounds}
    dtype = "bfloat16" if args.bf16 else "float32"
    backbone = load_backbone(source, dtype=getattr(torch, dtype), **shown)
    for records in (training, validation, *tests.values()):
        records[:] = with_valid_prompts(
            records, lambda prompt: backbone.prompt_tokenizer.ids(prompt, 0), skipped=skip_file(config, folder)
        )
    judge = RewardModel(backbone)
    model_config = RewardModelConfig(
        perspective=config.perspective,
        backbone=os.path.abspath(source) if Path(source).is_dir() else source,
        model_type=backbone.model.config.model_type,
        width=backbone.width,
        head=objective.head,
        temperature=objective.temperature,
        tie_width=objective.tie_width,
        skip_ca=config.skip_ca,
        skip_ca_heads=config.skip_ca_heads,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        dtype=dtype,
        **shown,
    )
    judge.add(model_config, seed=config.seed)
    trainer = RewardModelTrainer(
        judge, objective=objective, training=training, validation=validation, args=args,
        learning_rates=config.learning_rates, lora_only=config.lora_only,
        callbacks=[EarlyStoppingCallback(config.patience)] if config.patience else [],
    )  # fmt: skip
    checkpoint = newest_checkpoint(folder / "checkpoints") if config.resume or restarted() else None
    if trainer.is_world_process_zero():
        tqdm.write(f"{parameter_table(judge)}\n{visual_token_table(judge.backbone)}")
        tqdm.write(f"Resuming from {checkpoint}" if checkpoint else "Starting from the beginning.")
    trainer.train_from(checkpoint)
    if trainer.is_world_process_zero():
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1))
        finished = LlavaReward(trainer.finished())
        model_config = replace(
            model_config, **finished.score_statistics(validation, batch_size=2 * config.microbatch_size)
        )
        save_adapter(model_config, adapter_tensors(finished.model, model_config.perspective), folder / "reward_model")
        measure(finished, {"validation": validation, **tests}, folder, batch_size=2 * config.microbatch_size)
        tqdm.write(f"judge     {folder / 'judge'}")
    end_processes(trainer.accelerator)
    return folder / "reward_model"


def start(config: Config) -> tuple[RewardConfig, Path]:
    """Set up the processes, claim the run folder, and say to trl what the config says."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from trl.trainer.reward_config import RewardConfig

    from rlhf_t2i.training.claim import claim_folder
    from rlhf_t2i.training.environment import check_trackers, set_num_threads, stop_with_launcher

    trackers = names(config.trackers)
    check_trackers(trackers)
    stop_with_launcher()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        set_num_threads(config.num_cpu_threads)
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision {precision} is not supported; use no, fp16 or bf16.")
    args = RewardConfig(
        output_dir="runs",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=config.gradient_checkpointing,
        per_device_train_batch_size=config.microbatch_size,
        per_device_eval_batch_size=2 * config.microbatch_size,
        gradient_accumulation_steps=config.accumulation_steps,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_share,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_gradient_norm,
        disable_dropout=False,
        max_length=None,
        remove_unused_columns=False,
        dataloader_num_workers=config.num_workers,
        eval_strategy="steps",
        eval_steps=config.evaluate_every,
        save_strategy="steps",
        save_steps=config.evaluate_every,
        save_total_limit=config.keep_checkpoints,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        ddp_find_unused_parameters=False,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        logging_steps=min(10, config.evaluate_every),
        report_to=trackers or "none",
        seed=config.seed,
    )
    if PartialState().distributed_type == DistributedType.FSDP:
        raise ValueError("A judge is not trained with FSDP; use accelerate_configs/deepspeed_zero3.yaml, or DDP.")
    folder = claim_folder(
        {**asdict(config), "mixed_precision": precision}, recipe="reward_model", free_to_change=_FREE_TO_CHANGE
    )
    args.output_dir = str(folder / "checkpoints")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))
    os.environ.setdefault("WANDB_DIR", str(folder))
    return args, folder


def load_data(config: Config, folder: Path) -> tuple[list[Record], list[Record], dict[str, list[Record]]]:
    """The records to train on, to choose by, and to measure with; says what they are."""
    from accelerate import PartialState

    from reward_model.datasets import load_records
    from reward_model.datasets.prepare import prepare_records

    say = tqdm.write if PartialState().is_main_process else lambda _: None
    training, validation, test = sources(config)
    no_preference = Counter[str]()

    def read(source: str) -> list[Record]:
        return load_records(
            source, image_root=config.image_root, image_prefix=config.image_prefix, unpack_to=config.unpack_folder,
            on_bad_record=config.on_bad_record, skipped=skip_file(config, folder), without_preference=no_preference,
        )  # fmt: skip

    tests = {name: read(source) for name, source in test.items()}
    records = [record for source in training for record in read(source)]
    held_out = [record for source in validation for record in read(source)]
    for reason, count in no_preference.items():
        say(f"{count:,} rows state no preference: {reason}")
    if config.backbone == BUILT_IN and config.training != BUILT_IN:
        say("The built-in backbone only knows the built-in world; for other images name a --backbone.")
    records, held_out = prepare_records(
        records, held_out, tests, exclude_test_prompts=config.leave_out_test_prompts,
        validation_fraction=config.validation_share, hard_negatives=config.hard_negatives, seed=config.seed, log=say,
    )  # fmt: skip
    return records, held_out, tests


def sources(config: Config) -> tuple[list[str], list[str], dict[str, str]]:
    """Where training, validation and test data lie, the last ones by name; the built-in world's are made."""
    from accelerate import PartialState

    from reward_model.datasets.formats import source_name

    training, validation, test = config.training, config.validation or "", config.test or ""
    if training == BUILT_IN:
        from rlhf_t2i.shapes.pairs import TESTS, write_pairs

        with PartialState().main_process_first():
            made = write_pairs(Path("runs") / f"shapes-pairs-{config.seed}", seed=config.seed)
        training = f"{made / 'train_drawn.jsonl'},{made / 'train_painted.jsonl'}"
        validation = validation or str(made / "validation.jsonl")
        test = test or ",".join(str(made / f"{name}.jsonl") for name in TESTS)
    tests = {source_name(source): source for source in names(test)}
    if len(tests) < len(names(test)) or "validation" in tests:
        raise ValueError(f"test is {test!r}; each file needs a name of its own, other than validation.")
    return names(training), names(validation), tests


def skip_file(config: Config, folder: Path) -> Path | None:
    """Where this process writes bad records down; None if they stop the run."""
    from accelerate import PartialState

    rank = PartialState().process_index
    return folder / (f"skipped_{rank}.jsonl" if rank else "skipped.jsonl") if config.on_bad_record == "skip" else None


def measure(judge: LlavaReward, sets: dict[str, list[Record]], folder: Path, *, batch_size: int) -> None:
    """Print and write what the finished judge reaches on each set."""
    from reward_model.benchmarks.evaluation import record_metrics, score_records
    from reward_model.benchmarks.metrics import to_table

    found = {
        name: record_metrics(score_records(judge, records, batch_size=batch_size)) for name, records in sets.items()
    }
    for name, metrics in found.items():
        tqdm.write(f"\n{name}\n{to_table(metrics)}")
    rows = {name: [asdict(metric) for metric in metrics] for name, metrics in found.items()}
    (folder / "metrics.json").write_text(json.dumps(rows, indent=1))


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """Without --config or --backbone: the built-in judge's config first."""
    named = {argument.partition("=")[0] for argument in arguments}
    if named & {"--config", "--backbone", "--help", "-h"}:
        return list(arguments)
    return ["--config", str(Path(__file__).parent / "configs" / "reward_shapes.yaml"), *arguments]


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or "", arguments=with_defaults(sys.argv[1:])))
