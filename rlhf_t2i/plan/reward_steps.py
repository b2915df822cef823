"""How long a reward training takes and what it validates on, as far as its data are here to be counted."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from reward_model.datasets import load_records
from reward_model.datasets.formats import parse_source
from rlhf_t2i.settings.lists import names
from rlhf_t2i.shapes.names import TOY_PAIRS, toy_pairs_folder

UNKNOWN_STEPS = 1000
"""Optimiser steps whose hours are planned if their number is unknown."""


class Length(NamedTuple):
    """Optimiser steps, and the records of each validation."""

    num_steps: int
    validation: int
    assumed: tuple[str, ...]


def training_length(config: Any, *, processes: int) -> Length:
    """Return the steps that the options of reward training ask for, as transformers' Trainer counts them.

    They are approximate where the training itself holds out validation records, by prompt. Raises what `load_records`
    raises for files that are here.
    """
    training_files, validation_files = _data_files(config)
    training, validation = _count(config, training_files), _count(config, validation_files)
    if training is not None and not validation_files:
        validation = round(config.validation_fraction * training)
        training -= validation
    checked = min(config.max_validation_records, validation or config.max_validation_records)
    assumed = (f"{checked:,} records in each validation",) if validation is None else ()
    if config.num_steps is not None:
        return Length(config.num_steps, checked, assumed)
    if training is None:
        missing = f"{config.train_data} is not here to be counted, so the hours are those of {UNKNOWN_STEPS:,} steps"
        return Length(UNKNOWN_STEPS, checked, (*assumed, missing))
    training += round(config.hard_negatives * training)
    batches = math.ceil(training / (config.microbatch_size * processes))
    steps = math.ceil(config.num_epochs * math.ceil(batches / config.accumulation_steps))
    return Length(steps, checked, (*assumed, f"about {training:,} records to train on"))


def _data_files(config: Any) -> tuple[list[str], list[str]]:
    """Return the training and the validation files; the toy pairs have both."""
    validation = names(config.validation_data or "")
    if config.train_data != TOY_PAIRS:
        return names(config.train_data), validation
    folder = toy_pairs_folder(config.seed)
    training = [str(folder / f"train_{kind}.jsonl") for kind in ("drawn", "generated")]
    return training, validation or [str(folder / "validation.jsonl")]


def _count(config: Any, sources: list[str]) -> int | None:
    """Return the records of all sources; None if there are none, or if one of them is not on this machine."""
    if not sources or not all(Path(parse_source(source)[1]).exists() for source in sources):
        return None
    tables = [
        load_records(
            source, image_root=config.image_root, image_prefix=config.image_prefix,
            on_bad_record=config.on_bad_record, skipped=Path(os.devnull),
        )
        for source in sources
    ]  # fmt: skip
    return sum(map(len, tables))
