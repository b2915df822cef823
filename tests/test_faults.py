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
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recipes import ddpo
from rlhf_t2i.rewards.builtin import oracle_graded
from rlhf_t2i.training.checkpoint_files import newest_complete
from tests import processes
from tests.launch import SMALL_DDPO, launch, launch_command
from tests.runs import rows, state
from tests.servers import free_port

CALLS = count(1)
FIRST_STEP, SECOND_STEP = 3, 4
"""Calls of a reward in training, after the one by which it is tried and that of the evaluation before training."""


def is_faulty_process() -> bool:
    return os.environ.get("RANK", "0") == os.environ["FAULTY_RANK"]


def with_nan_gradients(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The oracle; on the faulty process all gradients of the first step are NaN."""

    def make_nan(module: nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__.endswith("UNet2DConditionModel") and output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient * torch.nan)

    if is_faulty_process():
        call = next(CALLS)
        if call == FIRST_STEP:
            with_nan_gradients.hook = nn.modules.module.register_module_forward_hook(make_nan)  # type: ignore[attr-defined]
        elif call == SECOND_STEP:
            with_nan_gradients.hook.remove()  # type: ignore[attr-defined]
    return oracle_graded(images, prompts)


@pytest.mark.slow
def test_an_update_with_nan_on_one_process_is_skipped_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is as if it had been the first, with every strategy; ZeRO-1 skips as ZeRO-2 does."""
    config = replace(SMALL_DDPO, rewards="tests.test_faults:with_nan_gradients", num_steps=2, microbatch_size=16)
    monkeypatch.setenv("FAULTY_RANK", "0")
    single = launch(replace(config, run_folder=str(tmp_path / "single")))
    monkeypatch.setenv("FAULTY_RANK", "1")
    runs = [
        launch(replace(config, run_folder=str(tmp_path / mode)), f"{mode}.yaml")
        for mode in ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
    ]
    for run in (single, *runs):
        assert [row["skipped_updates"] for row in rows(run, "train")] == [2, 0]
        assert_close(state(run, 2)[0], state(single, 2)[0], rtol=0, atol=1e-5)


def failed(config: ddpo.Config, accelerate_config: str, *options: str) -> str:
    """The output of a run that must fail within five minutes."""
    result = processes.run(launch_command(config, accelerate_config, *options), timeout=300)
    assert result.returncode != 0
    return result.stdout + result.stderr


def filling_the_disk(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The oracle; from the second step on the faulty process can write only 4 kB to a file."""
    if is_faulty_process() and next(CALLS) == SECOND_STEP:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return oracle_graded(images, prompts)


@pytest.mark.slow
def test_a_full_disk_on_one_process_ends_all_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process prints the reason; the checkpoint before remains the newest complete one."""
    monkeypatch.setenv("FAULTY_RANK", "1")
    config = replace(SMALL_DDPO, rewards="tests.test_faults:filling_the_disk", run_folder=str(tmp_path / "run"))
    output = failed(config, "deepspeed_zero3.yaml")
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
    return oracle_graded(images, prompts)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_within_a_minute_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_RANK", "1")
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    config = replace(SMALL_DDPO, rewards="tests.test_faults:dying", run_folder=str(tmp_path / "run"))
    output = failed(config, "deepspeed_zero3.yaml")
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    assert "local_rank: 1" in output
    assert "SIGKILL" in output


def not_a_number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = oracle_graded(images, prompts)
    return scores * torch.nan if is_faulty_process() else scores


@pytest.mark.slow
def test_a_nan_reward_on_one_process_ends_all_and_its_prompt_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_RANK", "1")
    output = failed(
        replace(SMALL_DDPO, rewards="tests.test_faults:not_a_number", run_folder=str(tmp_path / "run")), "ddp.yaml"
    )
    assert "The reward 'tests.test_faults:not_a_number' returned nan for the prompt 'a" in output


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    """With several machines the port cannot be chosen by the launcher."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port := free_port()))
        taken.listen()
        output = failed(
            replace(SMALL_DDPO, run_folder=str(tmp_path / "run")), "multi_node.yaml", "--main_process_port", str(port)
        )
    assert f"port `{port}`, but another process is utilizing it" in " ".join(output.split())
