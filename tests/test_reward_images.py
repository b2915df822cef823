"""Conversion of all kinds of images to the same tensor, and differentiable preprocessing."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from reward_model import image_files, images
from reward_model.images import centre_crop, clamp_keeping_gradient, normalise, resize, to_tensor
from tests.reward_models import bytes_of, random_image

PIXELS = bytes_of(5, 7)
ARRAY = PIXELS.permute(1, 2, 0).numpy()


# --- inputs ----------------------------------------------------------------------


def test_every_kind_of_image_is_the_same_tensor(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.fromarray(ARRAY).save(file)
    expected = PIXELS.float() / 255
    for given in (file, str(file), Image.open(file), Image.fromarray(ARRAY), ARRAY, ARRAY / 255.0, PIXELS, expected):
        assert torch.equal(to_tensor(given), expected)


def test_a_float_tensor_keeps_its_graph() -> None:
    pixels = random_image(4, 4).requires_grad_()
    to_tensor(pixels).sum().backward()
    assert torch.equal(pixels.grad, torch.ones(3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_floats_of_another_precision_become_float32(dtype: torch.dtype) -> None:
    pixels = random_image(4, 4).to(dtype)
    assert torch.equal(to_tensor(pixels), pixels.float())


def test_grey_images_have_three_equal_channels() -> None:
    grey = ARRAY[..., 0]
    expected = torch.from_numpy(grey).float().expand(3, 5, 7) / 255
    assert torch.equal(to_tensor(grey), expected)
    assert torch.equal(to_tensor(Image.fromarray(grey)), expected)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparent_pixels_are_blended_with_white(suffix: str, tmp_path: Path) -> None:
    """alpha * colour + (1 - alpha) * white, to the rounding of 8 bits."""
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 2] = 200, 40
    rgba[..., 3] = [[0, 51, 255], [102, 204, 0]]
    file = tmp_path / f"image.{suffix}"
    Image.fromarray(rgba).save(file, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    alpha = torch.from_numpy(rgba[..., 3]).float() / 255
    colour = torch.tensor([200.0, 0.0, 40.0])[:, None, None] / 255
    assert_close(to_tensor(file), alpha * colour + (1 - alpha), rtol=0, atol=1 / 255)
    assert torch.all(to_tensor(file)[:, 0, 0] == 1)


def test_transparency_of_palettes_and_of_one_colour_is_blended_with_white_too(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert torch.equal(to_tensor(tmp_path / "palette.png")[:, 0].T, torch.tensor([[1.0, 1, 1], [0, 0, 1]]))
    rgb = Image.new("RGB", (2, 1), (255, 0, 0))
    rgb.putpixel((1, 0), (0, 0, 255))
    rgb.save(tmp_path / "rgb.png", transparency=(255, 0, 0))
    assert torch.equal(to_tensor(tmp_path / "rgb.png")[:, 0].T, torch.tensor([[1.0, 1, 1], [0, 0, 1]]))
    grey = Image.fromarray(np.array([[100, 200]], dtype=np.uint8)).convert("LA")
    grey.putalpha(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)))
    assert torch.equal(to_tensor(grey)[:, 0].T, torch.tensor([[1.0] * 3, [200 / 255] * 3]))


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_exif_orientation_is_applied(orientation: int, turns: int, tmp_path: Path) -> None:
    """6 is a rotation by 90 degrees clockwise, 8 by 90 degrees back, 3 by 180 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(ARRAY).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(to_tensor(tmp_path / "turned.png"), torch.rot90(PIXELS, turns, dims=(1, 2)).float() / 255)


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    """Pillow clips such an image at 255, which would make nearly all of it white."""
    grey = (np.arange(35).reshape(5, 7) * 1800).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    expected = torch.from_numpy(grey / 65535).float().expand(3, 5, 7)
    assert_close(to_tensor(tmp_path / "deep.png"), expected, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_defined_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}' has no defined range"):
        to_tensor(Image.new(mode, (3, 2)))


# --- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, "torch.int64"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), ValueError, "torch.bool"),
        (torch.full((3, 4, 4), torch.nan), ValueError, "not finite"),
        (torch.full((3, 4, 4), torch.inf), ValueError, "not finite"),
        (torch.zeros(4, 4), ValueError, r"shape \(4, 4\)"),
        (torch.zeros(4, 4, 3), ValueError, r"shape \(4, 4, 3\)"),
        (torch.zeros(3, 0, 4), ValueError, r"shape \(3, 0, 4\)"),
        (np.zeros((3, 4, 4)), ValueError, r"shape \(3, 4, 4\)"),
        (np.zeros((4, 4, 4)), ValueError, r"shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3)), ValueError, r"shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), dtype=np.int32), ValueError, "torch.int32"),
        (np.full((4, 4, 3), np.nan), ValueError, "not finite"),
    ],
)
def test_an_invalid_image_is_refused_by_name(given: object, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        to_tensor(given)


@pytest.mark.parametrize(("given", "named"), [(3, "this is a int"), (None, "this is a NoneType")])
def test_another_type_is_refused_by_name(given: object, named: str) -> None:
    unchecked = inspect.unwrap(to_tensor)  # without the type checks of the tests, as for users
    with pytest.raises(TypeError, match=named):
        unchecked(given)


def test_missing_files_and_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image '.*absent\.png'"):
        to_tensor(tmp_path / "absent.png")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        to_tensor(tmp_path)  # a folder
    (tmp_path / "words.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"words\.png' is no image"):
        to_tensor(tmp_path / "words.png")
    Image.fromarray(bytes_of(64, 64).permute(1, 2, 0).numpy()).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png' is no image"):
        to_tensor(tmp_path / "half.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.png' is no image"):
        to_tensor(tmp_path / "empty.png")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 30)
    assert to_tensor(tmp_path / "bomb.png").shape == (3, 30, 40)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 30 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"bomb\.png' has 40 x 30 pixels, more than 1,199"):
        to_tensor(tmp_path / "bomb.png")


def test_pillows_own_limits_raise_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a warning from here on, an error from twice as many
    assert to_tensor(tmp_path / "large.png").shape == (3, 30, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"large\.png' is no image that can be read: .*1200 pixels"):
        to_tensor(tmp_path / "large.png")


# --- arithmetic -----------------------------------------------------------------------------------


def test_clamping_keeps_the_gradient() -> None:
    values = torch.tensor([-1e8, -0.3, 0.0, 0.4, 1.0, 1.7, 1e8], requires_grad=True)
    clamped = clamp_keeping_gradient(values)
    clamped.backward(torch.arange(7.0))
    assert torch.equal(clamped.detach(), values.detach().clamp(0, 1))
    assert torch.equal(values.grad, torch.arange(7.0))


def test_resizing_to_the_same_size_is_exact() -> None:
    images = random_image(9, 6)[None]
    assert torch.equal(resize(images, 9, 6), images)


@pytest.mark.parametrize(
    ("height", "width", "contrast"), [(40, 12, 1.0), (60, 50, 1.0), (31, 26, 1.0), (5, 4, 1.0), (13, 31, 0.4)]
)
def test_resizing_equals_pillows_up_to_its_rounding(height: int, width: int, contrast: float) -> None:
    """Even for noise from black to white, which overshoots; for milder noise where Pillow begins with the rows."""
    pixels = (128 + contrast * (bytes_of(30, 25).float() - 128)).byte()
    ours = resize(pixels[None].float() / 255, height, width)[0]
    pillow = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    assert_close(ours, to_tensor(pillow), rtol=0, atol=1.6 / 255)


def test_resizing_clamps_its_input_and_its_output() -> None:
    wild = random_image(10, 10, low=-0.8, high=1.9)[None]
    for size in ((10, 10), (7, 23), (25, 31)):
        out = resize(wild, *size)
        assert_close(out, resize(wild.clamp(0, 1), *size), rtol=0, atol=1e-6)
        assert 0 <= out.min() <= out.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 4), (4, 7), (9, 8)])
def test_the_centre_crop_equals_the_processors(height: int, width: int) -> None:
    from transformers.image_transforms import center_crop
    from transformers.image_utils import ChannelDimension

    pixels = random_image(height, width)
    first = ChannelDimension.FIRST
    theirs = center_crop(pixels.numpy(), (4, 4), data_format=first, input_data_format=first)
    assert torch.equal(centre_crop(pixels[None], 4, 4)[0], torch.from_numpy(theirs.copy()))


def test_normalising_by_hand() -> None:
    one = torch.tensor([0.2, 0.5, 1.0])[None, :, None, None]
    out = normalise(one, mean=[0.1, 0.5, 0.8], std=[0.5, 0.25, 0.1])
    assert_close(out[0, :, 0, 0], torch.tensor([0.2, 0.0, 2.0]))


def test_every_image_file_is_opened_by_one_function_that_lists_the_formats() -> None:
    """Pillow alone would hand PostScript, whatever its suffix, to Ghostscript."""
    root = Path(image_files.__file__).parents[1]
    files = [file for folder in ("reward_model", "rlhf_t2i", "recipes") for file in (root / folder).rglob("*.py")]
    assert [file.name for file in files if "Image.open(" in file.read_text(encoding="utf-8")] == ["image_files.py"]
