"""Whether a picture that a record names is there, is sound, and lies where pictures may lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from PIL import Image

from reward_model.datasets.fields import BadRecordError, shortened

FindImage = Callable[[str], Path]
"""From a path as a record gives it to a file that was checked; BadRecordError if there is none."""


def image_finder(root: Path, *, max_pixels: int) -> FindImage:
    """A function that finds pictures under `root` and opens each file once, however many records name it."""
    root = root.resolve()
    flaw = cache(partial(flaw_of_image, max_pixels=max_pixels))

    def find_image(name: str) -> Path:
        path = _path_inside(root, name)
        if found := flaw(path):
            raise BadRecordError(f"the image {shortened(name)}, seen from {root}, {found}")
        return path

    return find_image


def flaw_of_image(path: Path, *, max_pixels: int) -> str | None:
    """What keeps a file from being used as a picture, as the rest of a sentence; None if nothing does."""
    try:
        if not path.exists():
            return "does not exist. Correct the path, or give another image_root."
        if not path.is_file():
            return "is not a file. Name a picture."
        if not path.stat().st_size:
            return "is an empty file. Fetch it again or leave the record out."
        return _flaw_of_pixels(path, max_pixels=max_pixels)
    # Pillow's many readers raise anything at all when they meet broken bytes: SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        return f"cannot be read as a picture: {str(error)[:200]}. Fetch it again or leave the record out."


def _flaw_of_pixels(path: Path, *, max_pixels: int) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bombs at a limit of its own, and of harmless metadata
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            return f"looks like a decompression bomb: {error} (max_pixels is {max_pixels})."
        with image:
            width, height = image.size
            if width * height > max_pixels:
                return (
                    f"looks like a decompression bomb: {width} x {height} = {width * height} pixels, where max_pixels "
                    f"is {max_pixels}. Shrink it if it is genuine."
                )
            if image.mode in ("I", "F"):
                return (
                    f"has 32-bit gray values ({image.mode}), of which none is known to be white; save it with 8 bits."
                )
            if image.format == "PNG":
                image.verify()  # the check sum of every chunk: as good as decoding and many times faster
            else:
                image.draft("L", (1, 1))  # JPEG: all bytes are read, few pixels are made
                image.load()  # elsewhere `verify` does nothing, and half a file would pass
    return None


def _path_inside(root: Path, name: str) -> Path:
    """Where a name leads once every link and every `..` is followed: two names of one file give the same path."""
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL
        raise BadRecordError(f"the image {shortened(name)} cannot be a path: {str(error)[:200]}.") from error
    if not path.is_relative_to(root):
        raise BadRecordError(
            f"the image {shortened(name)} leads to {shortened(str(path))}, outside of the image root {root}. "
            f"Give an image_root that holds every picture."
        )
    return path
