"""WebDataset shards: tar archives in which the files of one sample stand beside each other.

    0001.json  0001.jpg                     the JSON holds all fields but the image
    0002.json  0002.winner.jpg  0002.loser.jpg

A sample is a KEY.json with a record's fields. An image KEY.FIELD.jpg is the field FIELD, if the JSON lacks it, and
KEY.jpg the field `image`; an image that the JSON names by itself is looked up among all members.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.raw_records import RawRecord, parse_object

_IMAGES = ("jpg", "jpeg", "png", "webp")


class TarShard:
    """One archive, of which members are read when they are asked for, from where they lie."""

    def __init__(self, path: Path) -> None:
        """List the members. ValueError if the file is no whole, uncompressed tar, or two members have one name."""
        self.path = path
        try:
            with tarfile.open(path, "r:") as archive:
                found = list(archive)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as an uncompressed tar: {error}. Fetch it again.") from error
        _check_end(path, found)
        members = [member for member in found if not member.isdir()]
        self.members = {member.name: member for member in members}
        if len(self.members) < len(members):
            (twin, _), *_ = Counter(member.name for member in members).most_common(1)
            raise ValueError(f"{path} has two members {shortened(twin)}; each needs a name of its own.")

    def content(self, name: str) -> bytes:
        """What a member holds; BadRecordError if there is none, or it is a link, or cut off."""
        member = self.members.get(name)
        if member is None:
            raise BadRecordError(f"the image {shortened(name)} is no member of the archive.")
        if not member.isreg():
            raise BadRecordError(f"the member {shortened(name)} is no ordinary file; pack the image itself.")
        with self.path.open("rb") as file:
            file.seek(member.offset_data)
            content = file.read(member.size)
        if len(content) < member.size:
            raise BadRecordError(f"the member {shortened(name)} is cut off: {len(content)} of {member.size} bytes.")
        return content

    def samples(self) -> Iterator[RawRecord]:
        """The samples in the order of their .json members."""
        images: dict[str, dict[str, str]] = {}
        for name in self.members:
            key, rest = _key_and_rest(name)
            field, _, ending = rest.removeprefix(".").rpartition(".")
            if ending.lower() in _IMAGES:
                images.setdefault(key, {})[field or "image"] = name
        for name in self.members:
            key, rest = _key_and_rest(name)
            if rest == ".json":
                yield self._sample(name, images.get(key, {}))

    def _sample(self, name: str, images: dict[str, str]) -> RawRecord:
        where = f"{self.path}:{name}"
        source = self.content(name)
        try:
            fields = parse_object(source)
        except BadRecordError:
            return RawRecord(where, source)  # refused like any broken line, once its turn comes
        return RawRecord(where, {**images, **fields})


def _check_end(path: Path, members: Sequence[tarfile.TarInfo]) -> None:
    """Python's reader takes a broken header, and the end of the first of two archives in a row, for the end of all."""
    last = max(members, key=lambda member: member.offset_data, default=None)
    end = 0 if last is None else last.offset_data + (last.size + 511) // 512 * 512
    with path.open("rb") as file:
        file.seek(end)
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise ValueError(f"{path} cannot be read behind byte {end:,}: there stands no member. Fetch it again.")


def _key_and_rest(name: str) -> tuple[str, str]:
    """The folder/0001 and .winner.jpg of folder/0001.winner.jpg."""
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{rest}"
