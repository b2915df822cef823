"""Levers of speed: compiled blocks, the channels-last layout, AdamW in one kernel."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.testing import assert_close

from recipes import ddpo
from rlhf_t2i.diffusion.gaussian import mean_log_prob
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.distributed.replicated import Replicated
from rlhf_t2i.models import speed
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.models.lora import LoraConfiguration
from rlhf_t2i.models.table import FAMILIES
from rlhf_t2i.sampling.rollout import rollout, transition_at
from rlhf_t2i.training import setup
from rlhf_t2i.training.metrics import read_metrics
from rlhf_t2i.types import Sampler
from tests.runs import REDNESS, assert_same, state


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> ddpo.Config:
    return ddpo.Config(
        model=str(tiny_sd), prompts_per_step=2, images_per_prompt=4, num_denoising_steps=2, num_minibatches=2,
        window_end=1.0, learning_rate=1e-2, rewards=REDNESS, evaluation_rewards=REDNESS, num_steps=3, lora_rank=2,
        evaluate_every=1, num_evaluation_images=2, num_evaluation_steps=2, checkpoint_every=1, keep_checkpoints=3,
        num_cpu_threads=1, prompts="shapes", evaluation_prompts="shapes", microbatch_size=4, guidance_scale=3.0,
        resolution=16, run_folder=str(tmp_path / "run"), kl_weight=0.1,
    )  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile without a C++ compiler, and note the graphs compiled so far at each step."""
    counts, finish = list[int](), ddpo.Trainer.finish_step
    torch._dynamo.reset()
    counters.clear()

    def finish_step(trainer: Any, step: int, **metrics: Any) -> None:
        finish(trainer, step, **metrics)
        counts.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(ddpo.Trainer, "finish_step", finish_step)
    monkeypatch.setattr(speed, "compile_blocks", partial(speed.compile_blocks, backend="aot_eager"))
    yield counts
    torch._dynamo.reset()


def trained(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder) if row["kind"] == "train"]


# torch looks at gradients while it traces, and hides its own warning by a filter that "error" overrides
TRACING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@TRACING
def test_compiled_blocks_replay_exactly_and_are_compiled_in_the_first_step_only(
    config: ddpo.Config, tmp_path: Path, counted: list[int]
) -> None:
    """With guidance, a reference model without the LoRA, evaluations of other sizes, and a LoRA that changes."""
    compiled = ddpo.main(replace(config, compile=True))
    assert counted[0] > 0
    assert counted == [counted[0]] * 3
    rows, plain = trained(compiled), trained(ddpo.main(replace(config, run_folder=str(tmp_path / "plain"))))
    assert [row["replay_error"] for row in rows] == [0.0] * 3
    assert rows[-1]["reward"] == pytest.approx(plain[-1]["reward"], abs=1e-4)
    assert rows[0]["gradient_norm"] == pytest.approx(plain[0]["gradient_norm"], rel=1e-4)


@TRACING
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_blocks_compiled_for_the_processor_replay_exactly_in_half_precision(tiny_sd: Path) -> None:
    """Graphs without gradient are other ones, which round differently."""
    torch._dynamo.reset()
    policy = load_policy(str(tiny_sd), device=torch.device("cpu"), dtype=torch.bfloat16, resolution=16)
    policy.set_trainable(LoraConfiguration(2), keep_reference=False, seed=0)
    speed.compile_blocks(policy.network)
    schedule = policy.schedule(2)
    sampler = Sampler(schedule, stochastic(schedule, eta=1.0), 1.0)
    _, found = rollout(
        policy, ["a fox"] * 2, sampler=sampler, generators=[torch.Generator().manual_seed(0)], microbatch_size=2
    )
    transition = transition_at(
        policy, found.latents[:, 0], torch.zeros(2, dtype=torch.int64), found.conditioning[:], sampler=sampler
    )
    log_prob = mean_log_prob(transition, found.latents[:, 1])
    assert log_prob.requires_grad
    assert torch.equal(log_prob.detach(), found.log_probs[:, 0])
    torch._dynamo.reset()


@pytest.mark.parametrize("option", ["compile", "channels_last"])
def test_a_strategy_that_shards_weights_refuses_them(option: str, config: ddpo.Config) -> None:
    class Sharded:
        mode = "zero3"

    with pytest.raises(ValueError, match=f"{option} is true; with zero3, which shards the weights"):
        setup._speed_up(None, replace(config, **{option: True}), Sharded())  # type: ignore[arg-type]


def test_only_a_u_net_has_channels_last() -> None:
    with pytest.raises(ValueError, match="must be false for a Linear, which is no U-Net and has 0 convolutions"):
        speed.to_channels_last(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be false for a Linear, whose blocks are not known"):
        speed.compile_blocks(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_its_repeated_blocks(family: str) -> None:
    module, name = FAMILIES[family].module, FAMILIES[family].name
    kind = getattr(import_module(f"rlhf_t2i.models.{module}"), name)
    network: Any = kind.pipeline_class.__init__.__annotations__[kind.component]
    assert getattr(network, "_repeated_blocks", None) or network._no_split_modules


def test_adamw_in_one_kernel_takes_the_steps_of_adamw() -> None:
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 50).clone()) for _ in range(2)]
    for weight, fused in zip(weights, (False, True), strict=True):
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, fused=fused)
        for step in range(5):
            weight.grad = torch.sin(step + weight.detach() * 7)
            optimizer.step()
    assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loaded_count_of_steps_is_where_the_optimiser_expects_it(fused: bool) -> None:
    """For a step in one kernel beside the weights, otherwise in main memory, as torch itself loads it."""
    network = torch.nn.Linear(2, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(network.parameters(), fused=fused)
    accelerator: Any = SimpleNamespace(prepare=lambda *given: given)
    engine = Replicated(accelerator, network, optimizer, max_gradient_norm=1.0)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(2, 2)}
    engine.load("weight", torch.zeros(2, 2), state)
    assert optimizer.state[network.weight]["step"].device.type == ("meta" if fused else "cpu")


@pytest.mark.slow
def test_all_weights_in_channels_last_and_steps_in_one_kernel_resume_exactly(
    config: ddpo.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are the training without them, up to rounding."""
    config = replace(
        config, lora_rank=None, learning_rate=1e-4, adam_epsilon=1e-4, evaluate_every=0, num_steps=2, kl_weight=0.0
    )
    plain = ddpo.main(replace(config, run_folder=str(tmp_path / "plain")))
    monkeypatch.setattr(setup, "_fuses", lambda run: True)
    config = replace(config, channels_last=True)
    whole, folder = ddpo.main(config), tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_t2i.training.trainer.Trainer.finish", lambda trainer: trainer.folder)
        patch.setattr("rlhf_t2i.training.trainer.Trainer.stopped_early", property(lambda trainer: trainer.step >= 1))
        ddpo.main(replace(config, run_folder=str(folder)))
    resumed = ddpo.main(replace(config, run_folder=str(folder), resume=True))
    assert_same(state(resumed, 2)[0], state(whole, 2)[0])
    assert [row["replay_error"] for row in trained(resumed)] == [0.0] * 2
    weights, expected = ({k: v for k, v in state(run, 2)[0].items() if k[:7] == "weight/"} for run in (whole, plain))
    assert_close(weights, expected, rtol=0, atol=2e-5)
    assert load_file(whole / "unet" / "diffusion_pytorch_model.safetensors").keys()
