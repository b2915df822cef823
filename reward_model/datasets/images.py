"""Whether an image that a record names is there, is sound, and lies where images may lie."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from PIL import Image

from reward_model.datasets.fields import BadRecordError, ImageField, shortened

FindImage = Callable[[ImageField], Path]
"""From an image as a record gives it to a file that was checked; BadRecordError if there is none."""
MAX_PIXELS = 64_000_000
"""An image with more is taken for a decompression bomb."""


def image_finder(
    root: Path,
    *,
    unpack_to: Path,
    prefix: tuple[str, str] | None = None,
    member: Callable[[str], bytes] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> FindImage:
    """A function that finds images under `root` and opens each file once, however many records name it.

    With a `prefix` (OLD, NEW), a path that starts with the folder OLD is read as if it started with NEW. If the data
    are an archive, `member` gives the content of what it names. Content is written to a file of its own, once, in the
    folder `unpack_to`: what trains on images opens files, in any order and as often as it likes.
    """
    root, unpack_to = root.resolve(), unpack_to.resolve()
    flaw = cache(partial(flaw_of_image, max_pixels=max_pixels))

    def find_image(image: ImageField) -> Path:
        if isinstance(image, bytes):
            return _unpacked(image, unpack_to, max_pixels=max_pixels, name="in the record")
        name = image if prefix is None else _moved(image, *prefix)
        if member is not None:
            return _unpacked(member(name), unpack_to, max_pixels=max_pixels, name=shortened(image))
        path = _path_inside(root, name)
        if found := flaw(path):
            raise BadRecordError(f"the image {shortened(image)}, seen from {root}, {found}")
        return path

    return find_image


def parse_prefix(text: str | None) -> tuple[str, str] | None:
    """The two folders of OLD=NEW, without slashes at their ends."""
    if text is None:
        return None
    old, equals, new = text.partition("=")
    if not (old.rstrip("/") and equals):
        raise ValueError(f"image_prefix is {text!r}; it must be OLD=NEW, such as /home/authors/images=/data/images.")
    return old.rstrip("/"), new.rstrip("/") or ("/" if new else "")


def text_beside(image: Path) -> str:
    """What stands in the .txt file of the same name, without blanks around it; empty if there is none."""
    file = image.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{file} is not UTF-8: {error.reason} at byte {error.start}.") from error


def flaw_of_image(path: Path, *, max_pixels: int) -> str | None:
    """What keeps a file from being used as an image, as the rest of a sentence; None if nothing does."""
    try:
        if not path.exists():
            return "does not exist. Correct the path, or give another image_root."
        if not path.is_file():
            return "is not a file. Name an image."
        if not path.stat().st_size:
            return "is an empty file. Fetch it again or leave the record out."
        return _flaw_of_pixels(path, max_pixels=max_pixels)
    # Pillow's many readers raise anything at all when they meet broken bytes: SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        return f"cannot be read as an image: {str(error)[:200]}. Fetch it again or leave the record out."


def flaw_of_content(content: bytes, *, max_pixels: int) -> str | None:
    """The same of an image's bytes."""
    if not content:
        return "is empty. Fetch the data again or leave the record out."
    try:
        return _flaw_of_pixels(io.BytesIO(content), max_pixels=max_pixels)
    except Exception as error:
        text = str(error).partition(" <_io.BytesIO")[0][:200]
        return f"cannot be read as an image: {text}. Fetch the data again or leave the record out."


def _flaw_of_pixels(source: Path | io.BytesIO, *, max_pixels: int) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bombs at a limit of its own, and of harmless metadata
        try:
            image = Image.open(source)
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


def _unpacked(content: bytes, folder: Path, *, max_pixels: int, name: str) -> Path:
    """The file of this content, named after it: two records, or two processes, with one image share the file."""
    if flaw := flaw_of_content(content, max_pixels=max_pixels):
        raise BadRecordError(f"the image {name}, of {len(content):,} bytes, {flaw}")
    digest = hashlib.sha256(content).hexdigest()
    path = folder / digest[:2] / digest[2:]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return path


def _moved(name: str, old: str, new: str) -> str:
    """Only whole names of folders count: /data is no prefix of /data2/a.png."""
    if not name.startswith(f"{old}/"):
        return name
    rest = name[len(old) + 1 :]
    return f"{new.rstrip('/')}/{rest}" if new else rest


def _path_inside(root: Path, name: str) -> Path:
    """Where a name leads once every link and every `..` is followed: two names of one file give the same path."""
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a NUL
        raise BadRecordError(f"the image {shortened(name)} cannot be a path: {str(error)[:200]}.") from error
    if not path.is_relative_to(root):
        raise BadRecordError(
            f"the image {shortened(name)} leads to {shortened(str(path))}, outside of the image root {root}. "
            f"Give an image_root that holds every image."
        )
    return path
