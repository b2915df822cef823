"""A training that is interrupted and resumed ends as one that never stopped."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from recipes import draft
from rlhf_t2i.training.trainer import Trainer
from tests.runs import REDNESS, as_for_toy_models, assert_same, lora_weights, redness, rows

BLUENESS = "tests.test_interruptions:blueness"


def blueness(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus `redness`: best before training, if a model learns redness."""
    return -redness(images, prompts)


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> draft.Config:
    """Three steps, each evaluated, that stop early, as the reward that is held out falls."""
    return draft.Config(
        **as_for_toy_models(
            model=str(tiny_sd), rewards=REDNESS, evaluation_rewards=f"{REDNESS},{BLUENESS}", lora_rank=2,
            early_stop_reward=BLUENESS, patience=2, evaluate_every=1, num_steps=3, prompts_per_step=2,
            num_denoising_steps=2, num_evaluation_images=4, learning_rate=3e-2, warmup_steps=0,
            run_folder=str(tmp_path / "run"), num_cpu_threads=1,
        )
    )  # fmt: skip


def results(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "elapsed"))} for row in found]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have SIGTERM arrive in a training step, counted from 0."""
    finish_step = Trainer.finish_step

    def interrupted(self: Trainer, done: int, **metrics: float | int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGTERM)
        finish_step(self, done, **metrics)

    monkeypatch.setattr(Trainer, "finish_step", interrupted)


def test_an_evaluation_that_sigterm_put_off_is_made_when_the_run_resumes(
    config: draft.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = draft.main(config)
    stopped = replace(config, run_folder=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        folder = draft.main(stopped)
    assert [row["step"] for row in rows(folder, "evaluation")] == [0, 1]
    log = (folder / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            draft.main(replace(stopped, resume=True))
    # As if it was killed between the evaluation and the next checkpoint.
    (folder / "metrics.jsonl").write_text(log + json.dumps({**rows(folder, "evaluation")[-1], "step": 2}) + "\n")
    draft.main(replace(stopped, resume=True))
    assert results(folder) == results(uninterrupted)
    assert_same(lora_weights(folder), lora_weights(uninterrupted))


def test_the_evaluation_of_exported_weights_is_made_once_and_keeps_its_step(config: draft.Config) -> None:
    """The best is that before training; neither its numbers nor its images take the place of the last step's."""
    config = replace(config, patience=3, max_image_grids=3)
    folder = draft.main(config)
    assert [row["step"] for row in rows(folder, "evaluation")] == [0, 1, 2, 3]
    assert [row["step"] for row in rows(folder, "export")] == [0]
    grids = {path.name: path.read_bytes() for path in (folder / "images").glob("step_*.png")}
    assert len(grids) == 3
    assert grids.keys() > {"step_000000.png", "step_000003.png"}
    before = results(folder)
    draft.main(replace(config, resume=True))
    assert results(folder) == before
    assert {path.name: path.read_bytes() for path in (folder / "images").glob("step_*.png")} == grids
    assert "the exported weights are those before training" in (folder / "report.html").read_text()


def test_damaged_files_of_earlier_evaluations_end_no_resumed_training(
    config: draft.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = draft.main(replace(config, num_steps=1))
    image, log = folder / "images" / "step_000000.png", folder / "metrics.jsonl"
    image.write_bytes(image.read_bytes()[:-30])
    first, *others = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + b'{"kind": "\xff\n' + b"".join(others) + b'{"kind": "tra')
    capsys.readouterr()
    draft.main(replace(config, resume=True))
    said = capsys.readouterr().out
    assert (
        f'{log}:2 is not a row of a run: b\'{{"kind": "\\xff\'; metrics.jsonl.damaged keeps it, and it is left out'
        in said
    )
    assert f'{log}:6 is not a row of a run: b\'{{"kind": "tra\'; cut by a crash, it is left out' in said
    assert [row["step"] for row in rows(folder, "train")] == [1, 2]
    assert (folder / "metrics.jsonl.damaged").is_file()
    assert "because they are damaged: step_000000.png" in (folder / "report.html").read_text()


def test_a_report_that_cannot_be_written_ends_no_training(
    config: draft.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(draft, "write_report", lambda folder: json.loads("{"))
    folder = draft.main(replace(config, num_steps=1, early_stop_reward=None))
    assert "WARNING: the report could not be written (JSONDecodeError: Expecting" in capsys.readouterr().out
    assert lora_weights(folder)


def interrupt(trainer: Trainer) -> None:
    raise KeyboardInterrupt
