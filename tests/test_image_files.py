"""Image files of strangers: odd metadata, formats of outside programs, and sizes that a backbone cannot take."""

from __future__ import annotations

import io
import json
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from reward_model.datasets import BadRecordError
from reward_model.datasets.usable import usable_records
from reward_model.image_files import upright_size
from reward_model.images import to_tensor
from reward_model.types import PreferencePair
from tests.preference_files import load_checked
from tests.reward_models import backbone_of

ORIENTATION, X_RESOLUTION, SHORT, RATIONAL, SIGNED_RATIONAL, ASCII = 0x0112, 0x011A, 3, 5, 10, 2


def write_photograph(path: Path, exif: bytes) -> None:
    """Write a JPEG of 64 x 48 pixels, red on the left and blue on the right, with this EXIF."""
    image = Image.new("RGB", (64, 48), "red")
    image.paste("blue", (32, 0, 64, 48))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=95)
    jpeg = content.getvalue()
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])


def exif_of(*entries: tuple[int, int, bytes], values: bytes = b"") -> bytes:
    """EXIF of entries (tag, type, 4 bytes of a value or of its offset), with `values` behind them."""
    table = b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + values


TURNED = (ORIENTATION, SHORT, struct.pack("<HH", 6, 0))
ODD = {
    "a ratio that cannot be written": exif_of(
        TURNED, (X_RESOLUTION, SIGNED_RATIONAL, struct.pack("<I", 38)), values=struct.pack("<ii", -1, 0)
    ),
    "a ratio behind the end": exif_of(TURNED, (X_RESOLUTION, RATIONAL, struct.pack("<I", 60_000))),
    "a text in place of a number": exif_of(TURNED, (X_RESOLUTION, ASCII, b"abc\0")),
}


@pytest.mark.parametrize("exif", ODD.values(), ids=ODD)
def test_odd_metadata_do_not_keep_a_photograph_from_being_turned(tmp_path: Path, exif: bytes) -> None:
    write_photograph(tmp_path / "turned.jpg", exif)
    pixels = to_tensor(tmp_path / "turned.jpg")
    assert pixels.shape == (3, 64, 48)
    assert pixels[0, :28].mean() > 0.9  # what was on the left is on top
    assert upright_size(tmp_path / "turned.jpg") == (64, 48)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "image": "turned.jpg", "label": 1}')
    assert len(load_checked(tmp_path / "x.jsonl")) == 1


@pytest.mark.parametrize(
    "exif",
    [
        exif_of((ORIENTATION, SHORT, struct.pack("<HH", 77, 0))),
        exif_of((ORIENTATION, ASCII, b"abc\0")),
        exif_of(TURNED)[:20],
        b"Exif\0\0II*\0" + struct.pack("<I", 2**31),
        b"Exif\0\0nothing",
    ],
    ids=["an unknown orientation", "a text", "cut off", "an offset far away", "no EXIF"],
)
def test_an_image_without_a_readable_orientation_is_upright(tmp_path: Path, exif: bytes) -> None:
    write_photograph(tmp_path / "x.jpg", exif)
    assert to_tensor(tmp_path / "x.jpg").shape == (3, 48, 64)
    assert upright_size(tmp_path / "x.jpg") == (48, 64)


def test_any_error_of_a_decoder_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "tobytes", lambda *_: struct.unpack("<I", b""))
    with pytest.raises(ValueError, match=r"x\.png' is no image that can be read: unpack requires"):
        to_tensor(tmp_path / "x.png")


def test_postscript_is_refused_by_name_and_no_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    (tmp_path / "ps.png").write_text(script)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "image": "ps.png", "label": 1}')
    with pytest.raises(BadRecordError, match=r"x\.jsonl:1: the image '.*ps\.png'.* cannot identify image file"):
        load_checked(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"ps\.png' is no image that can be read: cannot identify image file"):
        to_tensor(tmp_path / "ps.png")


@pytest.mark.parametrize(("family", "reason"), [("qwen2_5_vl", ".*ratio"), ("llava", "its short side .* 200 times")])
def test_what_a_backbone_cannot_take_is_found_before_training(family: str, reason: str, tmp_path: Path) -> None:
    """Images that are over 200 times as wide as high, and prompts that are too long beside their image."""
    for name, size in (("good", (64, 48)), ("line", (603, 3))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    good, line = tmp_path / "good.png", tmp_path / "line.png"
    records = [
        PreferencePair(good, line, "a fox", "a fox", where="x:1"),
        PreferencePair(good, good, "a fox", "a hen", where="x:2"),
        PreferencePair(good, good, "a fox", "fox " * 40_000, where="x:3"),
    ]
    backbone = backbone_of(family)
    with pytest.raises(BadRecordError, match=rf"x:1: an image of 603 x 3 pixels: {reason}"):
        usable_records(records, backbone, skipped=None)
    assert usable_records(records, backbone, skipped=tmp_path / "skipped") == records[1:2]
    skipped = [json.loads(row) for row in (tmp_path / "skipped").read_text().splitlines()]
    assert [row["where"] for row in skipped] == ["x:1", "x:3"]
    assert "tokens" in skipped[1]["reason"]


@pytest.mark.parametrize("size", [(30, 40), (400, 300), (28, 28), (1000, 30)])
@pytest.mark.parametrize("family", ["llava", "llava_next", "phi3_v", "qwen2_5_vl"])
def test_the_number_of_visual_tokens_is_that_of_the_inputs(family: str, size: tuple[int, int]) -> None:
    backbone = backbone_of(family)
    inputs = backbone.prepare([torch.zeros(3, *size)], ["a fox"])
    count = int((inputs["input_ids"] == backbone.prompt_tokenizer.image_token_id).sum())
    assert count == backbone.num_visual_tokens(*size)


def test_the_size_of_a_png_is_read_without_decoding_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    assert upright_size(tmp_path / "x.png") == (4, 8)
