"""Which format data have, and where they lie: FORMAT:PLACE, in which FORMAT: may be left out for our own files."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from reward_model.datasets import image_reward_db, richhf
from reward_model.datasets.hpdv2 import hpdv2_record
from reward_model.datasets.hpdv3 import hpdv3_record
from reward_model.datasets.image_folder import folder_record
from reward_model.datasets.images import FindImage
from reward_model.datasets.llava_reward import llava_reward_record
from reward_model.datasets.own import own_record
from reward_model.datasets.pick_a_pic import pick_a_pic_record
from reward_model.datasets.raw_records import RawRecord
from reward_model.datasets.unsafe_bench import unsafe_bench_record
from reward_model.types import Record

FORMATS = (
    "own",
    "llava_reward",
    *(f"image_reward_db/{name}" for name in get_args(image_reward_db.Perspective)),
    *("pick_a_pic", "hpdv2", "hpdv3", "unsafe_bench"),
    *(f"richhf/{name}=THRESHOLD" for name in get_args(richhf.Score)),
    "image_folder",
)


Reader = Callable[..., list[Record]]
"""From the fields of a row, with `find_image` and `where` as keywords, to what they say."""


class Format(NamedTuple):
    """How the rows of a data set are understood."""

    name: str
    read: Reader
    gather: Callable[[Iterable[RawRecord]], Iterator[RawRecord]] = iter
    """Puts together what belongs to one row, if several were published."""
    skip_columns: frozenset[str] = frozenset()
    """Columns too large to be read for nothing."""


def parse_source(source: str) -> tuple[Format, str]:
    """The format and the place of FORMAT:PLACE. ValueError for a format that does not exist.

    Without a format, a file .json is one of LLaVA-Reward's, and everything else our own.
    """
    found = re.fullmatch(r"([a-z][a-z0-9_]+)(?:/([a-z]+))?(?:=([^:]*))?:(.+)", source, flags=re.DOTALL)
    if found is None or found[1] == "hf" or Path(source).exists():
        return _format("llava_reward" if Path(source).suffix == ".json" else "own", None, None), source
    name, part, threshold, place = found.groups()
    return _format(name, part, threshold), place


def source_name(source: str) -> str:
    """A short name for tables and files: that of the place, behind the format if one is given."""
    form, place = parse_source(source)
    stem = Path(place).stem
    return stem if place == source else f"{form.name.replace('/', '-')}-{stem}"


def _format(name: str, part: str | None, threshold: str | None) -> Format:
    full = name if part is None else f"{name}/{part}"
    match name, part, threshold:
        case "own", None, None:
            return Format(full, _one(own_record))
        case "llava_reward", None, None:
            return Format(full, _one(llava_reward_record))
        case "image_reward_db", ("alignment" | "fidelity" | "overall" | "rank") as perspective, None:
            read = partial(image_reward_db.image_reward_record, perspective=perspective)
            return Format(full, read, image_reward_db.by_prompt)
        case "pick_a_pic", None, None:
            return Format(full, pick_a_pic_record)
        case "hpdv2", None, None:
            return Format(full, hpdv2_record)
        case "hpdv3", None, None:
            return Format(full, hpdv3_record)
        case "unsafe_bench", None, None:
            return Format(full, unsafe_bench_record)
        case "richhf", ("alignment" | "artifact" | "overall" | "aesthetics") as score, str():
            read = partial(richhf.richhf_record, score=score, threshold=_number(threshold, full))
            return Format(full, read, skip_columns=richhf.MAPS)
        case "image_folder", None, None:
            return Format(full, folder_record)
        case _:
            given = full if threshold is None else f"{full}={threshold}"
            close = difflib.get_close_matches(given, FORMATS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"{given}: is no format of data.{hint} Possible are {', '.join(FORMATS)}.")


def _one(read: Callable[..., Record]) -> Reader:
    def read_one(fields: Mapping[str, Any], *, find_image: FindImage, where: str) -> list[Record]:
        return [read(fields, find_image=find_image, where=where)]

    return read_one


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"The threshold of {name}={text} is no number; a score of at least that much is good.")
    return number
