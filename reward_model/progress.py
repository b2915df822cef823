"""Progress of reward-model training: one bar with accuracy, loss and speed, and a line for each validation."""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

History = list[dict[str, Any]]


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Hide transformers' progress bar of loading weights within the context."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def continue_tensorboard(callbacks: Iterable[TrainerCallback], *, step: int) -> None:
    """Have transformers' TensorBoard, if it is a callback, drop what an earlier process logged after `step`."""
    from transformers.integrations.integration_utils import TensorBoardCallback  # prints when WANDB_MODE is offline

    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            from torch.utils.tensorboard import SummaryWriter  # an extra

            callback.tb_writer = SummaryWriter(callback.logging_dir, purge_step=step + 1)


class Progress(TrainerCallback):
    """Show the progress on the main process, in place of the bars and dictionaries of transformers."""

    def __init__(self, take_num_images: Callable[[], int], *, on_validation: Callable[[History], object]) -> None:
        """`take_num_images` returns the images since it was last called; `on_validation` takes the training log."""
        self.take_num_images, self.on_validation = take_num_images, on_validation
        self._metrics: dict[str, float] = {}
        self._since = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(
            initial=state.global_step, total=state.max_steps, desc="training", disable=not state.is_world_process_zero,
            dynamic_ncols=True,
        )  # fmt: skip
        self._since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar; the speed is of this step, with the loading of its images."""
        seconds, num_images = time.monotonic() - self._since, self.take_num_images()
        texts = [f"{name} {self._metrics[name]:.3f}" for name in ("accuracy", "loss") if name in self._metrics]
        texts += [f"{num_images / seconds:.3g} images/s"] if num_images and seconds > 0 else []
        self._bar.set_postfix_str(", ".join(texts), refresh=False)
        self._bar.update()
        self._since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        found = logs or {}
        self._metrics |= {name: found[name] for name in ("accuracy", "loss") if name in found}
        validation = [f"{name} {found[key]:.3f}" for name in ("accuracy", "loss") if (key := f"eval_{name}") in found]
        if validation and state.is_world_process_zero:
            tqdm.write(
                f"after {state.global_step} step{'s' * (state.global_step != 1)}, validation: {', '.join(validation)}"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hand over the log; the time of a validation is not that of the next step."""
        if state.is_world_process_zero:
            self.on_validation(state.log_history)
        self._since = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()
