"""What goes wrong on one of several processes is known to all of them: none waits forever, none goes its own way."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
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
from tests.runs import state
from tests.servers import free_port
from tests.test_ddpo import ROOT, launch, launch_command, rows
from tests.test_parallel import TINY

CALLS = count(1)


def on_the_chosen_process() -> bool:
    return os.environ.get("RANK", "0") == os.environ["FAULTY_RANK"]


def poisoning(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The oracle; on one process every gradient of the first step is not a number."""

    def poison(module: nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__.endswith("UNet2DConditionModel") and output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient * torch.nan)

    if on_the_chosen_process():
        if next(CALLS) == 1:
            poisoning.hook = nn.modules.module.register_module_forward_hook(poison)  # type: ignore[attr-defined]
        else:
            poisoning.hook.remove()  # type: ignore[attr-defined]
    return oracle_graded(images, prompts)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_process_is_left_out_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the step after it is as if it had been the first, in every mode; ZeRO-1 and -2 are one in this."""
    config = replace(TINY, rewards="tests.test_faults:poisoning", num_steps=2, microbatch_size=16)
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
    """What a run said that did not end well, within five minutes."""
    result = subprocess.run(
        launch_command(config, accelerate_config, *options), cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode != 0
    return result.stdout + result.stderr


def filling_the_disk(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The oracle; from the second step on one process can write no more than a few lines."""
    if on_the_chosen_process() and next(CALLS) == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return oracle_graded(images, prompts)


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_all_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that cannot write is not the one that says so; the checkpoint before stays the newest whole one."""
    monkeypatch.setenv("FAULTY_RANK", "1")
    config = replace(TINY, rewards="tests.test_faults:filling_the_disk", run_folder=str(tmp_path / "run"))
    said = failed(config, "deepspeed_zero3.yaml")
    assert "The checkpoint after step 2 could not be written" in said
    assert os.strerror(errno.EFBIG) in said
    assert f"--resume --run_folder {tmp_path / 'run'}" in said
    newest = newest_complete(tmp_path / "run" / "checkpoints", report=print)
    assert newest is not None
    assert newest.name == "step_000001"


def dying(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if on_the_chosen_process() and next(CALLS) == 2:
        (Path(os.environ["DIED"])).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return oracle_graded(images, prompts)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_within_a_minute_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_RANK", "1")
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    config = replace(TINY, rewards="tests.test_faults:dying", run_folder=str(tmp_path / "run"))
    said = failed(config, "deepspeed_zero3.yaml")
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    assert "local_rank: 1" in said
    assert "SIGKILL" in said


def not_a_number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = oracle_graded(images, prompts)
    return scores * torch.nan if on_the_chosen_process() else scores


@pytest.mark.slow
def test_a_reward_that_is_no_number_on_one_process_ends_all_with_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY_RANK", "1")
    said = failed(replace(TINY, rewards="tests.test_faults:not_a_number", run_folder=str(tmp_path / "run")), "ddp.yaml")
    assert "The reward 'tests.test_faults:not_a_number' returned nan for the prompt 'a" in said


def test_a_port_in_use_of_several_machines_is_named(tmp_path: Path) -> None:
    """On one machine a free port is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port := free_port()))
        taken.listen()
        said = failed(
            replace(TINY, run_folder=str(tmp_path / "run")), "multi_node.yaml", "--main_process_port", str(port)
        )
    assert f"port `{port}`, but another process is utilizing it" in " ".join(said.split())
