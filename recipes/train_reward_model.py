"""Train LLaVA-Reward, a reward model on a multimodal LLM (arXiv:2507.21391).

    accelerate launch recipes/train_reward_model.py
    accelerate launch recipes/train_reward_model.py --config recipes/configs/reward_qwen2_5_vl_alignment.yaml

The first command trains the built-in reward model on a CPU within minutes, with recipes/configs/reward_shapes.yaml; the
second trains Qwen2.5-VL with the paper's settings, on the files of --train_data.

A frozen multimodal LLM encodes an image and its prompt. The hidden state of the last token attends to the visual tokens
once more (SkipCA), and a linear head maps the result to a score. With --readout prompt_likelihood, as the first command
has it, the score is the log-likelihood of the prompt. LoRA and projector, SkipCA and head are trained:

    logit = (score(winner) - score(loser)) / temperature,   loss = -log sigmoid(logit)        (Bradley-Terry)

The weights with the highest validation accuracy are saved and evaluated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.train_reward_model import FREE_TO_CHANGE, Config, with_defaults

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    built_in = Path(__file__).parent / "configs" / "reward_shapes.yaml"
    config = parse_config(Config, __doc__, arguments=with_defaults(sys.argv[1:], path=built_in))

import json
import os
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import EarlyStoppingCallback
from trl.trainer.reward_config import RewardConfig

from reward_model.backbones.load import backbone_family, load_backbone
from reward_model.benchmarks.evaluation import record_metrics, score_records
from reward_model.benchmarks.metrics import to_rows, to_table
from reward_model.checkpoint import adapter_tensors, save_adapter
from reward_model.checkpoint_files import newest_checkpoint
from reward_model.config import RewardModelConfig
from reward_model.datasets import load_records
from reward_model.datasets.formats import source_name
from reward_model.datasets.prepare import draw_records, prepare_records
from reward_model.datasets.stamp import checked
from reward_model.datasets.table import RecordTable
from reward_model.datasets.usable import skipped_records, usable_records
from reward_model.losses import Objective
from reward_model.model import RewardModel, parameter_table, visual_token_table
from reward_model.scoring import LlavaReward
from reward_model.training import RewardModelTrainer
from rlhf_t2i.distributed.processes import end_processes, prepare_deepspeed
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import CHECKPOINTS, REWARD_METRICS, REWARD_MODEL
from rlhf_t2i.plan import or_plan
from rlhf_t2i.report.reward_model import record_history, write_report
from rlhf_t2i.settings.lists import names
from rlhf_t2i.shapes.names import TOY_BACKBONE, TOY_BACKBONE_FOLDER, TOY_PAIRS, toy_pairs_folder
from rlhf_t2i.shapes.pairs import TESTS, write_pairs
from rlhf_t2i.training.claim import claim_folder, keep_folder
from rlhf_t2i.training.environment import prepare_torch, restarted, stop_with_launcher
from rlhf_t2i.training.fingerprints import record_distribution
from rlhf_t2i.training.reward_arguments import refuse_strategy, trainer_arguments
from rlhf_t2i.training.trackers import name_run


def main(config: Config) -> Path:
    """Train on preferences, keep the best weights, evaluate them on usable records; return their folder."""
    arguments, folder = start(config)
    training, validation, tests = load_data(config, folder)
    objective = Objective(
        loss=config.loss,
        temperature=config.temperature if config.loss != "cross_entropy" else 1.0,
        tie_width=config.tie_width if any(one.column("tie").any() for one in (training, validation)) else 0.0,
        margin_per_rating=config.margin_per_rating,
        readout=config.readout,
    )
    objective.check([*training.first_of_each_kind(), *validation.first_of_each_kind()])
    model = build_model(config, objective, dtype="bfloat16" if arguments.bf16 else "float32")
    trainer = RewardModelTrainer(
        model, objective=objective, training=training, args=arguments,
        validation=draw_records(validation, config.max_validation_records, seed=config.seed),
        learning_rates=config.learning_rates, skipped=skip_log(config, folder), lora_only=config.lora_only,
        callbacks=[EarlyStoppingCallback(config.patience)] if config.patience else [],
        weights=config.weights, on_validation=partial(record_history, folder),
    )  # fmt: skip
    resumes, log = config.resume or restarted(), trainer.accelerator.print
    checkpoint = newest_checkpoint(folder / CHECKPOINTS, report=log) if resumes else None
    record_distribution(folder, trainer.strategy, is_resumed=checkpoint is not None)
    if trainer.is_world_process_zero():
        tqdm.write(f"{parameter_table(model)}\n{visual_token_table(model.backbone)}")
        tqdm.write(f"Resuming from {checkpoint}" if checkpoint else "Starting from the beginning.")
    keep_folder(folder)
    trainer.train_from(checkpoint)
    if trainer.is_world_process_zero():
        record_history(folder, trainer.state.log_history)
        best = LlavaReward(trainer.best_model())
        usable = partial(usable_records, backbone=best.model.backbone, skipped=folder / "skipped.jsonl")
        sets = {name: usable(records) for name, records in {"validation": validation, **tests}.items()}
        statistics = best.score_statistics(sets["validation"], batch_size=2 * config.microbatch_size)
        model_config = replace(model.configs[config.perspective], **statistics)
        save_adapter(model_config, adapter_tensors(best.model, config.perspective), folder / REWARD_MODEL)
        evaluate(best, sets, folder, batch_size=2 * config.microbatch_size)
        tqdm.write(f"{skipped_records(folder)}\nreport        {write_report(folder)}")
        tqdm.write(f"reward model  {folder / REWARD_MODEL}")
    end_processes(trainer.accelerator)
    return folder / REWARD_MODEL


def build_model(config: Config, objective: Objective, *, dtype: str) -> RewardModel:
    """Load the frozen backbone and add an untrained perspective: LoRA, projector, SkipCA and head."""
    source = str(TOY_BACKBONE_FOLDER) if config.backbone == TOY_BACKBONE else config.backbone
    options: Any = {key: getattr(config, key) for key in ("template", "min_pixels", "max_pixels", "num_crops")}
    backbone = load_backbone(source, dtype=getattr(torch, dtype), quantization=config.quantization, **options)
    model = RewardModel(backbone)
    model_config = RewardModelConfig(
        perspective=config.perspective,
        backbone=os.path.abspath(source) if Path(source).is_dir() else source,
        model_type=model.model.config.model_type,
        width=model.backbone.width,
        head=objective.head,
        temperature=objective.temperature,
        tie_width=objective.tie_width,
        readout=objective.readout,
        skip_ca=config.skip_ca and objective.readout == "last_token",
        skip_ca_heads=config.skip_ca_heads,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        dtype=dtype,  # pyright: ignore[reportArgumentType]: RewardModelConfig checks it
        **options,
    )
    model.add(model_config, seed=config.seed)
    return model


def start(config: Config) -> tuple[RewardConfig, Path]:
    """Set up the process and trl's arguments, and claim the run folder. Raises what `refuse_strategy` does."""
    refuse_strategy(os.environ, quantization=config.quantization)
    stop_with_launcher()
    if config.backbone != TOY_BACKBONE:
        backbone_family(config.backbone)  # raises before data are read
    prepare_torch(attention=config.attention, num_cpu_threads=config.num_cpu_threads)
    prepare_deepspeed()
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    arguments = trainer_arguments(config, precision=precision)
    folder = claim_folder(
        {**asdict(config), "mixed_precision": precision}, recipe="reward_model", free_to_change=FREE_TO_CHANGE
    )
    arguments.output_dir, arguments.run_name = str(folder / CHECKPOINTS), folder.name
    name_run(folder, names(config.trackers), goes_on=config.resume or restarted())
    return arguments, folder


def load_data(config: Config, folder: Path) -> tuple[RecordTable, RecordTable, dict[str, RecordTable]]:
    """Return the training and validation records, and the test records by name; print their contents."""
    log = tqdm.write if PartialState().is_main_process else lambda _: None
    (training_files, validation_files, test_files), no_preference = data_files(config), Counter[str]()

    def load(source: str) -> RecordTable:
        log(checked(source))
        return load_records(
            source, image_root=config.image_root, image_prefix=config.image_prefix,
            on_bad_record=config.on_bad_record, skipped=skip_log(config, folder), without_preference=no_preference,
            streaming=config.streaming,
        )  # fmt: skip

    tests = {name: load(source) for name, source in test_files.items()}
    training, validation = (RecordTable.concatenate([*map(load, f)]) for f in (training_files, validation_files))
    for reason, count in no_preference.items():
        log(f"{count:,} rows state no preference: {reason}")
    if config.backbone == TOY_BACKBONE and config.train_data != TOY_PAIRS:
        log("The built-in backbone was trained on the toy world only; for other images give a --backbone.")
    prepared = prepare_records(
        training, validation, tests, exclude_test_prompts=config.exclude_test_prompts,
        validation_fraction=config.validation_fraction, hard_negatives=config.hard_negatives, seed=config.seed, log=log,
    )  # fmt: skip
    return *prepared, tests


def data_files(config: Config) -> tuple[list[str], list[str], dict[str, str]]:
    """Return the training and validation files, and the test files by name; the toy world's are made on first use."""
    training, validation, test = config.train_data, config.validation_data or "", config.test_data or ""
    if training == TOY_PAIRS:
        with PartialState().main_process_first():
            made = write_pairs(toy_pairs_folder(config.seed), seed=config.seed)
        training = f"{made / 'train_drawn.jsonl'},{made / 'train_generated.jsonl'}"
        validation = validation or str(made / "validation.jsonl")
        test = test or ",".join(str(made / f"{name}.jsonl") for name in TESTS)
    tests = {source_name(source): source for source in names(test)}
    if len(tests) < len(names(test)) or "validation" in tests:
        raise ValueError(f"test_data is {test!r}; each file needs a name of its own, other than validation.")
    return names(training), names(validation), tests


def skip_log(config: Config, folder: Path) -> Path | None:
    """Return this process's log of skipped records; None if a bad record stops the run."""
    rank = PartialState().process_index
    return folder / (f"skipped_{rank}.jsonl" if rank else "skipped.jsonl") if config.on_bad_record == "skip" else None


def evaluate(model: LlavaReward, sets: dict[str, RecordTable], folder: Path, *, batch_size: int) -> None:
    """Print and write accuracy, calibration and other metrics on each set."""
    metrics = {name: record_metrics(score_records(model, one, batch_size=batch_size)) for name, one in sets.items()}
    for name, found in metrics.items():
        tqdm.write(f"\n{name}\n{to_table(found)}")
    write_atomically(folder / REWARD_METRICS, json.dumps({k: to_rows(v) for k, v in metrics.items()}, indent=1))


if __name__ == "__main__":
    run_command(or_plan(main), config)
