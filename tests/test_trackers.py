"""Trackers get the numbers, images, name and settings of a run under clean keys."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_t2i.settings.ddpo import Config
from rlhf_t2i.settings.launch import TRACKERS
from rlhf_t2i.training.trackers import Trackers, name_run, tracker_key

ROW = {"kind": "evaluation", "step": 10, "oracle": 0.5, "oracle/standard_error": 0.1}


class Recorded(GeneralTracker):
    """Keeps what it is given."""

    name = "wandb"
    requires_logging_directory = False
    made: list[Recorded]

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options, self.config = project, options, {}
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.made.append(self)

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.logged.append((values, step))

    log_images = log


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorded)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    return Recorded.made


def trackers(names: list[str], folder: Path, *, resumed_step: int = 0) -> Trackers:
    if not (folder / "run.json").exists():
        (folder / "run.json").write_text("{}")
    config = {"seed": 3, "lora_rank": None}
    return Trackers(Accelerator(cpu=True), names, folder=folder, config=config, resumed_step=resumed_step)


def grid(folder: Path) -> Path:
    Image.fromarray(np.full((8, 16, 3), 200, np.uint8)).save(folder / "grid.png")
    return folder / "grid.png"


def test_wandb_gets_the_name_of_the_run_its_settings_numbers_and_images(wandb: list[Recorded], tmp_path: Path) -> None:
    made = trackers(["wandb"], tmp_path)
    made.log(ROW)
    made.log_image("evaluation/images", grid(tmp_path), step=10)
    (run,) = wandb
    options = {"dir": str(tmp_path), "name": tmp_path.name, "id": run.options["id"], "resume": "allow"}
    assert (run.project, run.options) == ("rlhf-t2i", options)
    assert run.config == {"seed": 3, "lora_rank": "None"}
    (numbers, step), (images, image_step) = run.logged
    assert numbers == {"evaluation/oracle": 0.5, "evaluation/oracle/standard_error": 0.1}
    assert (step, image_step) == (10, 10)
    assert [image.shape for image in images["evaluation/images"]] == [(8, 16, 3)]


def test_a_resumed_run_goes_on_in_wandb_and_one_that_begins_anew_does_not(
    wandb: list[Recorded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for resumed_step in (0, 8, 0):
        trackers(["wandb"], tmp_path, resumed_step=resumed_step).log(ROW)
    first, resumed, anew = (run.options["id"] for run in wandb)
    assert first == resumed != anew
    monkeypatch.setattr("rlhf_t2i.training.trackers.os.environ", {**os.environ, "WANDB_RUN_ID": "mine"})
    name_run(tmp_path, ["wandb"], goes_on=True)
    assert json.loads((tmp_path / "run.json").read_text())["wandb_id"] == "mine"


def test_tensorboard_drops_the_steps_that_a_resumed_run_makes_again(tmp_path: Path) -> None:
    for resumed_step, scores in ((0, {10: 0.1, 20: 0.2, 30: 0.3}), (10, {20: 0.4})):
        made = trackers(["tensorboard"], tmp_path, resumed_step=resumed_step)
        for step, score in scores.items():
            made.log({"kind": "evaluation", "step": step, "oracle": score})
        made.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("evaluation/oracle")] == [
        (10, 0.1),
        (20, 0.4),
    ]


def test_a_run_without_a_row_leaves_nothing_in_a_tracker(wandb: list[Recorded], tmp_path: Path) -> None:
    trackers(["wandb", "tensorboard"], tmp_path)
    assert not wandb
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_tensorboard_shows_one_run_with_numbers_images_and_settings(tmp_path: Path) -> None:
    made = trackers(["tensorboard"], tmp_path)
    made.log(ROW)
    made.log_image("evaluation/images", grid(tmp_path), step=10)
    made.accelerator.end_training()
    assert {path.parent for path in tmp_path.rglob("*tfevents*")} == {tmp_path / "tensorboard"}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["evaluation/oracle", "evaluation/oracle/standard_error"]
    (image,) = events.Images("evaluation/images")
    assert (image.step, image.width, image.height) == (10, 16, 8)
    assert b"seed: 3" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("reward", "train/reward"),
        ("seconds/rollout", "train/seconds/rollout"),
        ("rewards/my_rewards:redness", "train/rewards/my_rewards:redness"),
        ("rewards/llava_reward:/home/me/runs/a/reward_model", "train/rewards/llava_reward:a.reward_model"),
        ("clip:/data/clip/standard_error", "train/clip:data.clip/standard_error"),
        ("http://host:8000", "train/http:host:8000"),
    ],
)
def test_keys_name_no_local_path(key: str, expected: str) -> None:
    assert tracker_key("train", key) == expected


def test_all_trackers_of_accelerate_may_be_named_and_no_other() -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    with pytest.raises(
        ValueError, match=r"trackers is visdom; it must be comma-separated names of wandb, tensorboard,"
    ):
        Config(trackers="visdom")


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trackers is mlflow; it must be installed: pip install mlflow\."):
        Config(trackers="mlflow")
