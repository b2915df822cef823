"""A process that stands still ends the job of several, and is named; one that is only slow, or has ended, does not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from rlhf_t2i.distributed.watch import Watch
from tests import processes
from tests.launch import launch_command, small_ddpo
from tests.runs import redness


class Store:
    """A store of one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self.values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self.values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)


class Clock:
    """Seconds that a test counts."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def job() -> tuple[list[Watch], list[str], Callable[..., None]]:
    """Three watches, what they end the job with, and a function that lets time pass."""
    store, clock, ended = Store(), Clock(), list[str]()
    watches = [Watch(store, rank=rank, num_processes=3, seconds=60.0, end=ended.append, now=clock) for rank in range(3)]

    def passing(seconds: int, *, ticking: Sequence[int] = (), stopped: Sequence[int] = ()) -> None:
        for _ in range(seconds // 5):
            clock.now += 5
            for rank, watch in enumerate(watches):
                if rank in ticking:
                    watch.tick()
                if rank not in stopped:
                    watch.beat()

    return watches, ended, passing


Job = tuple[list[Watch], list[str], Callable[..., None]]


def test_a_stopped_process_is_named_after_the_timeout(job: Job) -> None:
    _, ended, passing = job
    passing(100, ticking=(0, 1, 2))
    passing(60, stopped=(1,))
    assert not ended
    passing(10, stopped=(1,))
    assert ended[0].startswith(f"Rank 1 (process {os.getpid()} on ")
    assert "has stood still for 60 s (stall_timeout), so the job is ended" in ended[0]


def test_a_process_that_stops_before_its_first_heartbeat_is_named(job: Job) -> None:
    _, ended, passing = job
    passing(70, ticking=(0, 1), stopped=(2,))
    assert ended[0].startswith("Rank 2 (process unknown")


def test_a_process_that_the_others_wait_for_is_named(job: Job) -> None:
    """Its heart beats, as on a file system that hangs; the others have ticked before a collective call."""
    _, ended, passing = job
    passing(5, ticking=(0, 1, 2))
    passing(5, ticking=(0, 1))
    passing(55)
    assert not ended
    passing(10)
    assert {text[:7] for text in ended} == {"Rank 2 "}


def test_processes_that_are_slow_alike_or_have_ended_are_left_alone(job: Job) -> None:
    watches, ended, passing = job
    passing(600)  # a slow call of a reward
    passing(600, ticking=(0,))  # the others wait for it
    watches[2].stop()
    passing(600, ticking=(0, 1), stopped=(2,))
    assert not ended


def test_a_job_that_slept_as_a_whole_goes_on(job: Job) -> None:
    """As after Ctrl-Z: the first process to wake has seen no other's heart beat."""
    watches, ended, passing = job
    passing(20, ticking=(0, 1, 2))
    passing(600, stopped=(0, 1, 2))
    watches[0].beat()
    passing(20, ticking=(0, 1, 2))
    assert not ended


def stopping(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness; rank 1 stops when it scores the images of the first step, for the third time."""
    stopping.calls = getattr(stopping, "calls", 0) + 1  # type: ignore[attr-defined]
    if os.environ["RANK"] == "1" and stopping.calls == 3:  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGSTOP)
    return redness(images, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "deepspeed_zero3", "fsdp2"])
def test_sigstop_of_a_rank_ends_the_job_with_its_number(mode: str, tiny_sd: Path, tmp_path: Path) -> None:
    config = replace(small_ddpo(tiny_sd, tmp_path / "run"), rewards="tests.test_watch:stopping", stall_timeout=10.0)
    result = processes.run(launch_command(config, f"{mode}.yaml"), timeout=300)
    assert result.returncode != 0
    assert "Rank 1 (process " in result.stdout + result.stderr
    assert "has stood still for 10 s (stall_timeout)" in result.stdout + result.stderr
