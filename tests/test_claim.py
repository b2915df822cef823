"""Run folders: one living run each, none left by a failed start, and what may change on resuming."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from filelock import FileLock

from recipes import evaluate_reward_model, train_reward_model
from rlhf_t2i.config import parse_config
from rlhf_t2i.errors import is_for_user
from rlhf_t2i.output.run_folder import check_free, read_run_info
from rlhf_t2i.settings import ddpo, evaluate_policy
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


def test_a_removal_that_is_killed_anywhere_leaves_a_folder_to_start_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_after(removals: int, folder: Path) -> bool:
        left, unlink = iter(range(removals)), Path.unlink

        def unlink_or_die(path: Path, **options: bool) -> None:
            if path.is_relative_to(folder) and path.name != ".lock" and next(left, None) is None:
                raise KeyboardInterrupt
            unlink(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink_or_die)
            try:
                remove_failed_starts()
            except KeyboardInterrupt:
                release_folder(folder)
                return True
        return False

    for removals in count():
        folder = tmp_path / str(removals)
        folder.mkdir()
        (folder / "notes.txt").touch()
        claimed(folder)
        if not killed_after(removals, folder):
            break
        claimed(folder, lora_rank=8)
        assert {path.name for path in folder.iterdir()} >= {"notes.txt", "config.yaml", "run.json", ".starting"}
    assert removals == 3  # config.yaml, run.json, .starting


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


def test_the_folder_of_a_start_that_was_killed_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "notes.txt").touch()
    claimed(folder)
    (folder / "start").mkdir()
    release_folder(folder)  # as the system does for a process that is killed
    check_free(folder)
    claimed(folder, lora_rank=8)
    assert not (folder / "start").exists()
    keep_folder(folder)
    assert {path.name for path in folder.iterdir()} >= {"notes.txt", "config.yaml", "run.json"}
    release_folder(folder)
    with pytest.raises(FileExistsError, match="already holds a run"):
        check_free(folder)


def test_a_killed_start_may_be_resumed_which_begins_anew(folder: Path) -> None:
    claimed(folder)
    release_folder(folder)
    claimed(folder, resume=True, lora_rank=8)
    remove_failed_starts()
    assert not folder.exists()


def test_a_taken_folder_is_refused_before_anything_is_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(folder)
    for config_class, choice in (
        (ddpo.Config, "Continue it with --resume"),
        (evaluate_policy.Config, "Choose another"),
    ):
        with pytest.raises(SystemExit):
            parse_config(config_class, arguments=["--run_folder", str(folder)])
        assert capsys.readouterr().err.startswith(f"error: {folder} already holds a run. {choice}")
    assert parse_config(ddpo.Config, arguments=["--run_folder", str(folder), "--resume"]).resume


def test_an_evaluation_without_its_data_leaves_no_run_folder(folder: Path) -> None:
    config = evaluate_reward_model.Config(test_data="nowhere.jsonl", run_folder=str(folder), num_cpu_threads=1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate_reward_model.main(config)
    remove_failed_starts()
    assert not folder.exists()


# --- locks ------------------------------------------------------------------------------------------


def test_a_folder_that_another_process_writes_to_is_refused(folder: Path) -> None:
    finished(folder)
    with FileLock(folder / ".lock"):
        for held_by, named in (("12\nnode-7\n", "process 12 on node-7"), ("", "another process")):
            (folder / ".lock").write_text(held_by)
            with pytest.raises(BlockingIOError, match=rf"^{folder} is in use: {named} still writes to it"):
                claimed(folder, resume=True)
    claimed(folder, resume=True)
    assert (folder / ".lock").read_text().split() == [str(os.getpid()), platform.node()]


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
        with pytest.raises(BlockingIOError, match=rf"process {process.pid} on {platform.node()} still writes to it"):
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


def test_the_same_file_may_be_given_from_another_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    finished(folder, prompts="p.txt", rewards="clip:r,oracle")
    monkeypatch.chdir("/")
    claimed(folder, resume=True, prompts=f"{folder.parent}/p.txt", rewards=f"clip:{folder.parent}/r,oracle")
    with pytest.raises(ValueError, match=r"config: prompts was '.*/p\.txt' and is now '/p\.txt'\.$"):
        claimed(folder, resume=True, prompts="/p.txt", rewards="clip:r,oracle")


@pytest.mark.parametrize(
    ("arguments", "main", "variables", "command"),
    [
        (["recipes/ddpo.py", "--x", "a b"], {"__file__": "ddpo.py"}, {}, "python recipes/ddpo.py --x 'a b'"),
        (["r.py"], {"__file__": "r.py"}, {"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch r.py"),
        (["r.py"], {"__file__": "r.py"}, {"TORCHELASTIC_RUN_ID": "1"}, "torchrun r.py"),
        (["/x/ddpo.py", "-y"], {"__spec__": ModuleSpec("recipes.ddpo", None)}, {}, "python -m recipes.ddpo -y"),
        (["/x/ipykernel_launcher.py", "-f", "k.json"], {}, {}, "an interactive Python session or a notebook"),
    ],
    ids=["script", "accelerate", "torchrun", "module", "notebook"],
)
def test_a_run_records_how_it_was_started(
    arguments: list[str], main: dict[str, Any], variables: dict[str, str], command: str, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    module = ModuleType("__main__")
    vars(module).update(main)
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(sys, "argv", arguments)
    claimed(folder)
    assert read_run_info(folder)["command"] == command


def test_any_other_changed_setting_is_refused_by_name_and_the_folder_is_left(folder: Path) -> None:
    finished(folder)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"another config: lora_rank was 4 and is now 8\.$"):
        claimed(folder, resume=True, lora_rank=8, learning_rate=0.5)
    assert (folder / "config.yaml").read_text() == before
    with FileLock(folder / ".lock", timeout=0):
        pass


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", "\x00"])
@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_damaged_file_of_a_run_is_named_in_one_line(folder: Path, name: str, content: str) -> None:
    finished(folder)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^{folder / name}") as error:
        claimed(folder, resume=True)
    assert is_for_user(error.value)


def test_resume_is_not_a_setting_that_is_stored(folder: Path) -> None:
    finished(folder)
    claimed(folder, resume=True)
    assert "resume" not in yaml.safe_load((folder / "config.yaml").read_text())


def test_the_page_on_resuming_lists_what_may_change() -> None:
    page = (ROOT / "docs" / "resume.md").read_text()
    paragraph = page.split("What may change")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == FREE_TO_CHANGE | {"run_folder"}
    sentence = page.split("newest complete checkpoint; there")[1].split("may change")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == train_reward_model.FREE_TO_CHANGE
