"""Tiny data sets in each published format, with images that differ in their colour."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from reward_model.datasets import load_records
from reward_model.datasets.table import RecordTable
from reward_model.datasets.tfrecord import masked_crc32c
from reward_model.datasets.usable import usable_records
from reward_model.image_files import MAX_PIXELS, open_image
from reward_model.stored_images import ImageSource
from reward_model.types import LabelledImage, PreferencePair, Record

FOX, CAT = "a red fox", "two cats on a sofa"
COLOURS = ("red", "green", "blue", "white")


def encoded_image(colour: str, kind: str = "JPEG") -> bytes:
    """Return the bytes of an image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind, quality=95)
    return buffer.getvalue()


def write_images(folder: Path) -> None:
    """Write red.jpg, green.jpg, blue.jpg and white.jpg."""
    for colour in COLOURS:
        (folder / f"{colour}.jpg").write_bytes(encoded_image(colour))


def write_all_images(folder: Path) -> None:
    """Write the images at the paths of the rows below."""
    for name in ("", "images", "train", "images/train/train_1"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_images(folder / name)


def load_checked(
    source: str | Path,
    *,
    on_bad_record: Literal["error", "skip"] = "error",
    skipped: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> RecordTable:
    """Load records and decode all of their images, as a check does."""
    records = load_records(source, on_bad_record=on_bad_record, skipped=skipped, **options)
    log = skipped if on_bad_record == "skip" else None
    return usable_records(records, skipped=log, max_pixels=max_pixels)


def colour_of(source: ImageSource) -> str:
    """Return the colour of an image, one of COLOURS."""
    with open_image(source) as image:
        colour = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert isinstance(colour, tuple)
    wanted = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    return min(wanted, key=lambda name: sum(abs(a - b) for a, b in zip(colour, wanted[name], strict=True)))


def as_rows(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    """Return records as (winner, loser, prompt, tie, gap) or (image, prompt, label), with colours for images."""
    rows: list[tuple[Any, ...]] = []
    for record in records:
        if isinstance(record, LabelledImage):
            rows.append((colour_of(record.image), record.prompt, record.label))
        else:
            assert isinstance(record, PreferencePair)
            assert record.winner_prompt == record.loser_prompt
            colours = colour_of(record.winner), colour_of(record.loser)
            rows.append((*colours, record.winner_prompt, record.tie, record.rating_gap))
    return rows


def image_reward_rows(key: str = "image_path") -> list[dict[str, Any]]:
    """Return rows of three images of a fox, and of two of cats that differ in fidelity only."""
    prompts = {"000904-0035": (FOX, 3), "001324-0093": (CAT, 2)}
    table = [  # prompt, image, rank, overall, alignment, fidelity
        ("000904-0035", "red", 1, 7, 7, 4),
        ("000904-0035", "green", 2, 5, 7, 6),
        ("000904-0035", "blue", 2, 4, 2, 5),
        ("001324-0093", "red", 1, 3, 4, 2),
        ("001324-0093", "white", 1, 3, 4, 7),
    ]
    return [
        {
            key: f"images/train/train_1/{colour}.jpg", "prompt_id": prompt_id, "prompt": prompts[prompt_id][0],
            "classification": "Animals", "image_amount_in_total": prompts[prompt_id][1], "rank": rank,
            "overall_rating": overall, "image_text_alignment_rating": alignment, "fidelity_rating": fidelity,
        }
        for prompt_id, colour, rank, overall, alignment, fidelity in table
    ]  # fmt: skip


def pick_a_pic_rows() -> list[dict[str, Any]]:
    """Return rows in which the first wins, the second wins, a tie, one without a label, one of equal images."""
    labels = [(1.0, 0.0, True, True), (0.0, 1.0, True, True), (0.5, 0.5, True, True), (0.5, 0.5, False, True)]
    labels.append((0.5, 0.5, True, False))
    return [
        {
            "are_different": different, "best_image_uid": "x", "caption": FOX, "created_at": datetime(2023, 1, 1),
            "has_label": has_label, "image_0_uid": "x", "image_0_url": "http://x", "image_1_uid": "y",
            "image_1_url": "http://y", "jpg_0": encoded_image("red"), "jpg_1": encoded_image("blue"), "label_0": first,
            "label_1": second, "model_0": "SDXL", "model_1": "SDXL", "ranking_id": i, "user_id": 7,
            "num_example_per_prompt": 5, "__index_level_0__": i,
        }
        for i, (first, second, has_label, different) in enumerate(labels)
    ]  # fmt: skip


def write_pick_a_pic(path: Path, rows: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write a table with times in nanoseconds, as published."""
    table = pa.Table.from_pylist([dict(row) for row in rows or pick_a_pic_rows()])
    column = table.schema.get_field_index("created_at")
    pq.write_table(table.set_column(column, "created_at", table["created_at"].cast(pa.timestamp("ns"))), path)
    return path


HPDV2_TRAIN = [
    {"human_preference": [1, 0], "prompt": FOX, "file_path": ["red.jpg", "green.jpg"]},
    {"human_preference": [0, 1], "prompt": CAT, "file_path": ["red.jpg", "green.jpg"], "user_hash": "x"},
]
HPDV2_TEST = [
    {
        "prompt": FOX, "image_path": ["red.jpg", "green.jpg", "blue.jpg"], "rank": [2, 1, 2],
        "raw_annotations": [{"rank": [2, 1, 3], "user_hash": "x"}],
    },
]  # fmt: skip
HPDV3 = [
    {
        "prompt": FOX, "path1": "images/red.jpg", "path2": "images/green.jpg", "confidence": 0.97,
        "choice_dist": [17, 2], "model1": "flux", "model2": "real_images",
    },
    {"prompt": CAT, "path1": "images/blue.jpg", "path2": "images/red.jpg", "confidence": None},
    {"prompt": CAT, "path1": "images/blue.jpg", "path2": "images/green.jpg", "confidence": "null"},
]  # fmt: skip
UNSAFEBENCH = [
    {"image": {"bytes": encoded_image("red"), "path": None}, "safety_label": "Unsafe", "category": "Shocking",
     "source": "Lexica", "text": FOX},
    {"image": {"bytes": encoded_image("green"), "path": "x.png"}, "safety_label": "Safe", "category": "None",
     "source": "Laion5B", "text": None},
]  # fmt: skip
RICHHF = [
    {"filename": "train/red.jpg", "artifact_score": 0.75, "misalignment_score": 0.25, "overall_score": 0.5,
     "aesthetics_score": 1.0},
    {"filename": "train/green.jpg", "artifact_score": 0.25, "misalignment_score": 0.75, "overall_score": 0.5,
     "aesthetics_score": 0.0},
]  # fmt: skip


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def write_json(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


# --- TFRecord -----------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """Encode an integer with seven bits a byte, the lowest first."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(value: object, *, packed: bool = True) -> bytes:
    match value:
        case str():
            return field(1, field(1, value.encode()))
        case bytes():
            return field(1, field(1, value))
        case float():
            bits = struct.pack("<f", value)
            return field(2, field(1, bits) if packed else varint(1 << 3 | 5) + bits)
        case int():
            bits = varint(value & (1 << 64) - 1)
            return field(3, field(1, bits) if packed else varint(1 << 3) + bits)
        case _:
            raise TypeError(type(value))


def example(fields: Mapping[str, object], *, packed: bool = True) -> bytes:
    entries = [field(1, name.encode()) + field(2, feature(value, packed=packed)) for name, value in fields.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def framed(data: bytes) -> bytes:
    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", masked_crc32c(head)) + data + struct.pack("<I", masked_crc32c(data))


def write_tfrecord(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_bytes(b"".join(framed(example(row)) for row in rows))
    return path


def red_and_blue_pairs(folder: Path) -> Path:
    """Write a preference file: red images are preferred to blue ones; each pair has another size."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(6):
        images = torch.rand(2, 20 + number, 16, 3, generator=generator) / 3
        images[0, ..., 0] += 0.6
        images[1, ..., 2] += 0.6
        for image, name in zip(images, ("winner", "loser"), strict=True):
            pixels = (image * 255).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{name}_{number}.png")
        prompt = ("a red circle", "a blue square", "a green star")[number % 3]
        lines.append({"prompt": prompt, "winner": f"winner_{number}.png", "loser": f"loser_{number}.png"})
    path = folder / "preferences.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path
