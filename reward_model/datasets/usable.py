"""Checks of records that need their images: can each be decoded, and can a backbone take it with its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from reward_model.datasets.convert import write_skipped
from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.images import flaw_of_image
from reward_model.datasets.table import RecordTable
from reward_model.image_files import MAX_PIXELS, upright_size
from reward_model.stored_images import ImageSource, StoredImage, read_bytes
from reward_model.types import Backbone, PreferencePair, Record


def usable_records(
    records: Sequence[Record],
    backbone: Backbone | None = None,
    *,
    skipped: Path | None,
    max_pixels: int = MAX_PIXELS,
) -> RecordTable:
    """Return the records whose images can be decoded and, with their prompts, be taken by a backbone if there is one.

    Every image is opened, so this is for data that are about to be scored. Other records are written to the file
    `skipped` if there is one; without, the first one raises BadRecordError.
    """
    table, good = RecordTable.of(records), list[int]()
    flaw_of = flaw_finder(backbone, max_pixels=max_pixels)
    for row, record in enumerate(table):
        flaw = flaw_of(record)
        if flaw is None:
            good.append(row)
        elif skipped is None:
            raise BadRecordError(f"{record.where}: {flaw}")
        else:
            write_skipped(skipped, where=record.where, reason=flaw)
    return table if len(good) == len(table) else table.select(np.array(good, np.int64))


def flaw_finder(backbone: Backbone | None, *, max_pixels: int = MAX_PIXELS) -> Callable[[Record], str | None]:
    """Return a function that returns why a record cannot be used, or None; images that recur are opened once."""
    of_image = lru_cache(maxsize=100_000)(lambda image: flaw_of_image(image, max_pixels=max_pixels))
    size_of = lru_cache(maxsize=100_000)(upright_size)

    def flaw_of(record: Record) -> str | None:
        for image, prompt in inputs_of(record):
            flaw = of_image(image)
            if flaw is None and backbone is not None:
                flaw = flaw_of_input(backbone, size_of(image), prompt)
            if flaw is not None:
                return flaw
        return flaw_of_equal_sides(record)

    return flaw_of


def flaw_of_equal_sides(record: Record) -> str | None:
    """Return that both sides are equal, if they are: images within data files, of which only the content tells."""
    if not isinstance(record, PreferencePair) or record.winner_prompt != record.loser_prompt:
        return None
    winner, loser = record.winner, record.loser
    if not (isinstance(winner, StoredImage) and isinstance(loser, StoredImage)):
        return None
    if winner != loser and (winner.column or winner.size == loser.size) and read_bytes(winner) == read_bytes(loser):
        return f"the images {winner} and {loser} are equal; a pair must differ in the image or in the prompt."
    return None


def flaw_of_input(backbone: Backbone, size: tuple[int, int], prompt: str) -> str | None:
    """Return why a backbone cannot take an image of this height and width with its prompt; None if it can."""
    try:
        num_tokens = backbone.num_visual_tokens(*size)
    except ValueError as error:
        return f"an image of {size[1]} x {size[0]} pixels: {error}"
    try:
        backbone.prompt_tokenizer.ids(prompt, num_tokens)
    except ValueError as error:
        return str(error)
    return None


def skipped_records(folder: Path) -> str:
    """Return a line on how many records all processes have skipped, and where they are written."""
    files = sorted(folder.glob("skipped*.jsonl"))
    count = sum(len(file.read_bytes().splitlines()) for file in files)
    return f"{count:,} records were skipped; see {', '.join(map(str, files))}" if count else "no record was skipped"


def inputs_of(record: Record) -> Iterator[tuple[ImageSource, str]]:
    """Yield each image of a record with its prompt."""
    if isinstance(record, PreferencePair):
        yield record.winner, record.winner_prompt
        yield record.loser, record.loser_prompt
    else:
        yield record.image, record.prompt
