"""Aspect-ratio buckets: their sizes, and which of them images get."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from rlhf_t2i.data.buckets import MAX_RATIO, Buckets, aspect_buckets, bucket_of


def test_a_square_of_1024_pixels_and_a_step_of_64_give_sizes_that_sdxl_was_trained_at() -> None:
    found = aspect_buckets((1024, 1024), 64, unit=8)
    wide = [(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408)]
    assert found == [*wide[:1], *(size for height, width in wide[1:] for size in ((height, width), (width, height)))]


@pytest.mark.parametrize(("size", "step"), [((512, 512), 64), ((768, 512), 64), ((480, 832), 16), ((16, 16), 2)])
def test_buckets_have_the_step_about_the_area_and_at_most_the_longest_ratio(size: tuple[int, int], step: int) -> None:
    found = aspect_buckets(size, step, unit=2)
    assert found[0] == size
    assert len(set(found)) == len(found)
    for height, width in found:
        assert height % step == width % step == 0
        assert 0.8 * size[0] * size[1] < height * width <= size[0] * size[1]
        assert max(height, width) <= MAX_RATIO * min(height, width)
        assert (width, height) in found


@pytest.mark.parametrize(
    ("size", "step", "message"),
    [
        ((512, 512), 24, "aspect_bucket_step is 24; for this model it must be a multiple of 16, such as 32"),
        ((64, 64), 64, "aspect_bucket_step is 64; at 64 x 64 pixels it leaves no other bucket. .* such as 16"),
    ],
)
def test_a_step_that_makes_no_buckets_is_refused_with_one_that_does(
    size: tuple[int, int], step: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        aspect_buckets(size, step, unit=16)
    assert len(aspect_buckets(size, 16, unit=16)) > 1


def test_a_pair_has_the_bucket_nearest_to_both_of_its_images() -> None:
    """A square and a 1 : 4 image have the mean ratio 1 : 2; what is longer than every bucket has the longest."""
    buckets = [(16, 16), (12, 20), (20, 12), (10, 20), (20, 10)]
    assert bucket_of([(500, 500)], buckets) == (16, 16)
    assert bucket_of([(300, 500)], buckets) == (12, 20)
    assert bucket_of([(500, 500), (400, 100)], buckets) == (20, 10)
    assert bucket_of([(500, 300), (300, 500)], buckets) == (16, 16)
    assert bucket_of([(10, 900)], buckets) == (10, 20)


def test_rows_are_grouped_by_the_upright_size_of_their_images(tmp_path: Path) -> None:
    tall, turned, square = (tmp_path / name for name in ("tall.png", "turned.jpg", "square.png"))
    Image.new("RGB", (12, 20)).save(tall)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 12)).save(turned, exif=exif)
    Image.new("RGB", (9, 9)).save(square)
    buckets = Buckets([(16, 16), (12, 20), (20, 12)])
    assert buckets.groups([(tall, turned), (square, square), (turned, tall)]) == [[1], [0, 2]]
    assert Buckets([(16, 16)]).groups([(Path("missing.png"), square)]) == [[0]]
