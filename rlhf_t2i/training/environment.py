"""Environment of a process: CPU threads, attention and signals of the launcher."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


def set_num_threads(num_cpu_threads: int) -> None:
    """Set the number of CPU threads; 0 is this process's share of the cores."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which accelerate imports, prints a warning
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(num_cpu_threads or max(1, _num_cores() // local))


def prepare_torch(*, attention: str, num_cpu_threads: int) -> None:
    """Choose the backends of torch's attention, as the option `attention` says, and without a GPU the CPU threads."""
    import torch
    from torch.backends import cuda

    cuda.enable_flash_sdp(attention in ("auto", "flash"))
    cuda.enable_mem_efficient_sdp(attention in ("auto", "efficient"))
    cuda.enable_cudnn_sdp(attention == "cudnn")
    cuda.enable_math_sdp(True)
    if not torch.cuda.is_available():
        set_num_threads(num_cpu_threads)


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_with_launcher() -> None:
    """Have Linux send SIGTERM when `accelerate launch` is terminated, which would leave this process running."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def restarted() -> bool:
    """True if `accelerate launch --max_restarts` started this process again after one of the processes had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class StopRequests:
    """Count of SIGTERM and Ctrl-C: the first asks to stop after the current step, the second stops at once."""

    def __init__(self, *, print: Callable[[str], None]) -> None:
        self.count, self.print = 0, print

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Within it signals are counted; afterwards the earlier handlers are back."""
        handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        self.print("Stopping after this step; a checkpoint will be written. Press Ctrl-C again to stop at once.")
