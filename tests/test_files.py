"""Files are written whole, and flushed as far as the system can."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rlhf_t2i.annotation.answers import Answers
from rlhf_t2i.output import files
from tests import processes
from tests.launch import ROOT


def test_a_folder_that_cannot_be_opened_is_not_flushed_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int]] = []
    really_open = os.open

    def windows_open(path: Path, flags: int, mode: int = 0o777) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        opened.append((Path(path).name, flags))
        return really_open(path, flags, mode)

    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    monkeypatch.setattr(os, "open", windows_open)
    files.write_atomically(tmp_path / "a.json", "{}")
    files.flush(tmp_path)
    assert opened == [("a.json.part", os.O_RDWR)], "Windows flushes only a file that may be written"
    Answers(tmp_path, [], seed=0).close()


def test_a_folder_is_claimed_and_answers_are_kept_without_fcntl(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['fcntl'] = None\n"
        "from pathlib import Path\n"
        "from rlhf_t2i.annotation.answers import Answers\n"
        "from rlhf_t2i.training.claim import claim_folder\n"
        f"config = {{'run_folder': {str(tmp_path / 'run')!r}, 'resume': False}}\n"
        "folder = claim_folder(config, recipe='preferences', free_to_change=set())\n"
        "Answers(folder, [], seed=0).close()\n"
    )
    result = processes.run([sys.executable, "-W", "ignore", "-c", code])
    assert result.returncode == 0, result.stderr


def test_no_module_needs_what_only_unix_has() -> None:
    sources = [path for package in ("rlhf_t2i", "reward_model") for path in (ROOT / package).rglob("*.py")]
    assert not [path for path in sources if "import fcntl" in path.read_text()]
