"""The table of data formats, and the parsing of FORMAT:PATH. FORMAT: may be omitted for the project's own format."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

from reward_model.datasets import image_reward_db, richhf
from reward_model.datasets.hpdv2 import hpdv2_record
from reward_model.datasets.hpdv3 import hpdv3_record
from reward_model.datasets.image_folder import folder_record
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

ConvertRecord = Callable[..., list[Record]]
"""Converts the fields of one raw record, with `find_image` and `where` as keywords, to records."""


class Format(NamedTuple):
    """One data format: how raw records become records."""

    name: str
    convert: ConvertRecord
    group: Callable[[Iterable[RawRecord]], Iterator[RawRecord]] = iter
    """Merges consecutive raw records that belong together, where a format spreads a prompt over several rows."""
    skip_columns: frozenset[str] = frozenset()
    """Large columns that are not used and therefore not loaded."""


def parse_source(source: str) -> tuple[Format, str]:
    """Return the format and the path of FORMAT:PATH. Raises ValueError for an unknown format.

    The path may have a protocol, as s3://bucket/x.jsonl. Without a format, a .json file is in LLaVA-Reward's format and
    everything else in the project's own.
    """
    found = re.fullmatch(r"([a-z][a-z0-9_]+)(?:/([a-z]+))?(?:=([^:]*))?:(.+)", source, flags=re.DOTALL)
    is_path = found is None or found[1] == "hf" or found[4].startswith("//") or Path(source).exists()
    if found is None or is_path:
        return _format("llava_reward" if Path(source).suffix == ".json" else "own", None, None), source
    name, part, threshold, path = found.groups()
    return _format(name, part, threshold), path


def source_name(source: str) -> str:
    """Return a short name of a source for tables and file names: FORMAT-STEM, or STEM without a format."""
    form, path = parse_source(source)
    stem = Path(path).stem
    return stem if path == source else f"{form.name.replace('/', '-')}-{stem}"


def _format(name: str, part: str | None, threshold: str | None) -> Format:
    full = name if part is None else f"{name}/{part}"
    match name, part, threshold:
        case "own", None, None:
            return Format(full, own_record)
        case "llava_reward", None, None:
            return Format(full, llava_reward_record)
        case "image_reward_db", ("alignment" | "fidelity" | "overall" | "rank") as perspective, None:
            convert = partial(image_reward_db.image_reward_record, perspective=perspective)
            return Format(full, convert, image_reward_db.group_by_prompt)
        case "pick_a_pic", None, None:
            return Format(full, pick_a_pic_record)
        case "hpdv2", None, None:
            return Format(full, hpdv2_record)
        case "hpdv3", None, None:
            return Format(full, hpdv3_record)
        case "unsafe_bench", None, None:
            return Format(full, unsafe_bench_record)
        case "richhf", ("alignment" | "artifact" | "overall" | "aesthetics") as score, str():
            convert = partial(richhf.richhf_record, score=score, threshold=_parse_threshold(threshold, full))
            return Format(full, convert, skip_columns=richhf.MAPS)
        case "image_folder", None, None:
            return Format(full, folder_record)
        case _:
            given = full if threshold is None else f"{full}={threshold}"
            close = difflib.get_close_matches(given, FORMATS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"{given} is not a data format.{hint} Formats are {', '.join(FORMATS)}.")


def _parse_threshold(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"The threshold of {name}={text} is not a finite number; images with at least that score get label 1."
        )
    return number
