"""Run one step of a recipe without weights, and plan its memory, its cost and its hours."""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_t2i.distributed.memory import FLOAT32, Layout, memory_of
from rlhf_t2i.distributed.placement import layout_of
from rlhf_t2i.distributed.processes import Mode
from rlhf_t2i.models.table import family_entry
from rlhf_t2i.models.without_weights import architecture_of, build_without_weights
from rlhf_t2i.passed import PassedObjects, passing
from rlhf_t2i.plan.rewards import bytes_of_rewards, is_offloaded
from rlhf_t2i.plan.stand_ins import Rehearsal, StepFinished, stand_in_reward
from rlhf_t2i.plan.tracker import Tracker
from rlhf_t2i.plan.types import Plan, bytes_of, bytes_saved, launched, without_launcher
from rlhf_t2i.rewards.terms import reward_names_of
from rlhf_t2i.training.setup import NUM_MOMENTS


def rehearse(
    main: Callable[[Any], Any], config: Any, *, fake: bool = True, on_gpu: bool = True, repeats: bool = False
) -> Plan:
    """Run one step of a recipe's `main`, on fake tensors or on zeros, and return what it needs.

    With `on_gpu` the optimiser steps as on a GPU. Work that a step repeats on tensors of the same shapes runs once or
    twice and is counted as often as it would run, unless `repeats`. Raises ValueError for options that do not fit the
    model, as the recipe does, and for a model whose configs are unknown.
    """
    return rehearsed(main, config, fake=fake, on_gpu=on_gpu, repeats=repeats)(config)


def rehearsed(
    main: Callable[[Any], Any], config: Any, *, fake: bool = True, on_gpu: bool = True, repeats: bool = False
) -> Callable[[Any], Plan]:
    """Run one step as `rehearse` does; return a function that plans it for the config or a similar one.

    That may have another quantization, offload_text_encoders and cache_embeddings, and other arguments of its rewards:
    they are computed, not run.
    """
    mode, processes = launched(os.environ)
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    tracker = Tracker(FakeTensorMode(allow_non_fake_inputs=True) if fake else None)
    rehearsal = Rehearsal(tracker, processes, config, on_gpu, repeats)
    architecture = architecture_of(config.model)
    with without_launcher(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), tracker:
        warnings.simplefilter("ignore")
        whole = not getattr(config, "trains_lora", True)
        pipeline = build_without_weights(
            architecture, dtype=dtype, denoiser_dtype=torch.float32 if whole else dtype, empty=tracker.empty
        )
        host = sum(bytes_of(part) for part in pipeline.components.values() if isinstance(part, nn.Module))
        rewards = dict.fromkeys(_rewards_of(config), stand_in_reward)
        objects = PassedObjects({config.model: pipeline}, {}, rewards)
        with rehearsal.replacing(), passing(objects), suppress(StepFinished):
            main(_prepared(config, Path(folder), dtype))
        return partial(_planned, rehearsal, pipeline, main, mode, host, precision)


def _prepared(config: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Return the config of the rehearsal: a folder of its own, and pairs of one image where files are missing."""
    options: dict[str, Any] = {
        "dry_run": False, "run_folder": str(folder / "run"), "resume": False, "quantization": None, "save_pairs": False,
        "cache_embeddings": None, "compile": False,
        "mixed_precision": "no" if dtype == torch.float32 else "bf16",
    }  # fmt: skip
    given = {option: value for option, value in options.items() if hasattr(config, option)}
    if getattr(config, "optimizer", None) == "adamw_8bit":  # it computes outside of torch
        given["optimizer"] = "adamw"
    if getattr(config, "pairs", None) and not getattr(config, "samples_pairs", False):
        given |= {"pairs": str(_one_pair(folder)), "cache_folder": None}
    return config.with_options(**given)


def _one_pair(folder: Path) -> Path:
    from PIL import Image

    for name in ("winner", "loser"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    path = folder / "pairs.jsonl"
    path.write_text('{"prompt": "a fox", "winner": "winner.png", "loser": "loser.png"}\n', encoding="utf-8")
    return path


def _rewards_of(config: Any) -> list[str]:
    named = [getattr(config, name, None) for name in ("rewards", "evaluation_rewards", "veto")]
    return [name for text in named if text for name in reward_names_of(text)]


def _planned(
    rehearsal: Rehearsal, pipeline: Any, main: Callable[[Any], Any], mode: Mode, host: int | float, precision: str,
    config: Any,
) -> Plan:  # fmt: skip
    tracker, policy = rehearsal.tracker, rehearsal.policy
    parts = {
        name: (
            sum(p.numel() for p in part.parameters() if p.requires_grad),
            sum(p.numel() for p in part.parameters() if not p.requires_grad),
            bytes_of(part),
        )
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }
    saved = {name: _saved_by(config.quantization, pipeline, name) for name in parts}
    sizes = {name: size - saved[name] for name, (_, _, size) in parts.items()}
    trainer = rehearsal.trainer
    layout = Layout(mode="single", processes=1, trainable=0)
    if trainer is not None:
        layout = layout_of(
            policy.network, mode, processes=rehearsal.processes, num_averages=_num_averages(trainer),
            reference=policy.reference is not None, num_moments=NUM_MOMENTS[config.optimizer],
        )  # fmt: skip
    own, single = memory_of(layout), memory_of(replace(layout, mode="single", processes=1))
    names, recipe = _rewards_of(config), Path(inspect.getfile(main)).stem
    rewards, unknown = bytes_of_rewards(names)
    held = own.persistent - single.persistent - sum(saved.values()) + rewards - _saved_by_8_bit_moments(config, layout)
    more = {
        "rollout": held + own.gathered_for_sampling,
        "update": held + own.gradients + own.buffers - own.persistent_buffers + own.gathered - single.gradients,
    }
    if trainer is not None and config.cache_embeddings:  # prompts are encoded before there is a denoiser to train
        more["encode"] = rewards - sum(saved.values()) + saved[policy.component] - single.persistent
    only_in: dict[str, int | float] = {}
    if getattr(config, "offload_text_encoders", False) or getattr(config, "cache_embeddings", None):
        only_in["encode"] = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    if "reward" in tracker.counts and recipe != "draft":  # whose backward pass needs the reward's weights
        only_in["reward"] = bytes_of_rewards(filter(is_offloaded, names))[0]
    peaks = {
        phase: counts.peak + more.get(phase, held) - sum(size for other, size in only_in.items() if other != phase)
        for phase, counts in tracker.counts.items()
        if counts.peak
    }
    return Plan(
        recipe=recipe, model=config.model,
        module=family_entry(type(pipeline).__name__).module, mode=mode, processes=rehearsal.processes,
        parts={name: (learned, frozen, sizes[name]) for name, (learned, frozen, _) in parts.items()},
        state=_state_of(rehearsal, own) | ({"rewards": rewards} if rewards else {}), peaks=peaks,
        counts=dict(tracker.counts),
        denoiser_calls=rehearsal.total.denoiser_calls, images=rehearsal.images, num_steps=rehearsal.num_steps,
        host=host - sum(saved.values()), left_out=_left_out(config, precision, unknown),
    )  # fmt: skip


def _num_averages(trainer: Any) -> int:
    return sum(1 for average in trainer.averages.values() if average.average is not trainer.engine.weights)


def _state_of(rehearsal: Rehearsal, own: Any) -> dict[str, int | float]:
    if rehearsal.trainer is None:
        return {}
    named = {
        "gradients": own.gradients, "optimizer": own.moments + own.master, "averages": own.averages,
        "reference": own.reference, "buffers": own.buffers,
    }  # fmt: skip
    return {name: value for name, value in named.items() if value}


def _left_out(config: Any, precision: str, unknown: list[str]) -> tuple[str, ...]:
    notes = ["scoring by the rewards"] if _rewards_of(config) else []
    if unknown:
        notes.append(f"weights of rewards whose size is not known here ({', '.join(unknown)})")
    if hasattr(config, "num_evaluation_images"):
        notes.append("evaluations")
    if precision == "fp16":
        notes.append("what fp16 keeps in float32 (planned as bf16)")
    return tuple(notes)


def _saved_by_8_bit_moments(config: Any, layout: Layout) -> int | float:
    """Return the bytes of moments that AdamW in 8 bits does not have, since the rehearsal's optimiser is AdamW."""
    if getattr(config, "optimizer", None) != "adamw_8bit":
        return 0
    return FLOAT32 * layout.trainable * (NUM_MOMENTS["adamw"] - NUM_MOMENTS["adamw_8bit"])


def _saved_by(quantization: str | None, pipeline: Any, name: str) -> int | float:
    """Return the bytes that 8 or 4 bits save of a part's linear layers in half precision."""
    if quantization is None or not (name.startswith("text_encoder") or name in ("unet", "transformer")):
        return 0.0
    return bytes_saved(quantization, getattr(pipeline, name))
