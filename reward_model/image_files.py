"""Opening of image files of strangers: known formats, a bound on their size, and no metadata but the orientation."""

from __future__ import annotations

import io
import warnings
from functools import cache

from PIL import ExifTags, Image

from reward_model.stored_images import ImageSource, StoredImage, read_bytes

MAX_PIXELS = 64_000_000
"""Images with more pixels are refused as decompression bombs."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
"""Formats that are read. Pillow hands others to outside programs: PostScript, whatever its suffix, to Ghostscript."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What shows an image upright, by its EXIF orientation."""


def open_image(source: ImageSource | io.BytesIO, *, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open an image without decoding it; `formats` are Pillow's names, by default all of ours.

    Raises OSError for an unknown format, ValueError if a data file no longer has the image, and
    `Image.DecompressionBombError` for twice the pixels of Pillow's own limit; the caller compares smaller images with
    MAX_PIXELS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bombs at Pillow's own limit, and harmless metadata
        opened = io.BytesIO(read_bytes(source)) if isinstance(source, StoredImage) else source
        return Image.open(opened, formats=formats or _formats())


def upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF orientation says.

    `ImageOps.exif_transpose` also writes all other metadata again, and fails on odd values that photographs have.
    """
    image.load()  # a PNG may have its EXIF behind the pixels
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def upright_size(source: ImageSource) -> tuple[int, int]:
    """Return height and width of an image, as `upright` would turn it, without decoding it."""
    with open_image(source) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, upright, if it cannot be read."""
    try:
        # Of the base class, because that of a PNG decodes the image.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises any type of exception on broken metadata
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF since Pillow 11
