"""What training a reward model shows: one progress bar with measured numbers, no noise of libraries, and a report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from reward_model import progress
from reward_model.progress import Progress, continue_tensorboard
from rlhf_t2i.distributed.processes import start_processes
from rlhf_t2i.report.reward_model import headline, history_charts, record_history, write_report
from tests.report_files import RUN_INFO, Page, run_folder

HISTORY: list[dict[str, Any]] = [
    {"loss": 0.7, "accuracy": 0.5, "epoch": 0.1, "step": 10},
    {"eval_loss": 0.6, "eval_accuracy": 0.75, "step": 10},
    {"loss": 0.4, "accuracy": 0.9, "epoch": 0.2, "step": 20},
    {"eval_loss": 0.5, "eval_accuracy": 0.625, "step": 20},
]
METRICS = {
    "validation": [
        {"name": "accuracy", "value": 0.75, "low": 0.5, "high": 0.875, "count": 8, "note": "0 tied"},
        {"name": "auroc", "value": None, "low": None, "high": None, "count": 8, "note": "undefined: <b>"},
    ]
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_the_bar_shows_the_speed_of_training_alone(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """8 images in 40 s are 0.2 images/s, which was 0; neither a validation nor a checkpoint counts."""
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=2, log_history=HISTORY)
    validated: list[Any] = []
    shown = Progress(lambda: 8, on_validation=validated.append)
    shown.on_train_begin(None, state, None)
    clock.now = 40.0
    shown.on_step_end(None, state, None)
    assert shown._bar.postfix == "0.2 images/s"
    shown.on_log(None, state, None, logs={"loss": 0.5, "accuracy": 0.75, "grad_norm": 3.0})
    clock.now, state.global_step = 1000.0, 1
    shown.on_log(None, state, None, logs={"eval_loss": 0.25, "eval_accuracy": 0.875, "eval_runtime": 9.0})
    shown.on_evaluate(None, state, None)
    clock.now = 2000.0
    shown.on_save(None, state, None)
    clock.now = 2002.0
    shown.on_step_end(None, state, None)
    assert shown._bar.postfix == "accuracy 0.750, loss 0.500, 4 images/s"
    shown.on_train_end(None, state, None)
    assert validated == [HISTORY]
    printed = capsys.readouterr()
    assert "after 1 step, validation: accuracy 0.875, loss 0.250" in printed.out + printed.err


def test_a_run_writes_its_log_and_its_report(reward_model_run: Path) -> None:
    """The report and the training log are written at each validation, and the metrics at the end."""
    assert (reward_model_run / "history.json").is_file()
    page = Page((reward_model_run / "report.html").read_text())
    assert "Validation accuracy is" in page.text
    assert "accuracy_ties_wrong" in page.text


def test_the_report_has_metrics_curves_and_the_best_validation(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [], run={**RUN_INFO, "recipe": "reward_model", "command": "x <script>"})
    write_report(folder)
    assert "No validation has finished yet." in Page((folder / "report.html").read_text()).text
    record_history(folder, HISTORY)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    html = write_report(folder).read_text()
    page = Page(html)
    assert "Validation accuracy is 0.750 after 10 steps, the highest of 2 validations." in page.text
    assert "0.500 to 0.875" in page.text
    assert html.count("<script") == 1, "the page's own; that of the command is escaped"
    assert "<b>" not in html.partition("</table>")[0].partition("<table>")[2]
    assert page.links == []
    assert [chart.title for chart in history_charts(HISTORY)] == ["accuracy", "loss"]
    assert headline(HISTORY[:2]).endswith("0.750 after 10 steps, the only validation")


def test_a_damaged_file_of_an_earlier_evaluation_ends_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path, [], run={**RUN_INFO, "recipe": "reward_model"})
    (folder / "metrics.json").write_text('{"validation": [{}]}')
    record_history(folder, HISTORY)
    assert "WARNING: the report could not be written (ValueError: " in "".join(capsys.readouterr())
    assert json.loads((folder / "history.json").read_text()) == HISTORY


def test_the_command_writes_the_report_of_a_reward_model(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, [], run={**RUN_INFO, "recipe": "reward_model"})
    record_history(folder, HISTORY)
    (folder / "report.html").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_t2i.report", "--runs", str(folder)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(folder / "report.html")), done.stderr


def test_a_slower_kernel_of_torch_is_no_warning() -> None:
    """Trained weights are float32 beside activations in half precision."""
    start_processes("no")
    torch.set_warn_always(True)
    try:
        F.rms_norm(torch.ones(2, 8, dtype=torch.bfloat16), (8,), torch.ones(8))
    finally:
        torch.set_warn_always(False)


def test_tensorboard_drops_the_steps_that_a_resumed_training_makes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    for resumed_step, losses in ((None, {1: 0.1, 2: 0.2, 3: 0.3}), (1, {2: 0.4})):
        callback = TensorBoardCallback()
        if resumed_step is not None:
            continue_tensorboard([callback], step=resumed_step)
        callback.on_train_begin(TrainingArguments(), TrainerState(), TrainerControl())
        for step, loss in losses.items():
            callback.on_log(TrainingArguments(), TrainerState(global_step=step), TrainerControl(), {"loss": loss})
        callback.on_train_end(TrainingArguments(), TrainerState(), TrainerControl())
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")] == [(1, 0.1), (2, 0.4)]
