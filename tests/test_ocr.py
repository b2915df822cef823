"""The OCR reward: its definition by hand, and PP-OCR on rendered words."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.prompt_rows import Prompt
from rlhf_t2i.rewards.load import as_checked, load_reward
from rlhf_t2i.rewards.ocr import OcrReward, target_text, text_score
from rlhf_t2i.rewards.rows import check_prompts


def sign(text: str, *, size: tuple[int, int] = (64, 24), points: int = 16) -> Tensor:
    """A white image with a black text."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((4, 2), text, font=ImageFont.load_default(points), fill="black")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


needs_ocr = pytest.mark.skipif(
    not all(map(find_spec, ("rapidfuzz", "rapidocr"))), reason="the extra ocr is not installed"
)


@pytest.fixture(scope="module")
def ocr() -> Any:
    return as_checked(OcrReward(min_side=96))


@needs_ocr
@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("FOX", "fox", 1.0),
        ("the red fox", "Red Fox", 1.0),  # within what is read, without blanks
        ("FAX", "FOX", 2 / 3),  # one of three letters replaced
        ("FO", "FOX", 2 / 3),
        ("FOOOX", "FOX", 1 / 3),  # two letters inserted
        ("a long text of other letters", "FOX", 0.0),  # at most the length of the target
        ("", "FOX", 0.0),
    ],
)
def test_the_score_is_the_distance_by_hand(read: str, target: str, expected: float) -> None:
    assert text_score(read, target) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": 'a sign "STOP"', "text": "Halt"}, "Halt"),
        ({"prompt": 'a "red" sign that says "STOP"', "text": None}, "red"),
        ({"prompt": "a sign that says \u201cBON APPÉTIT\u201d"}, "BON APPÉTIT"),
    ],
)
def test_the_target_is_the_field_text_or_the_first_quotation(row: dict[str, Any], expected: str) -> None:
    assert target_text(row) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a fox"}', "prompts.jsonl:2: the reward 'ocr' cannot use this row: it has no 'text', and its"),
        ('{"prompt": "a sign", "text": " "}', "jsonl:2: .*text that an image should show is ' '; it must be letters"),
        ('{"prompt": "a sign that says \\"\\""}', "jsonl:2: .*the text that an image should show is ''"),
        ('{"prompt": "a year", "text": 2026}', "jsonl:2: .* is 2026; it must be letters"),
    ],
)  # fmt: skip
def test_a_prompt_without_a_text_to_read_is_refused_before_the_engine_loads(
    tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "a sign that says \\"FOX\\""}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        check_prompts("ocr", load_prompts(str(tmp_path / "prompts.jsonl")))


@needs_ocr
def test_words_are_read_in_images_of_64_x_24_pixels_alone_and_in_a_batch(ocr: Any) -> None:
    images = torch.stack([sign("FOX"), sign("FOX"), torch.zeros(3, 24, 64)])
    prompts = [Prompt("a sign", {"text": "fox"}), 'says "FAX"', 'a sign that says "FOX"']
    scores = ocr(images, prompts)
    assert_close(scores, torch.tensor([1.0, 2 / 3, 0.0]))
    assert_close(torch.cat([ocr(images[i : i + 1], prompts[i : i + 1]) for i in range(3)]), scores, rtol=0, atol=0)


@needs_ocr
def test_colours_are_as_they_look_to_the_engine(ocr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV takes blue first."""
    seen: list[Any] = []
    monkeypatch.setattr(ocr.function, "_read", lambda pixels: seen.append(pixels) or type("None", (), {"txts": None}))
    ocr(torch.tensor([1.0, 0.5, 0.0])[None, :, None, None].expand(1, 3, 2, 2), ['a "FOX"'])
    assert seen[0][0, 0].tolist() == [0, 128, 255]


@needs_ocr
def test_an_engine_that_fails_is_an_error_and_no_zero(ocr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pixels: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ocr.function, "_read", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ocr(torch.zeros(1, 3, 8, 8), ['a "FOX"'])


@needs_ocr
@pytest.mark.parametrize("package", ["rapidocr", "rapidfuzz"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*the reward ocr needs: pip install 'rlhf-t2i\[ocr\]'"):
        load_reward("ocr")
