"""Training gives equal results with every distribution strategy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.testing import assert_close

from recipes import ddpo
from rlhf_t2i.distributed.processes import _check_deepspeed, _wants_fsdp, start_processes
from rlhf_t2i.distributed.replicated import Replicated
from rlhf_t2i.distributed.state import read_state, write_state
from rlhf_t2i.distributed.zero import fill_config
from rlhf_t2i.settings.groups import TrainerConfig
from tests import processes
from tests.launch import ROOT, environment, launch, launch_command, launch_in_turn, recipe_of
from tests.preference_files import red_and_blue_pairs
from tests.runs import redness, rows, state
from tests.servers import free_port
from tests.trainings import MODES, MODES_OF, metrics_of, trainings


@dataclass
class Runs:
    """Finished trainings, each by one process, and by two with every strategy that it is tried with."""

    folder: Path
    inputs: Mapping[str, Any]
    _two: dict[str, dict[str, Path]] = field(default_factory=dict)

    def configs(self, name: str) -> dict[str, TrainerConfig]:
        (folder := self.folder / name).mkdir(exist_ok=True)
        return trainings(folder, **self.inputs, lora=self.folder / "one" / "ddpo")

    @cached_property
    def one(self) -> dict[str, Path]:
        """The run folders of all trainings, in this process."""
        return {
            name: import_module(f"recipes.{recipe_of(config)}").main(config)
            for name, config in self.configs("one").items()
        }

    def two(self, mode: str) -> dict[str, Path]:
        """The run folders of a strategy's trainings, by one launch of two processes for all of them."""
        if mode not in self._two:
            assert self.one
            configs = {name: config for name, config in self.configs(mode).items() if mode in MODES_OF[name]}
            launch_in_turn(list(configs.values()), f"{mode}.yaml", self.folder / mode)
            self._two[mode] = {name: Path(str(config.run_folder)) for name, config in configs.items()}
        return self._two[mode]


@pytest.fixture(scope="module")
def runs(
    tiny_sd: Path, tiny_sd3: Path, tiny_zimage: Path, tiny_flux2: Path, tiny_qwen_image: Path, tiny_sana: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:  # fmt: skip
    folder = tmp_path_factory.mktemp("runs")
    pairs = red_and_blue_pairs(folder)
    images = json.loads(pairs.read_text().splitlines()[0])
    edits = [{"prompt": "a fox", "image": images[side]} for side in ("winner", "loser")]
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in edits))
    latest = {"flux2": tiny_flux2, "qwen_image": tiny_qwen_image, "sana": tiny_sana}
    models = {"sd": tiny_sd, "sd3": tiny_sd3, "zimage": tiny_zimage, "latest": latest}
    return Runs(folder, {**models, "edits": folder / "edits.jsonl", "preferences": pairs})


def assert_same_training(folder: Path, expected: Path) -> None:
    """Assert equal weights, optimiser state and EMA at the end, and equal metrics; a stop adds an evaluation."""
    last = rows(expected, "train")[-1]["step"]
    (tensors, rest), (expected_tensors, expected_rest) = state(folder, last), state(expected, last)
    assert_close(tensors, expected_tensors, rtol=0, atol=1e-5)
    assert_close(rest, expected_rest, rtol=0, atol=1e-5)
    for kind in ("train", "evaluation"):
        own, other = (metrics_of(rows(f, kind)) for f in (folder, expected))
        own = [row for row in own if row["step"] in {row["step"] for row in other}]
        assert own == [pytest.approx(row, rel=1e-3, abs=1e-6) for row in other]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "name"), [(mode, name) for mode in MODES for name in MODES_OF if mode in MODES_OF[name]]
)
def test_two_processes_give_the_training_of_one(runs: Runs, mode: str, name: str) -> None:
    """The same images, rewards, advantages, pairs and weights, on whichever process."""
    one, two = runs.one[name], runs.two(mode)[name]
    placement = json.loads((two / "run.json").read_text())["placement"]
    assert (placement["mode"], placement["processes"]) == (mode.removeprefix("deepspeed_"), 2)
    assert_same_training(two, one)
    assert rows(one, "train")[-1]["gradient_norm"] > 0
    if "NaN" in name:
        assert [row["skipped_updates"] for row in rows(two, "train")] == [0, 2, 0]
    if "little memory" in name:
        assert [json.loads((folder / "run.json").read_text())["microbatch_size"]["found"] for folder in (one, two)] == [
            2
        ] * 2
    if name == "diffusion_dpo":
        assert sampled_pairs(two) == sampled_pairs(one)


def sampled_pairs(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    """The pairs that a run sampled, without their scores, whose last digits may differ."""
    return {
        str(path.relative_to(folder)): [
            (row["prompt"], row["winner"], row["loser"]) for row in map(json.loads, path.read_text().splitlines())
        ]
        for path in (folder / "pairs").rglob("*.jsonl")
    }


@pytest.mark.slow
def test_a_run_resumes_with_another_strategy_and_number_of_processes(runs: Runs, tmp_path: Path) -> None:
    config = replace(runs.configs("one")["ddpo"], run_folder=str(tmp_path / "run"))
    launch(replace(config, num_steps=1), "deepspeed_zero3.yaml")
    ddpo.main(replace(config, num_steps=2, resume=True))
    launch(replace(config, resume=True), "fsdp2.yaml")
    assert_same_training(tmp_path / "run", runs.one["ddpo"])


@pytest.mark.slow
def test_two_machines_give_the_training_of_one(runs: Runs, tmp_path: Path) -> None:
    """Two launchers on this machine that connect at one port, each with one process; nothing is forked here."""
    config = replace(runs.configs("one")["ddpo"], run_folder=str(tmp_path / "run"))
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
    assert_same_training(tmp_path / "run", runs.one["ddpo"])


CALLS = count(1)


def killing_a_process(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness, which once kills the second process in its second call."""
    died = Path(os.environ["DIED"])
    if os.environ["RANK"] == "1" and next(CALLS) == 2 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return redness(images, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "deepspeed_zero2"])
def test_a_restarted_run_ends_with_the_same_weights(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    config = replace(runs.configs(mode)["ddpo"], rewards="tests.test_parallel:killing_a_process")
    folder = launch(replace(config, run_folder=str(tmp_path / "run")), f"{mode}.yaml", "--max_restarts", "1")
    assert (tmp_path / "died").exists()
    assert_close(state(folder)[0], state(runs.two(mode)["ddpo"])[0], rtol=0, atol=0)
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
