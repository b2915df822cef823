"""Checkpoints of a reward model's training, and what it goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import train_reward_model
from reward_model.checkpoint_files import newest_checkpoint, seal
from rlhf_t2i.training.fingerprints import record_distribution


def test_incomplete_and_damaged_checkpoints_are_skipped(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text(str(step))
    for step in (2, 4, 6):
        seal(tmp_path / f"checkpoint-{step}")

    def found() -> tuple[Path | None, list[str]]:
        reasons: list[str] = []
        newest = newest_checkpoint(tmp_path, report=reasons.append)
        return newest, [reason.removeprefix(f"Skipped the checkpoint {tmp_path}/checkpoint-") for reason in reasons]

    incomplete = "10: it has no complete.json, so it is incomplete."
    assert found() == (tmp_path / "checkpoint-6", [incomplete])
    (tmp_path / "checkpoint-6" / "weights").write_text("7")
    damaged = "6: weights does not match its checksum."
    assert found() == (tmp_path / "checkpoint-4", [incomplete, damaged])
    (tmp_path / "checkpoint-4" / "weights").unlink()
    assert found() == (tmp_path / "checkpoint-2", [incomplete, damaged, "4: weights is missing."])
    (tmp_path / "checkpoint-2" / "complete.json").write_bytes(b"\xff[")
    assert found()[0] is None
    assert found()[1][-1] == "2: its complete.json cannot be read."


def test_a_checkpoint_whose_best_weights_are_damaged_is_passed_over(tmp_path: Path) -> None:
    for step, best in ((2, None), (4, 4), (6, 4)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(str(step))
        state = {"best_model_checkpoint": best and f"elsewhere/checkpoint-{best}"}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        seal(folder)
    assert newest_checkpoint(tmp_path, report=pytest.fail) == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-4" / "weights").write_text("5")
    reasons: list[str] = []
    assert newest_checkpoint(tmp_path, report=reasons.append) == tmp_path / "checkpoint-2"
    assert "best weights so far are in checkpoint-4, and weights does not match its checksum" in reasons[0]


def test_fsdp_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU accelerate would silently make it DDP; on a GPU a checkpoint would hold one process's shard."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP does not train reward models; use accelerate_configs/deepspeed"):
        train_reward_model.main(train_reward_model.Config(run_folder=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_training_goes_on_with_the_processes_that_it_began_with_only(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    record_distribution(tmp_path, "ZeRO-2", is_resumed=False)
    record_distribution(tmp_path, "ZeRO-2", is_resumed=True)
    with pytest.raises(ValueError, match="began with ZeRO-2 on 1 process and would go on with DDP on 1 process"):
        record_distribution(tmp_path, "DDP", is_resumed=True)
    record_distribution(tmp_path, "DDP", is_resumed=False)  # nothing is resumed
    assert json.loads((tmp_path / "run.json").read_text())["distribution"] == "DDP on 1 process"
