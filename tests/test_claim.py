"""Run folders: one living run each, none left by a failed start, and what may change on resuming."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from recipes import evaluate_reward_model
from rlhf_t2i.training import claim
from rlhf_t2i.training.claim import claim_folder, keep_folder, release_folder, remove_failed_starts
from rlhf_t2i.training.run import FREE_TO_CHANGE
from tests import processes
from tests.launch import ROOT, environment


@pytest.fixture(autouse=True)
def no_claims() -> Iterator[None]:
    yield
    remove_failed_starts()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def claimed(folder: Path | None, *, checkpoints: bool = True, **changes: Any) -> Path:
    given = {"run_folder": str(folder) if folder else None, "resume": False, "learning_rate": 0.1, "lora_rank": 4}
    return claim_folder({**given, **changes}, recipe="ddpo", free_to_change={"learning_rate"}, checkpoints=checkpoints)


def finished(folder: Path, **changes: Any) -> Path:
    """A folder with a run that has ended."""
    keep_folder(claimed(folder, **changes))
    release_folder(folder)
    return folder


# --- failed starts ----------------------------------------------------------------------------------


def test_a_start_that_fails_leaves_no_run_folder(folder: Path) -> None:
    claimed(folder)
    (folder / "images").mkdir()
    (folder / "images" / "0.png").touch()
    remove_failed_starts()
    assert not folder.exists()


def test_a_start_that_fails_removes_nothing_but_its_own(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").touch()
    claimed(folder)
    remove_failed_starts()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_run_with_results_and_a_resumed_one_are_kept(folder: Path) -> None:
    keep_folder(claimed(folder))
    remove_failed_starts()
    assert (folder / "config.yaml").is_file()
    claimed(folder, resume=True)
    remove_failed_starts()
    assert (folder / "config.yaml").is_file()


def test_a_process_may_start_again_in_the_folder_of_its_failed_start(folder: Path) -> None:
    claimed(folder)
    claimed(folder, lora_rank=8)
    assert yaml.safe_load((folder / "config.yaml").read_text())["lora_rank"] == 8
    remove_failed_starts()
    assert not folder.exists()


def test_an_evaluation_without_its_data_leaves_no_run_folder(folder: Path) -> None:
    config = evaluate_reward_model.Config(test_data="nowhere.jsonl", run_folder=str(folder), num_cpu_threads=1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_reward_model.main(config)
    remove_failed_starts()
    assert not folder.exists()


# --- locks ------------------------------------------------------------------------------------------


def test_a_folder_that_another_process_writes_to_is_refused(folder: Path) -> None:
    finished(folder)
    refused = pytest.raises(BlockingIOError, match=rf"^{folder} is in use: another process still writes to it")
    with FileLock(folder / ".lock"), refused:
        claimed(folder, resume=True)
    claimed(folder, resume=True)


@pytest.mark.slow
def test_the_lock_of_a_killed_process_does_not_block(folder: Path) -> None:
    finished(folder)
    code = (
        f"import signal\n"
        f"from rlhf_t2i.training.claim import claim_folder\n"
        f"config = {{'run_folder': {str(folder)!r}, 'resume': True, 'learning_rate': 0.1, 'lora_rank': 4}}\n"
        f"claim_folder(config, recipe='ddpo', free_to_change=set())\n"
        f"print('claimed', flush=True)\n"
        f"signal.pause()"
    )
    command = [sys.executable, "-c", code]
    with processes.start(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as process, process.stdout:
        assert process.stdout.readline().strip() == b"claimed"
        with pytest.raises(BlockingIOError):
            claimed(folder, resume=True)
        process.kill()
    claimed(folder, resume=True)


def test_a_restarted_process_waits_until_its_predecessor_has_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float] = []
    acquire = FileLock.acquire
    monkeypatch.setattr(
        claim.FileLock, "acquire", lambda lock, timeout: (timeouts.append(timeout), acquire(lock, timeout=timeout))
    )
    finished(folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    claimed(folder)
    assert timeouts == [0, 60]


# --- resuming ---------------------------------------------------------------------------------------


def test_resume_alone_takes_the_newest_run_that_has_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no run to resume: no folder runs/ddpo-\* exists"):
        claimed(None, resume=True)
    first, second, third = (finished(Path(f"runs/ddpo-2026010{day}-120000-7")) for day in (1, 2, 3))
    with pytest.raises(FileNotFoundError, match=r"no run to resume: no folder runs/ddpo-\* has a checkpoint"):
        claimed(None, resume=True)
    for folder, name in ((first, "step_000010"), (second, "checkpoint-20"), (third, "step_000010.part")):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert claimed(None, resume=True) == second
    assert claimed(None, resume=True, checkpoints=False) == third


def test_a_setting_that_may_change_is_reported_with_both_values(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(folder)
    claimed(folder, resume=True, learning_rate=0.5)
    assert capsys.readouterr().out == "Changed on resuming: learning_rate 0.1 -> 0.5\n"
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 0.5


def test_any_other_changed_setting_is_refused_by_name_and_the_folder_is_left(folder: Path) -> None:
    finished(folder)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"another config: lora_rank was 4 and is now 8\.$"):
        claimed(folder, resume=True, lora_rank=8, learning_rate=0.5)
    assert (folder / "config.yaml").read_text() == before
    with FileLock(folder / ".lock", timeout=0):
        pass


def test_resume_is_not_a_setting_that_is_stored(folder: Path) -> None:
    finished(folder)
    claimed(folder, resume=True)
    assert "resume" not in yaml.safe_load((folder / "config.yaml").read_text())


def test_the_page_on_resuming_lists_what_may_change() -> None:
    page = (ROOT / "docs" / "resume.md").read_text()
    paragraph = page.split("What may change")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == FREE_TO_CHANGE | {"run_folder"}
