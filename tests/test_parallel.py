"""Training gives equal results with every distribution strategy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.testing import assert_close

from recipes import ddpo, diffusion_dpo, diffusion_nft, draft
from rlhf_t2i.distributed.processes import _check_deepspeed, _wants_fsdp, start_processes
from rlhf_t2i.distributed.replicated import Replicated
from rlhf_t2i.distributed.state import read_state, write_state
from rlhf_t2i.distributed.zero import fill_config
from rlhf_t2i.rewards.builtin import oracle_graded
from tests import processes
from tests.launch import ROOT, SMALL_DDPO, environment, launch, launch_command
from tests.runs import rows, state
from tests.servers import free_port

MODES = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(replace(SMALL_DDPO, run_folder=str(tmp_path_factory.mktemp("single") / "run")), "single.yaml")


def assert_same_training(folder: Path, expected: Path, *, first: int = 0) -> None:
    """Assert equal weights, optimiser state and EMA at the end, and equal metrics of the steps from `first` on."""
    (tensors, rest), (expected_tensors, expected_rest) = state(folder), state(expected)
    assert_close(tensors, expected_tensors, rtol=0, atol=1e-5)
    assert rest == expected_rest
    for name in ("reward", "loss", "kl", "gradient_norm", "ratio_std"):
        own, other = ([row[name] for row in rows(f, "train")][first:] for f in (folder, expected))
        assert_close(own, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_training_of_one(one_process: Path, tmp_path: Path, mode: str) -> None:
    folder = launch(replace(SMALL_DDPO, run_folder=str(tmp_path / "run")), f"{mode}.yaml", fork=False)
    placement = json.loads((folder / "run.json").read_text())["placement"]
    assert (placement["mode"], placement["processes"]) == (mode.removeprefix("deepspeed_"), 2)
    assert_same_training(folder, one_process)


@pytest.mark.slow
def test_a_run_resumes_with_another_strategy_and_number_of_processes(one_process: Path, tmp_path: Path) -> None:
    config = replace(SMALL_DDPO, run_folder=str(tmp_path / "run"))
    launch(replace(config, num_steps=1), "deepspeed_zero3.yaml")
    launch(replace(config, num_steps=2, resume=True), "single.yaml")
    folder = launch(replace(config, resume=True), "fsdp2.yaml")
    assert_same_training(folder, one_process)


COMMON: dict[str, Any] = {
    "adam_epsilon": 1e-3,  # or Adam amplifies gradients that are rounding errors
    "ema_decay": 0.5, "num_steps": 2, "checkpoint_every": 1, "evaluate_every": 0, "evaluation_rewards": "oracle",
    "num_evaluation_images": 7, "microbatch_size": 8, "num_cpu_threads": 1, "learning_rate": 1e-3, "warmup_steps": 0,
}  # fmt: skip
OTHERS = {  # with a frozen copy as the reference, and 7 evaluation images, which two processes cannot share equally
    "full denoiser, gathered layer by layer": replace(
        SMALL_DDPO, **{**COMMON, "gather_for_sampling": False}, lora_rank=None, async_reward=True
    ),
    "draft": draft.Config(**COMMON, method="draft", backprop_steps=2, prompts_per_step=16, kl_weight=0.1),
    "diffusion_dpo": diffusion_dpo.Config(
        **COMMON, rewards="oracle", prompts_per_step=4, images_per_prompt=4, num_inner_epochs=2
    ),
    "diffusion_nft": diffusion_nft.Config(
        **COMMON, rewards="oracle", prompts_per_step=4, images_per_prompt=4, sampling_ema_rise=0.5
    ),
}
RECIPES = {
    ddpo.Config: ddpo,
    draft.Config: draft,
    diffusion_dpo.Config: diffusion_dpo,
    diffusion_nft.Config: diffusion_nft,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_recipes_and_full_denoisers_train_equally_when_sharded(tmp_path: Path, name: str) -> None:
    config = OTHERS[name]
    single = RECIPES[type(config)].main(replace(config, run_folder=str(tmp_path / "single")))
    expected, _ = state(single, 2)
    for mode in MODES[3:]:
        folder = launch(replace(config, run_folder=str(tmp_path / mode)), f"{mode}.yaml")
        tensors, _ = state(folder, 2)
        assert_close(tensors, expected, rtol=0, atol=1e-5, msg=lambda text, mode=mode: f"{mode}: {text}")
        for kind, score in (("evaluation", "oracle"), ("train", "loss")):
            own, other = ([row[score] for row in rows(f, kind)] for f in (folder, single))
            assert own == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_two_machines_give_the_training_of_one(one_process: Path, tmp_path: Path) -> None:
    """Two launchers on this machine that connect at one port, each with one process."""
    config = replace(SMALL_DDPO, run_folder=str(tmp_path / "run"))
    rendezvous = ["--num_processes", "2", "--main_process_port", str(free_port())]
    machines = [
        processes.start(
            launch_command(config, "multi_node.yaml", *rendezvous, "--machine_rank", str(rank)),
            cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for machine in machines:
        _, problem = machine.communicate(timeout=300)
        assert machine.returncode == 0, problem
    assert_same_training(tmp_path / "run", one_process)


CALLS = count(1)


def killing_a_process(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The oracle, which once kills the second process in its second call."""
    died = Path(os.environ["DIED"])
    if os.environ["RANK"] == "1" and next(CALLS) == 2 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return oracle_graded(images, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "deepspeed_zero2"])
def test_a_restarted_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    config = replace(
        SMALL_DDPO,
        rewards="tests.test_parallel:killing_a_process",
        microbatch_size=16,
        run_folder=str(tmp_path / "restarted"),
    )
    folder = launch(config, f"{mode}.yaml", "--max_restarts", "1")
    assert (tmp_path / "died").exists()
    uninterrupted = launch(replace(config, run_folder=str(tmp_path / "uninterrupted")), f"{mode}.yaml")
    (tensors, _), (expected, _) = state(folder), state(uninterrupted)
    assert_close(tensors, expected, rtol=0, atol=0)
    assert [row["step"] for row in rows(folder, "train")] == [1, 2, 3]


# --- settings ---------------------------------------------------------------------------------------

RECIPE = {"max_gradient_norm": 0.5, "mixed_precision": "no", "microbatch_size": 8}


def test_deepspeeds_auto_values_are_those_of_the_recipe() -> None:
    config, filled = fill_config({"gradient_clipping": "auto", "zero_optimization": {"stage": 2}}, **RECIPE)
    assert config["gradient_clipping"] == 0.5
    assert filled == {
        "gradient_clipping": 0.5, "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_clipping": 1.0}, r"gradient_clipping: 1\.0.*max_gradient_norm: 0\.5"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps: 4.*: 1"),
        ({"train_micro_batch_size_per_gpu": 2}, r"train_micro_batch_size_per_gpu: 2.*microbatch_size: 8"),
        ({"optimizer": {"type": "Adam"}}, "section 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "section 'scheduler'"),
    ],
)
def test_settings_that_disagree_are_refused_with_both_values(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill_config({"zero_optimization": {"stage": 2}, **given}, **RECIPE)


def test_unsupported_settings_are_refused_with_an_alternative() -> None:
    with pytest.raises(ValueError, match="fp16 is not supported with DeepSpeed; use bf16 or no"):
        fill_config({"zero_optimization": {"stage": 2}}, **{**RECIPE, "mixed_precision": "fp16"})
    with pytest.raises(ValueError, match="zero3_init_flag is true"):
        _check_deepspeed({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"})
    with pytest.raises(ValueError, match="fsdp_version is 1"):
        _wants_fsdp({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})


def test_an_unsupported_strategy_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Megatron:
        mixed_precision = "no"
        distributed_type = DistributedType.MEGATRON_LM

    monkeypatch.setattr("rlhf_t2i.distributed.processes.Accelerator", lambda **settings: Megatron())
    with pytest.raises(ValueError, match=r"MEGATRON_LM is not supported; launch with one of accelerate_configs/"):
        start_processes(None)


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    def engine(network: nn.Module) -> Replicated:
        optimizer = torch.optim.AdamW(network.parameters())
        return Replicated(Accelerator(cpu=True), network, optimizer, max_gradient_norm=1.0)

    write_state(engine(nn.Linear(2, 3)), {}, tmp_path, rank=0, num_processes=1)
    read_state(engine(nn.Linear(2, 3)), {}, tmp_path)
    with pytest.raises(ValueError, match="is of another model: its trained weights have other names"):
        read_state(engine(nn.Linear(2, 3, bias=False)), {}, tmp_path)


def test_the_fsdp_setting_is_hidden_from_accelerate() -> None:
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert _wants_fsdp(environment)
    assert "ACCELERATE_USE_FSDP" not in environment
    assert not _wants_fsdp({})
