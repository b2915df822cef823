"""Conversion of images to tensors, and differentiable resizing, cropping and normalising of image processors.

Gradients reach the pixels of the image. Processors compute with 8-bit images, so a resized image differs from theirs
by their rounding; without a resize both are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from reward_model.image_files import MAX_PIXELS, open_image, upright
from reward_model.stored_images import ImageSource, StoredImage

MAX_ASPECT_RATIO = 200
"""Long side over short side of an image that is resized by its short side; it is also the limit of Qwen's models."""

ImageInput = Image.Image | np.ndarray | Tensor | str | Path | StoredImage
"""A PIL image, an array (Y, X, 3) or (Y, X), a tensor (3, Y, X), or the path of a file or the place in one."""


def to_tensor(image: ImageInput) -> Float[Tensor, "3 _ _"]:
    """Return RGB in [0, 1]; a float tensor keeps its graph, transparent pixels are blended with white.

    Raises FileNotFoundError, TypeError or ValueError, naming the input.
    """
    match image:
        case str() | Path():
            return _from_file(Path(image))
        case StoredImage():
            return _from_file(image)
        case Image.Image():
            return _from_pil(image)
        case np.ndarray():
            return _from_array(image)
        case Tensor():
            return _from_tensor(image)
        case _:
            raise TypeError(
                f"An image is a PIL image, an array (Y, X, 3), a tensor (3, Y, X) or a path; this is a "
                f"{type(image).__name__}."
            )


def _from_file(path: ImageSource) -> Float[Tensor, "3 _ _"]:
    if isinstance(path, Path) and not path.is_file():
        raise FileNotFoundError(f"There is no image {str(path)!r}.")
    try:
        with open_image(path) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                return _from_pil(image)
    except ConnectionError:  # of a bucket
        raise
    # Pillow's decoders raise any exception type on broken bytes: SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        name = f"file {str(path)!r}" if isinstance(path, Path) else f"image {path}"
        text = str(error).partition(" <_io.BytesIO")[0]
        raise ValueError(f"The {name} is no image that can be read: {text}.") from error
    raise ValueError(
        f"The image {str(path)!r} has {width} x {height} pixels, more than {MAX_PIXELS:,}: it may be a decompression "
        f"bomb. Resize it."
    )


def _from_pil(image: Image.Image) -> Float[Tensor, "3 _ _"]:
    image = upright(image)
    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        return torch.from_numpy(np.array(image) / np.float32(65535)).expand(3, -1, -1)
    if image.mode in ("I", "F"):
        raise ValueError(f"An image of Pillow's mode {image.mode!r} has no defined range; convert it to L or RGB.")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    # In one pass over the pixels, and without another copy of their bytes, as torch would need.
    pixels = np.divide(np.frombuffer(image.tobytes(), np.uint8), np.float32(255), dtype=np.float32)
    return torch.from_numpy(pixels).view(image.height, image.width, 3).permute(2, 0, 1)


def _from_array(array: np.ndarray) -> Float[Tensor, "3 _ _"]:
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"An array of shape {array.shape} is no image; it must be (Y, X, 3) or (Y, X).")
    return _from_tensor(torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))))


def _from_tensor(tensor: Tensor) -> Float[Tensor, "3 _ _"]:
    if tensor.ndim != 3 or tensor.shape[0] != 3 or 0 in tensor.shape:
        raise ValueError(f"A tensor of shape {tuple(tensor.shape)} is no image; it must be (3, Y, X).")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise ValueError(f"An image of {tensor.dtype} is not supported; give uint8 in 0..255 or floats in [0, 1].")
    if not tensor.detach().isfinite().all():
        raise ValueError("An image holds values that are not finite; floats must be in [0, 1].")
    return tensor.float()


def clamp_keeping_gradient(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamp to [0, 1] in the forward pass, with the gradient of the identity (straight-through).

    A plain clamp has no gradient at saturated pixels, so that a policy could not learn to leave saturation.
    """
    if not (images.requires_grad and torch.is_grad_enabled()):
        return images.clamp(0, 1)  # the same
    return images.detach().clamp(0, 1) + (images - images.detach())


def resize(
    images: Float[Tensor, "B 3 _ _"], height: int, width: int, *, mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Float[Tensor, "B 3 {height} {width}"]:
    """Resize with antialiasing, like PIL but without its rounding to 8 bits; unchanged if the size is equal.

    Columns are resized first, then rows, and values are clamped to [0, 1] each time, as PIL does. (Pillow 13 begins
    with the rows if these shrink while columns grow; that differs only in the clamping.)
    """
    images = clamp_keeping_gradient(images)
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode=mode, antialias=True, align_corners=False)
            images = clamp_keeping_gradient(images)
    return images


def centre_crop(images: Float[Tensor, "B 3 _ _"], height: int, width: int) -> Float[Tensor, "B 3 {height} {width}"]:
    """Crop the centre of images that are at least this large."""
    top, left = centred_offsets((height, width), (images.shape[-2], images.shape[-1]))
    return images[..., top : top + height, left : left + width]


def pad_to(
    images: Float[Tensor, "B 3 _ _"], height: int, width: int, *, value: float
) -> Float[Tensor, "B 3 {height} {width}"]:
    """Pad images on all sides to a larger size; an odd line goes below or to the right."""
    rows, columns = height - images.shape[-2], width - images.shape[-1]
    top, left = centred_offsets((images.shape[-2], images.shape[-1]), (height, width))
    return F.pad(images, (left, columns - left, top, rows - top), value=value)


def centred_offsets(inner: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int]:
    """Return (top, left) of an area of size (height, width) in the centre of another one that is at least as large."""
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2


def split_into_squares(image: Float[Tensor, "3 _ _"], size: int) -> Float[Tensor, "N 3 {size} {size}"]:
    """Split an image whose sides are multiples of `size` into squares, row by row."""
    rows, columns = image.shape[1] // size, image.shape[2] // size
    return image.reshape(3, rows, size, columns, size).permute(1, 3, 0, 2, 4).flatten(0, 1)


def normalise(
    images: Float[Tensor, "B 3 Y X"], *, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "B 3 Y X"]:
    """Return (images - mean) / std, for each channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def preprocess_as_clip(images: Float[Tensor, "B 3 _ _"], settings: Any) -> Float[Tensor, "B 3 _ _"]:
    """Preprocess as a CLIP image processor with these settings, without rounding resized images to 8 bits.

    Clamped values keep their gradient. Raises what `size_as_clip` does.
    """
    if settings.do_resize:
        images = resize(images, *resized_as_clip(images.shape[-2], images.shape[-1], settings))
    if settings.do_center_crop:
        images = centre_crop(images, settings.crop_size["height"], settings.crop_size["width"])
    return normalise(images, mean=settings.image_mean, std=settings.image_std) if settings.do_normalize else images


def size_as_clip(height: int, width: int, settings: Any) -> tuple[int, int]:
    """Return the height and width of an image after `preprocess_as_clip`.

    Raises ValueError for an image that is too narrow to be resized by its short side.
    """
    height, width = resized_as_clip(height, width, settings)
    return (settings.crop_size["height"], settings.crop_size["width"]) if settings.do_center_crop else (height, width)


def resized_as_clip(height: int, width: int, settings: Any) -> tuple[int, int]:
    """Return the height and width of an image in `preprocess_as_clip` before its centre is cropped."""
    return _resized(height, width, settings.size) if settings.do_resize else (height, width)


def _resized(height: int, width: int, size: Any) -> tuple[int, int]:
    """Return the size after the processor's resize: a fixed size, or the shortest side at a given length."""
    if size.get("height"):
        return size["height"], size["width"]
    short = size["shortest_edge"]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"its short side is resized to {short} pixels, and its long side would take gigabytes; it may be at most "
            f"{MAX_ASPECT_RATIO} times as long."
        )
    return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)


def fit(image: Float[Tensor, "3 _ _"], height: int, width: int) -> Float[Tensor, "3 {height} {width}"]:
    """Resize an image, antialiased and bicubic, so that it just covers height x width, and crop its centre.

    An image of that size is returned unchanged.
    """
    own_height, own_width = image.shape[1:]
    scale = max(height / own_height, width / own_width)
    size = max(height, round(scale * own_height)), max(width, round(scale * own_width))
    if size != (own_height, own_width):
        resized = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)
        image = resized[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, top : top + height, left : left + width]
