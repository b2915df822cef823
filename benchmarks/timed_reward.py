"""A smooth reward that any trainer can climb, and a stop-watch: trainers ask it once for each batch, so it can tell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_generator = torch.Generator().manual_seed(0)
_FIRST, _SECOND, _LAST = (
    torch.randn(shape, generator=_generator) / fan_in**0.5
    for shape, fan_in in (((16, 3, 5, 5), 75), ((16, 16, 5, 5), 400), ((16,), 16))
)


def peak_megabytes() -> float:
    """The most memory that this process held so far. (`ru_maxrss` would start at that of the process it came from.)"""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How much images in [0, 1] please a small network with random weights, which does not read.

    Writes a line into the file that the variable TIMES names, if it is set. A call for one image is a mere trial.
    """
    del prompts
    if "TIMES" in os.environ and len(images) > 1:
        facts = {
            "wall": time.monotonic(), "cpu": time.process_time(), "images": len(images),
            "megabytes": peak_megabytes(),
        }  # fmt: skip
        with Path(os.environ["TIMES"]).open("a") as file:
            file.write(json.dumps(facts) + "\n")
    first = F.conv2d(2 * images - 1, _FIRST.to(images), stride=2, padding=2).tanh()
    second = F.conv2d(first, _SECOND.to(images), stride=2, padding=2).tanh()
    return second.mean(dim=(2, 3)) @ _LAST.to(images)
