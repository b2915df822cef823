"""Run one step of reward training without weights, and plan its memory, its cost and its hours."""

from __future__ import annotations

import inspect
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reward_model.model import RewardModel
from rlhf_t2i.distributed.memory import Memory, memory_of
from rlhf_t2i.distributed.placement import layout_of
from rlhf_t2i.distributed.processes import Mode
from rlhf_t2i.plan.backbones import backbone_files, most_tokens
from rlhf_t2i.plan.reward_stand_ins import RewardRehearsal
from rlhf_t2i.plan.reward_steps import training_length
from rlhf_t2i.plan.stand_ins import StepFinished
from rlhf_t2i.plan.tracker import Tracker
from rlhf_t2i.plan.types import Plan, bytes_saved, launched, without_launcher
from rlhf_t2i.training.reward_arguments import refuse_strategy

_WORDS = ("a", "red", "circle", "on", "a", "blue", "background", "and")
_LONGEST = 60
"""Words of the longer prompts."""
_NAMES = {"lora": "LoRA", "projector": "projector", "skip_ca": "SkipCA", "head": "head"}


def rehearse(main: Callable[[Any], Any], config: Any, *, fake: bool = True, repeats: bool = False) -> Plan:
    """Run one step of the recipe's `main`, on fake tensors or on zeros, and return what it needs.

    One microbatch runs and counts as all, unless `repeats`. Raises ValueError for options that
    do not fit the backbone, as the recipe does, and for a backbone whose sizes are unknown.
    """
    refuse_strategy(os.environ, quantization=config.quantization)
    mode, processes = launched(os.environ)
    length = training_length(config, processes=processes)
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    tracker = Tracker(FakeTensorMode(allow_non_fake_inputs=True) if fake else None)
    with without_launcher(), tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = backbone_files(config.backbone, Path(name) / "backbone")
        own = _prepared(config, Path(name), source, precision=precision)
        share = length.validation / (2 * own.microbatch_size * processes * own.evaluate_every)
        rehearsal = RewardRehearsal(
            tracker, own, validation_share=share, in_float32=precision == "fp16", repeats=repeats
        )
        on_cpu = patch.object(torch.cuda, "is_available", return_value=False)  # or Trainer would use all GPUs at once
        with on_cpu, tracker, rehearsal.replacing(), redirect_stdout(io.StringIO()), suppress(StepFinished):
            main(own)
        words = _num_words(source)
    model, side, labelled = rehearsal.model, config.dry_run_image_side, config.loss == "cross_entropy"
    saved = bytes_saved(config.quantization, model.backbone.language_model) if config.quantization else 0
    layout = layout_of(model, mode, processes=processes)
    held, single = memory_of(layout), memory_of(replace(layout, mode="single", processes=1))
    num_records = config.microbatch_size * config.accumulation_steps * processes
    kind, tokens = "labelled images" if labelled else "pairs", model.backbone.num_visual_tokens(side, side)
    return Plan(
        recipe=Path(inspect.getfile(main)).stem, model=config.backbone, module="", mode=mode, processes=processes,
        parts=_parts_of(model, saved=saved), state=_state_of(held), peaks=_peaks(tracker, held, single, saved=saved),
        counts=dict(tracker.counts), images=num_records * (1 if labelled else 2), num_steps=length.num_steps,
        host=rehearsal.loaded, left_out=_left_out(mode, precision),
        records=f"{num_records:,} {kind}, {tokens:,} visual tokens to an image",
        assumed=(f"images of {side} x {side} pixels", f"prompts of {words[0]} and {words[1]} words", *length.assumed),
    )  # fmt: skip


def _prepared(config: Any, folder: Path, source: Path, *, precision: str) -> Any:
    """Return the config of the rehearsal: a folder of its own, and records of images that are never read."""
    for name in ("winner", "loser"):
        (folder / f"{name}.png").write_bytes(b"never read")
    counts = {"train": config.microbatch_size * config.accumulation_steps, "validation": 2 * config.microbatch_size}
    for name, count in counts.items():
        lines = [_row(i, config.loss, words=_num_words(source)[i % 2]) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return config.with_options(
        dry_run=False, backbone=str(source), mixed_precision="no" if precision == "no" else "bf16",
        train_data=str(folder / "train.jsonl"), validation_data=str(folder / "validation.jsonl"), test_data=None,
        data_weights=None, hard_negatives=0.0, image_root=None, image_prefix=None, streaming=False, num_workers=0,
        num_steps=2, quantization=None, trackers="", run_folder=str(folder / "run"), resume=False,
    )  # fmt: skip


def prompt_of(words: int) -> str:
    """Return a prompt of so many words."""
    return " ".join(islice(cycle(_WORDS), words))


def _row(index: int, loss: str, *, words: int) -> str:
    prompt = prompt_of(words)
    if loss == "cross_entropy":
        return json.dumps({"prompt": prompt, "image": "winner.png", "label": index % 2})
    return json.dumps({"prompt": prompt, "winner": "winner.png", "loser": "loser.png"})


def _num_words(source: Path) -> tuple[int, int]:
    """Return the words of the prompts of a batch in turn, so that a half of its rows are padded, as in data."""
    longest = min(_LONGEST, most_tokens(str(source)) // 8)
    return longest, longest // 2


def _parts_of(model: RewardModel, *, saved: int | float) -> dict[str, tuple[int, int, int | float]]:
    """Return the trained parameters, frozen parameters and bytes of each part of a reward model.

    Quantisation saves so many bytes of its language model.
    """
    groups = {_NAMES[name]: list(named.values()) for name, named in model.groups(model.active).items()}
    own = {id(parameter) for parameters in groups.values() for parameter in parameters}
    head = getattr(model.model, "lm_head", None)
    words: list[nn.Parameter] = [*model.backbone.language_model.parameters(), *(head.parameters() if head else ())]
    language = list({id(p): p for p in words if id(p) not in own}.values())
    known = own | {id(parameter) for parameter in language}
    tower = [p for p in model.model.parameters() if id(p) not in known]
    return {
        name: (
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters if not p.requires_grad),
            sum(p.nbytes for p in parameters) - (saved if name == "language model" else 0),
        )
        for name, parameters in {"vision tower": tower, "language model": language, **groups}.items()
    }


def _state_of(held: Memory) -> dict[str, int | float]:
    named = {"gradients": held.gradients, "optimizer": held.moments + held.master, "buffers": held.buffers}
    return {name: value for name, value in named.items() if value}


def _peaks(tracker: Tracker, held: Memory, single: Memory, *, saved: int | float) -> dict[str, int | float]:
    """Return the peak of each phase on one of several processes, from that of a single one."""
    always = held.persistent - single.persistent - saved
    exchanged = held.gradients + held.buffers - held.persistent_buffers - single.gradients
    more = {"update": always + exchanged + held.gathered, "validation": always + held.gathered}
    return {phase: counts.peak + more.get(phase, always) for phase, counts in tracker.counts.items()}


def _left_out(mode: Mode, precision: str) -> tuple[str, ...]:
    notes = ["the evaluation at the end", "memory inside of kernels"]
    if mode.startswith("zero") and precision != "no":
        notes.append("what DeepSpeed saves by trained weights in half precision")
    if precision == "fp16":
        notes.append("what fp16 adds to bf16 with a backbone in float32, as which it is planned")
    return tuple(notes)
