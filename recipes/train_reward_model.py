"""Train a judge of images: LLaVA-Reward (arXiv:2507.21391).

    accelerate launch recipes/train_reward_model.py                          the built-in judge, minutes on a laptop
    accelerate launch recipes/train_reward_model.py --train_data pairs.jsonl \\
        --config recipes/configs/reward_qwen2_5_vl_alignment.yaml            Qwen2.5-VL, with the paper's settings

A multimodal LLM reads an image and a prompt. Its last token looks at the image once more (SkipCA), and a linear
head makes a score of what it saw. LoRA, projector, SkipCA and head learn from what people preferred; the rest
stays as it is. Without --config or --backbone, recipes/configs/reward_shapes.yaml is read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.train_reward_model import Config, with_defaults

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    built_in = Path(__file__).parent / "configs" / "reward_shapes.yaml"
    config = parse_config(Config, __doc__, arguments=with_defaults(sys.argv[1:], path=built_in))

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from rlhf_t2i.config import names

if TYPE_CHECKING:
    from trl.trainer.reward_config import RewardConfig

    from reward_model.scoring import LlavaReward
    from reward_model.types import Record

BUILT_IN = "shapes"
_FREE_TO_CHANGE = {
    "resume",
    "run_folder",
    "keep_checkpoints",
    "trackers",
    "num_cpu_threads",
    "num_workers",
    "test_data",
}


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
        max_steps=config.num_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_fraction,
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
    if config.backbone == BUILT_IN and config.train_data != BUILT_IN:
        say("The built-in backbone only knows the built-in world; for other images name a --backbone.")
    records, held_out = prepare_records(
        records, held_out, tests, exclude_test_prompts=config.exclude_test_prompts,
        validation_fraction=config.validation_fraction, hard_negatives=config.hard_negatives, seed=config.seed, log=say,
    )  # fmt: skip
    return records, held_out, tests


def sources(config: Config) -> tuple[list[str], list[str], dict[str, str]]:
    """Where training, validation and test data lie, the last ones by name; the built-in world's are made."""
    from accelerate import PartialState

    from reward_model.datasets.formats import source_name

    training, validation, test = config.train_data, config.validation_data or "", config.test_data or ""
    if training == BUILT_IN:
        from rlhf_t2i.shapes.pairs import TESTS, write_pairs

        with PartialState().main_process_first():
            made = write_pairs(Path("runs") / f"shapes-pairs-{config.seed}", seed=config.seed)
        training = f"{made / 'train_drawn.jsonl'},{made / 'train_generated.jsonl'}"
        validation = validation or str(made / "validation.jsonl")
        test = test or ",".join(str(made / f"{name}.jsonl") for name in TESTS)
    tests = {source_name(source): source for source in names(test)}
    if len(tests) < len(names(test)) or "validation" in tests:
        raise ValueError(f"test_data is {test!r}; each file needs a name of its own, other than validation.")
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


if __name__ == "__main__":
    main(config)
