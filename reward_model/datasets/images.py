"""Places of the images that records name, all within the image root, and the check that one can be decoded."""

from __future__ import annotations

import os
import posixpath
import stat
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from PIL import Image

from reward_model.datasets.fields import BadRecordError, ImageField, shortened
from reward_model.image_files import MAX_PIXELS, open_image
from reward_model.locations import BucketPath, Location
from reward_model.stored_images import ImageSource, StoredImage, read_bytes


def _real_path(folder: str, root: str) -> tuple[Path, bool]:
    """Return a folder without links, and whether it is within another one."""
    real = os.path.realpath(folder)
    return Path(real), real == root or real.startswith(f"{root.rstrip('/')}/")


def _sizes_in(folder: str) -> dict[str, int]:
    """Return the sizes of the files in a folder of a bucket, by name; nothing if there is no such folder."""
    try:
        return BucketPath(folder).sizes()
    except FileNotFoundError:
        return {}


def _size_of(url: str) -> int | None:
    """Return the size of a file of a web server; None if there is no such file."""
    try:
        return BucketPath(url).size()
    except FileNotFoundError:
        return None


FindImage = Callable[[ImageField], ImageSource]
"""Returns where an image lies that a record names; raises BadRecordError if there is none."""


class ImageFinder:
    """Finds images under a root folder without opening them; `flaw_of_image` says if one can be decoded."""

    def __init__(
        self,
        root: Location,
        *,
        prefix: tuple[str, str] | None = None,
        find_member: Callable[[str], StoredImage] | None = None,
    ) -> None:
        """Find images under `root`.

        With a `prefix` (OLD, NEW), paths that start with the folder OLD are looked up in the folder NEW. If the records
        lie in an archive, `find_member` returns where the member lies that a record names.
        """
        self.root = root.resolve() if isinstance(root, Path) else root
        self.prefix, self.find_member = prefix, find_member
        self._root = str(self.root)
        self._real_folder = lru_cache(maxsize=4096)(_real_path)
        self._sizes = lru_cache(maxsize=16)(_sizes_in)
        self._size_of = lru_cache(maxsize=65_536)(_size_of)

    def __call__(self, image: ImageField) -> ImageSource:
        """Return where an image lies. Raises BadRecordError if there is no such file, or only outside of the root."""
        if isinstance(image, StoredImage):
            return image
        name = image if self.prefix is None else _with_new_prefix(image, *self.prefix)
        if self.find_member is not None:
            return self.find_member(name)
        if isinstance(self.root, BucketPath):
            return self._in_bucket(image, name)
        return self._plain_file(name) or self._file(self.root, image, name)

    def _plain_file(self, name: str) -> Path | None:
        """Return a file that is no link and not empty, with one question to the file system; None for any other."""
        folder, _, base = (name if name.startswith("/") else f"{self._root}/{name}").rpartition("/")
        if ".." in name or not base or base == ".":
            return None
        try:
            real, is_inside = self._real_folder(folder, self._root)
            info = os.lstat(f"{real}/{base}")
        except (OSError, ValueError):
            return None
        return real / base if is_inside and stat.S_ISREG(info.st_mode) and info.st_size else None

    def _file(self, root: Path, image: str, name: str) -> Path:
        path = _path_inside(root, name)
        if flaw := _flaw_of_file(path):
            raise BadRecordError(f"the image {shortened(image)}, relative to {root}, {flaw}")
        return path

    def _in_bucket(self, image: str, name: str) -> StoredImage:
        """Return an image file of a bucket by the list of its folder, which is asked for once."""
        root = f"{self._root.rstrip('/')}/"
        inside = posixpath.normpath(name.removeprefix(root))
        if inside.startswith(("/", "../")) or "://" in name.removeprefix(root):
            raise BadRecordError(
                f"the image {shortened(image)} is outside of the image root {self._root}. Give an image_root that "
                f"contains every image."
            )
        folder, _, base = f"{root}{inside}".rpartition("/")
        is_http = isinstance(self.root, BucketPath) and self.root.is_http
        size = self._size_of(f"{folder}/{base}") if is_http else self._sizes(folder).get(base)
        if size is None:
            raise BadRecordError(
                f"the image {shortened(image)}, relative to {self._root}, does not exist. Correct the path, or give "
                f"another image_root."
            )
        if not size:
            raise BadRecordError(
                f"the image {shortened(image)}, relative to {self._root}, is an empty file. Upload it again or remove "
                f"the record."
            )
        return StoredImage(f"{folder}/{base}", 0, size)


def parse_prefix(text: str | None) -> tuple[str, str] | None:
    """Return the two folders of OLD=NEW without trailing slashes. Raises ValueError if OLD or = is missing."""
    if text is None:
        return None
    old, equals, new = text.partition("=")
    if not (old.rstrip("/") and equals):
        raise ValueError(f"image_prefix is {text!r}; it must be OLD=NEW, such as /home/authors/images=/data/images.")
    return old.rstrip("/"), new.rstrip("/") or ("/" if new else "")


def text_beside(image: ImageSource) -> str:
    """Return the text of the .txt file with the same name, without surrounding blanks; empty if there is no file."""
    if isinstance(image, StoredImage):
        return ""
    file = image.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{file} is not UTF-8: {error.reason} at byte {error.start}.") from error


def flaw_of_image(image: ImageSource, *, max_pixels: int = MAX_PIXELS) -> str | None:
    """Return why an image cannot be used, as a clause with the image as its subject; None if it can."""
    try:
        flaw = _flaw_of_file(image) if isinstance(image, Path) else _flaw_of_content(read_bytes(image))
        flaw = flaw or _flaw_of_pixels(image, max_pixels=max_pixels)
    except ConnectionError:
        raise
    # Pillow's decoders raise any exception type on broken bytes: SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        text = str(error).partition(" <_io.BytesIO")[0][:200]
        flaw = f"cannot be read as an image: {text}. Download it again or remove the record."
    return flaw and f"the image {shortened(str(image)) if isinstance(image, Path) else image} {flaw}"


def _flaw_of_content(content: bytes) -> str | None:
    return None if content else "is empty. Download the data again or remove the record."


def _flaw_of_file(path: Path) -> str | None:
    try:
        if not path.exists():
            return "does not exist. Correct the path, or give another image_root."
        if not path.is_file():
            return "is not a file. Name an image."
        return None if path.stat().st_size else "is an empty file. Download it again or remove the record."
    except OSError as error:
        return f"cannot be read as an image: {str(error)[:200]}. Download it again or remove the record."


def _flaw_of_pixels(source: ImageSource, *, max_pixels: int) -> str | None:
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
