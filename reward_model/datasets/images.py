"""Checks of the images that records name: each exists, can be decoded, and lies within the image root."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from reward_model.datasets.fields import BadRecordError, ImageField, shortened
from reward_model.image_files import MAX_PIXELS, open_image

FindImage = Callable[[ImageField], Path]
"""Returns the checked file of an image as a record gives it; raises BadRecordError if there is none."""


class ImageFinder:
    """Finds images under a root folder and checks each file once, however many records name it."""

    def __init__(
        self,
        root: Path,
        *,
        unpack_to: Path,
        prefix: tuple[str, str] | None = None,
        read_member: Callable[[str], bytes] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Find images under `root`.

        With a `prefix` (OLD, NEW), paths that start with the folder OLD are looked up in the folder NEW. If the records
        lie in an archive, `read_member` returns the content of the member that a record names. Images that are given as
        content are written to the folder `unpack_to`, each distinct one once, as training opens images in random order.
        """
        self.root, self.unpack_to = root.resolve(), unpack_to.resolve()
        self.prefix, self.read_member, self.max_pixels = prefix, read_member, max_pixels
        self._flaws: dict[Path, str | None] = {}

    def __call__(self, image: ImageField) -> Path:
        """Return the checked file of an image. Raises BadRecordError if it cannot be used."""
        if isinstance(image, bytes):
            return self._unpack(image, name="in the record")
        name = image if self.prefix is None else _with_new_prefix(image, *self.prefix)
        if self.read_member is not None:
            return self._unpack(self.read_member(name), name=shortened(image))
        path = _path_inside(self.root, name)
        if path not in self._flaws:
            self._flaws[path] = flaw_of_image(path, max_pixels=self.max_pixels)
        if flaw := self._flaws[path]:
            raise BadRecordError(f"the image {shortened(image)}, relative to {self.root}, {flaw}")
        return path

    def _unpack(self, content: bytes, *, name: str) -> Path:
        return _unpack(content, self.unpack_to, max_pixels=self.max_pixels, name=name)


def parse_prefix(text: str | None) -> tuple[str, str] | None:
    """Return the two folders of OLD=NEW without trailing slashes. Raises ValueError if OLD or = is missing."""
    if text is None:
        return None
    old, equals, new = text.partition("=")
    if not (old.rstrip("/") and equals):
        raise ValueError(f"image_prefix is {text!r}; it must be OLD=NEW, such as /home/authors/images=/data/images.")
    return old.rstrip("/"), new.rstrip("/") or ("/" if new else "")


def text_beside(image: Path) -> str:
    """Return the text of the .txt file with the same name, without surrounding blanks; empty if there is no file."""
    file = image.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{file} is not UTF-8: {error.reason} at byte {error.start}.") from error


def flaw_of_image(path: Path, *, max_pixels: int) -> str | None:
    """Return why a file cannot be used as an image, as the end of a sentence; None if it can."""
    try:
        if not path.exists():
            return "does not exist. Correct the path, or give another image_root."
        if not path.is_file():
            return "is not a file. Name an image."
        if not path.stat().st_size:
            return "is an empty file. Download it again or remove the record."
        return _flaw_of_pixels(path, max_pixels=max_pixels)
    # Pillow's decoders raise any exception type on broken bytes: SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        return f"cannot be read as an image: {str(error)[:200]}. Download it again or remove the record."


def flaw_of_content(content: bytes, *, max_pixels: int) -> str | None:
    """Return why the content of a file cannot be used as an image, as the end of a sentence; None if it can."""
    if not content:
        return "is empty. Download the data again or remove the record."
    try:
        return _flaw_of_pixels(io.BytesIO(content), max_pixels=max_pixels)
    except Exception as error:
        text = str(error).partition(" <_io.BytesIO")[0][:200]
        return f"cannot be read as an image: {text}. Download the data again or remove the record."


def _flaw_of_pixels(source: Path | io.BytesIO, *, max_pixels: int) -> str | None:
    try:
        image = open_image(source)
    except Image.DecompressionBombError as error:
        return f"looks like a decompression bomb: {error} (max_pixels is {max_pixels})."
    with image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about harmless metadata
        width, height = image.size
        if width * height > max_pixels:
            return (
                f"looks like a decompression bomb: {width} x {height} = {width * height} pixels; max_pixels is "
                f"{max_pixels}. Make it smaller if it is genuine."
            )
        if image.mode in ("I", "F"):
            return f"has 32-bit gray values ({image.mode}) without a known white value; save it with 8 bits."
        if image.format == "PNG":
            image.verify()  # compares the checksum of every chunk, many times faster than decoding
        else:
            image.draft("L", (1, 1))  # JPEG: reads all bytes, but decodes few pixels
            image.load()  # for formats other than PNG, `verify` does not notice a truncated file
    return None


def _unpack(content: bytes, folder: Path, *, max_pixels: int, name: str) -> Path:
    """Write an image to a file that is named by its hash, so that records and processes share equal images."""
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


def _with_new_prefix(name: str, old: str, new: str) -> str:
    """Replace the folder `old` at the start of a path by `new`; /data is not a prefix of /data2/a.png."""
    if not name.startswith(f"{old}/"):
        return name
    rest = name[len(old) + 1 :]
    return f"{new.rstrip('/')}/{rest}" if new else rest


def _path_inside(root: Path, name: str) -> Path:
    """Return the path with links and `..` resolved, so that two names of one file give the same path."""
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # circular links, a null byte
        raise BadRecordError(f"the image {shortened(name)} is not a valid path: {str(error)[:200]}.") from error
    if not path.is_relative_to(root):
        raise BadRecordError(
            f"the image {shortened(name)} resolves to {shortened(str(path))}, outside of the image root {root}. "
            f"Give an image_root that contains every image."
        )
    return path
