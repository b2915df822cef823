"""WebDataset shards: tar archives in which the files of one sample share the start of their name.

    0001.json  0001.jpg                     the JSON has all fields but the image
    0002.json  0002.winner.jpg  0002.loser.jpg

KEY.json has the fields of a record. KEY.FIELD.jpg is the image of the field FIELD, and KEY.jpg that of the field
`image`, unless the JSON has this field. An image that the JSON gives as a path is looked up among all members.

Not `datasets.load_dataset("webdataset")`: it requires the same files for every sample, copies the archive into its
cache, and stops at the first broken sample.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence

from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.raw_records import RawRecord, parse_object
from reward_model.locations import Location, num_bytes
from reward_model.stored_images import MAX_BYTES, StoredImage, read_bytes

_IMAGES = ("jpg", "jpeg", "png", "webp")


class TarShard:
    """A tar archive whose members are read from the file on demand."""

    def __init__(self, path: Location) -> None:
        """List the members. Raises ValueError if it is compressed, truncated, has sparse members or two of one name."""
        self.path, self.size = path, num_bytes(path)
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                found = list(archive)
        except ConnectionError:
            raise
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as an uncompressed tar: {error}. Download it again.") from error
        if sparse := next((member.name for member in found if member.issparse()), None):
            raise ValueError(
                f"{path} has the sparse member {shortened(sparse)}, whose size in memory may be any; pack it without "
                f"--sparse."
            )
        _check_end(path, found)
        members = [member for member in found if not member.isdir()]
        self.members = {member.name: member for member in members}
        if len(self.members) < len(members):
            (duplicate, _), *_ = Counter(member.name for member in members).most_common(1)
            raise ValueError(f"{path} has two members {shortened(duplicate)}; names must be unique.")

    def find_member(self, name: str) -> StoredImage:
        """Return where a member lies. Raises BadRecordError if it is missing, a link, truncated or too large."""
        member = self.members.get(name)
        if member is None:
            raise BadRecordError(f"the image {shortened(name)} is not a member of the archive.")
        if not member.isreg():
            raise BadRecordError(f"the member {shortened(name)} is not a regular file; pack the image itself.")
        if member.size > MAX_BYTES:
            raise BadRecordError(
                f"the member {shortened(name)} has {member.size:,} bytes; it may have at most {MAX_BYTES:,}."
            )
        if (left := self.size - member.offset_data) < member.size:
            raise BadRecordError(f"the member {shortened(name)} is truncated: {left} of {member.size} bytes.")
        return StoredImage(str(self.path), member.offset_data, member.size)

    def samples(self) -> Iterator[RawRecord]:
        """Yield the samples in the order of their .json members."""
        images: dict[str, dict[str, str]] = {}
        for name in self.members:
            key, rest = _split_name(name)
            field, _, ending = rest.removeprefix(".").rpartition(".")
            if ending.lower() in _IMAGES:
                images.setdefault(key, {})[field or "image"] = name
        for name in self.members:
            key, rest = _split_name(name)
            if rest == ".json":
                yield self._sample(name, images.get(key, {}))

    def _sample(self, name: str, images: dict[str, str]) -> RawRecord:
        where = f"{self.path}:{name}"
        try:
            source = read_bytes(self.find_member(name))
        except BadRecordError as error:
            raise BadRecordError(f"{where}: {error}") from error
        try:
            fields = parse_object(source)
        except BadRecordError:
            return RawRecord(where, source)  # refused on conversion, like any broken line
        return RawRecord(where, {**images, **fields})


def _check_end(path: Location, members: Sequence[tarfile.TarInfo]) -> None:
    """Raise ValueError if data follow the last member: tarfile stops at a broken header and between two archives."""
    last = max(members, key=lambda member: member.offset_data, default=None)
    end = 0 if last is None else last.offset_data + (last.size + 511) // 512 * 512
    with path.open("rb") as file:
        file.seek(end)
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise ValueError(
                    f"{path} cannot be read after byte {end:,}: no member starts there. Download it again."
                )


def _split_name(name: str) -> tuple[str, str]:
    """Split folder/0001.winner.jpg into folder/0001 and .winner.jpg."""
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{rest}"
