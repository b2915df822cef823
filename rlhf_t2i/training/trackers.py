"""Experiment trackers: numbers, evaluation images and settings of a run, sent to wandb, TensorBoard and others."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, on_main_process

from reward_model.image_files import open_image
from rlhf_t2i.output.run_folder import read_run_info, update_run_info
from rlhf_t2i.training.metrics import ERROR

_PROJECT = "rlhf-t2i"
_WANDB_ID = "wandb_id"
"""Key of run.json."""


class _TensorBoard(TensorBoardTracker):
    """accelerate's tracker with the settings as text: as hyperparameters they would be two more runs, named by time."""

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        self.writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))


class Trackers:
    """The trackers of one run. The first row starts them, so that a start that fails leaves nothing in them."""

    def __init__(
        self, accelerator: Accelerator, names: Sequence[str], *, folder: Path, config: Mapping[str, Any],
        resumed_step: int = 0,
    ) -> None:  # fmt: skip
        """Log to the trackers of these names, as the run `folder.name` of the project rlhf-t2i.

        A run that resumes after `resumed_step` steps goes on in wandb and TensorBoard, which drops later steps.
        """
        self.resumed_step = resumed_step
        self.accelerator, self.names, self.folder, self.config = accelerator, list(names), folder, config
        self.is_started = False

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row of metrics.jsonl."""
        if not self.names:
            return
        self._start()
        numbers = {tracker_key(row["kind"], key): value for key, value in row.items() if key not in ("kind", "step")}
        self.accelerator.log(numbers, step=row["step"])

    def log_image(self, key: str, path: Path, *, step: int) -> None:
        """Log an image file to the trackers that show images, which are wandb and TensorBoard."""
        for tracker in self.accelerator.trackers if self.names else []:
            if tracker.name in ("wandb", "tensorboard"):
                with open_image(path) as image:
                    pixels = np.asarray(image.convert("RGB"))[None]
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({key: pixels}, step=step, **options)

    def _start(self) -> None:
        if self.is_started:
            return
        self.is_started = True
        _never_ask_for_a_login()
        self.accelerator.project_configuration.set_directories(str(self.folder))
        purge: dict[str, Any] = {"purge_step": self.resumed_step + 1} if self.resumed_step else {}
        board = _TensorBoard("tensorboard", self.folder, **purge) if "tensorboard" in self.names else None
        chosen: list[str | GeneralTracker] = [name for name in self.names if name != "tensorboard"]
        self.accelerator.log_with = [*chosen, *([board] if board else [])]  # pyright: ignore[reportAttributeAccessIssue]
        config = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in self.config.items()}
        options = _options(self.folder)
        if "wandb" in self.names and self.accelerator.is_main_process:
            options["wandb"] |= {"id": _wandb_id(self.folder, goes_on=self.resumed_step > 0), "resume": "allow"}
        self.accelerator.init_trackers(os.environ.get("WANDB_PROJECT", _PROJECT), config=config, init_kwargs=options)


def name_run(folder: Path, names: Sequence[str], *, goes_on: bool) -> None:
    """Set the environment variables by which transformers' trainer finds the project and folder of wandb and others."""
    if "wandb" in names and PartialState().is_main_process:
        os.environ.setdefault("WANDB_RUN_ID", _wandb_id(folder, goes_on=goes_on))
        os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_PROJECT", _PROJECT)
    _never_ask_for_a_login()


def tracker_key(kind: str, key: str) -> str:
    """Return the name of a number: KIND/KEY, with at most two folders of a path in the name of a reward."""
    name, error = (key.removesuffix(ERROR), ERROR) if key.endswith(ERROR) else (key, "")
    reward, colon, path = name.partition(":")
    end = ".".join([part for part in path.split("/") if part][-2:])  # trackers group names by their slashes
    return f"{kind}/{reward}{colon}{end}{error}"


def _options(folder: Path) -> dict[str, dict[str, str]]:
    """Return the keywords of each tracker that name the run."""
    return {
        "wandb": {"dir": str(folder), "name": os.environ.get("WANDB_NAME", folder.name)},
        "trackio": {"name": folder.name},
        "mlflow": {"run_name": folder.name},
        "clearml": {"task_name": folder.name},
        "swanlab": {"experiment_name": folder.name},
    }


def _wandb_id(folder: Path, *, goes_on: bool) -> str:
    """Return the id of a run in wandb: the user's, that of the run that goes on, or a new one, kept in run.json."""
    earlier = read_run_info(folder).get(_WANDB_ID) if goes_on else None
    found = os.environ.get("WANDB_RUN_ID") or earlier or secrets.token_hex(8)
    update_run_info(folder, {_WANDB_ID: found})
    return found


def _never_ask_for_a_login() -> None:
    """Have wandb write to disk unless it can log in without asking."""
    netrc = Path.home() / ".netrc"
    has_login = netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")
    if "WANDB_API_KEY" not in os.environ and not has_login:
        os.environ.setdefault("WANDB_MODE", "offline")
