"""A fault on one of several processes is handled by all: none waits forever, and none continues alone."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes import ddpo
from rlhf_t2i.training.checkpoint_files import newest_complete
from tests import processes
from tests.launch import launch_command, small_ddpo
from tests.runs import redness
from tests.servers import free_port

CALLS = count(1)
SECOND_STEP = 4
"""Call of a reward in the second step: it is also called when it is tried and by the evaluation before training."""


def is_faulty_process() -> bool:
    return os.environ.get("RANK", "0") == os.environ["FAULTY_RANK"]


def failed(config: ddpo.Config, accelerate_config: str, *options: str) -> str:
    """The output of a run that must fail within five minutes."""
    result = processes.run(launch_command(config, accelerate_config, *options), timeout=300)
    assert result.returncode != 0
    return result.stdout + result.stderr


def filling_the_disk(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness; from the second step on the faulty process can write only 4 kB to a file."""
    if is_faulty_process() and next(CALLS) == SECOND_STEP:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return redness(images, prompts)


@pytest.mark.slow
def test_a_full_disk_on_one_process_ends_all_with_the_reason(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process prints the reason; the checkpoint before remains the newest complete one."""
    monkeypatch.setenv("FAULTY_RANK", "1")
    config = replace(small_ddpo(tiny_sd, tmp_path / "run"), rewards="tests.test_faults:filling_the_disk")
    output = failed(config, "fsdp2.yaml")
    assert "The checkpoint after step 2 could not be written" in output
    assert os.strerror(errno.EFBIG) in output
    assert f"--resume --run_folder {tmp_path / 'run'}" in output
    newest = newest_complete(tmp_path / "run" / "checkpoints", report=print)
    assert newest is not None
    assert newest.name == "step_000001"


def dying(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if is_faulty_process() and next(CALLS) == SECOND_STEP:
        (Path(os.environ["DIED"])).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return redness(images, prompts)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_within_a_minute_and_is_named(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_RANK", "1")
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    for attempt in ("run", "again"):
        config = replace(small_ddpo(tiny_sd, tmp_path / attempt), rewards="tests.test_faults:dying")
        output = failed(config, "deepspeed_zero3.yaml")
        assert time.time() - float((tmp_path / "died").read_text()) < 60
        if "ProcessLookupError" not in output:  # of torch's launcher, which signals a process that has just ended
            break
    assert "local_rank: 1" in output
    assert "SIGKILL" in output


def not_a_number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = redness(images, prompts)
    return scores * torch.nan if is_faulty_process() else scores


@pytest.mark.slow
def test_a_nan_reward_on_one_process_ends_all_and_its_prompt_is_named(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_RANK", "1")
    output = failed(
        replace(small_ddpo(tiny_sd, tmp_path / "run"), rewards="tests.test_faults:not_a_number"), "ddp.yaml"
    )
    assert "The reward 'tests.test_faults:not_a_number' returned nan for the prompt 'a" in output


def test_a_port_in_use_is_named(tiny_sd: Path, tmp_path: Path) -> None:
    """With several machines the port cannot be chosen by the launcher."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port := free_port()))
        taken.listen()
        output = failed(small_ddpo(tiny_sd, tmp_path / "run"), "multi_node.yaml", "--main_process_port", str(port))
    assert f"port `{port}`, but another process is utilizing it" in " ".join(output.split())
