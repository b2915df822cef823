"""A crash at any moment leaves a complete checkpoint, which is found again."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.training import checkpoint_files
from rlhf_t2i.training.checkpoint_files import begin, checkpoint_name, checkpoint_step, commit, newest_complete


def save(folder: Path, step: int, *, keep: int = 10) -> Path:
    """Write a checkpoint of two files, one of them in a subfolder."""
    part = begin(folder, step)
    (part / "weights.bin").write_bytes(bytes(range(256)) * 40 + str(step).encode())
    (part / "optimizer").mkdir()
    (part / "optimizer" / "state.bin").write_bytes(b"momentum")
    return commit(part, keep=keep)


def found(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and the messages about those skipped."""
    messages: list[str] = []
    return newest_complete(folder, report=messages.append), messages


def flip_a_byte(path: Path) -> None:
    content = bytearray((path / "weights.bin").read_bytes())
    content[5000] ^= 1
    (path / "weights.bin").write_bytes(content)


def cut_short(path: Path) -> None:
    (path / "weights.bin").write_bytes((path / "weights.bin").read_bytes()[:-1])


def test_the_newest_is_found_by_step_not_by_name_or_age(tmp_path: Path) -> None:
    newest = save(tmp_path, 1_000_000)
    save(tmp_path, 999_999)
    save(tmp_path, 20)
    assert found(tmp_path) == (newest, [])
    assert newest.name == "step_1000000"


def test_a_committed_checkpoint_has_its_files_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = save(tmp_path, 120)
    assert path == tmp_path / "step_000120"
    assert (path / "optimizer" / "state.bin").read_bytes() == b"momentum"
    assert (path / "weights.bin").stat().st_size == 256 * 40 + 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000120"]


def test_names_and_steps_are_inverse() -> None:
    assert [checkpoint_step(Path("runs") / checkpoint_name(step)) for step in (0, 7, 10**7)] == [0, 7, 10**7]


def test_without_a_checkpoint_none_is_found(tmp_path: Path) -> None:
    assert found(tmp_path / "nothing") == (None, [])
    assert found(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (flip_a_byte, "weights.bin does not match its checksum"),
        (cut_short, "weights.bin does not match its checksum"),
        (lambda path: (path / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda path: shutil.rmtree(path / "optimizer"), "optimizer/state.bin is missing"),
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest, so it is incomplete"),
    ],
    ids=["flipped byte", "cut short", "missing file", "missing folder", "missing manifest"],
)
def test_a_damaged_checkpoint_is_skipped_and_its_fault_named(
    tmp_path: Path, harm: Callable[[Path], None], fault: str
) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    harm(newer)
    assert found(tmp_path) == (older, [f"Skipped the checkpoint {newer}: {fault}."])


@pytest.mark.parametrize(
    "content",
    [b"", b'{"weights.bin": "12', b"\0" * 64, b"\xff\xfe\x00", b"[]", b"null", b'{"weights.bin": 3}'],
    ids=["empty", "cut short", "zeros", "not UTF-8", "a list", "null", "no checksum"],
)
def test_a_checkpoint_with_an_unreadable_manifest_is_skipped_and_named(tmp_path: Path, content: bytes) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    (newer / "manifest.json").write_bytes(content)
    path, messages = found(tmp_path)
    assert path == older
    assert len(messages) == 1
    assert str(newer) in messages[0]
    assert "manifest cannot be read" in messages[0] or content == b'{"weights.bin": 3}'


def test_an_unfinished_folder_does_not_count(tmp_path: Path) -> None:
    older = save(tmp_path, 10)
    (begin(tmp_path, 20) / "weights.bin").write_bytes(b"half")
    assert found(tmp_path) == (older, [])


def test_other_files_and_folders_do_not_count(tmp_path: Path) -> None:
    older = save(tmp_path, 10)
    (tmp_path / "step_000030").write_text("a file")
    shutil.copytree(older, tmp_path / "step_best")
    assert found(tmp_path) == (older, [])


def test_all_damaged_means_none_and_each_is_named(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (10, 20)]
    for path in paths:
        flip_a_byte(path)
    path, messages = found(tmp_path)
    assert path is None
    assert len(messages) == 2
    assert str(paths[1]) in messages[0]
    assert str(paths[0]) in messages[1]


def test_the_manifest_covers_every_file(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 1) / "manifest.json").read_text())
    assert set(manifest) == {"weights.bin", "optimizer/state.bin"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000015", "step_000020"]


def test_a_damaged_newer_checkpoint_does_not_displace_the_one_just_written(tmp_path: Path) -> None:
    """Step 20 is damaged, so training resumes from 10 and is stopped at 15, the only complete checkpoint then."""
    save(tmp_path, 10, keep=1)
    flip_a_byte(save(tmp_path, 20, keep=2))
    written = save(tmp_path, 15, keep=1)
    assert found(tmp_path)[0] == written


def test_a_checkpoint_is_written_over_an_older_attempt(tmp_path: Path) -> None:
    (begin(tmp_path, 10) / "leftover.bin").write_bytes(b"of a crash")
    damaged = save(tmp_path, 10)
    assert not (damaged / "leftover.bin").exists()
    flip_a_byte(damaged)
    assert found(tmp_path)[0] is None
    assert save(tmp_path, 10) == damaged
    assert found(tmp_path) == (damaged, [])


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_writing_leaves_the_older_checkpoint_complete(tmp_path: Path) -> None:
    older = save(tmp_path, 10, keep=1)

    def write_until_full() -> None:
        part = begin(tmp_path, 20)
        (part / "weights.bin").write_bytes(b"half")
        no_space()

    with pytest.raises(OSError, match="No space left"):
        write_until_full()
    assert found(tmp_path) == (older, [])
    newer = save(tmp_path, 20, keep=1)
    assert found(tmp_path) == (newer, [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_000020"]


@pytest.mark.parametrize("moment", ["flush", "sha256_of", "write_text", "rename"])
def test_a_fault_at_any_moment_of_a_commit_leaves_the_older_checkpoint_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    older = save(tmp_path, 10, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files if hasattr(checkpoint_files, moment) else Path, moment, no_space)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 20, keep=1)
    assert found(tmp_path) == (older, [])


def test_all_files_are_flushed_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders too, or a crash could lose a file's entry in its folder."""
    flushed: list[str] = []
    renamed: list[int] = []
    rename = Path.rename

    def note_flush(path: Path) -> None:
        flushed.append(path.name)

    def note_rename(path: Path, target: Path) -> Path:
        renamed.append(len(flushed))
        return rename(path, target)

    monkeypatch.setattr(checkpoint_files, "flush", note_flush)
    monkeypatch.setattr(Path, "rename", note_rename)
    save(tmp_path, 10)
    before, after = flushed[: renamed[0]], flushed[renamed[0] :]
    assert sorted(before) == sorted(["weights.bin", "state.bin", "manifest.json", "optimizer", "step_000010.part"])
    assert after == [tmp_path.name]
