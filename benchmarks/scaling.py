"""Measure speed and memory of every distribution strategy: `python benchmarks/scaling.py`.

The first table is the speed of `recipes/ddpo.py` in the toy world: images/s of rollout, reward and update on two
processes with one thread each, and the efficiency, relative to twice the speed of one process. Needs two free cores.
The second is the peak memory of one process in two steps of a larger U-Net with random weights, as measured by the
operating system (resident memory) and as computed by `rlhf_t2i.distributed.memory`. Prints Markdown.
"""

# diffusers has no usable types.
# pyright: reportArgumentType=false, reportPrivateImportUsage=false
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
MODES = {
    "one process": "single", "DDP": "ddp", "ZeRO-1": "deepspeed_zero1", "ZeRO-2": "deepspeed_zero2",
    "ZeRO-3": "deepspeed_zero3", "FSDP2": "fsdp2",
}  # fmt: skip
QUIET = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}
RETURN_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Have the C library return freed memory at once, or it would count as used."""
BATCH = 2
say = partial(print, flush=True)


def launch(mode: str, command: list[str], **environment: str) -> None:
    """Run a command by `accelerate launch` with one of accelerate_configs/."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    result = subprocess.run(
        [*launcher, "--config_file", f"accelerate_configs/{MODES[mode]}.yaml", *command],
        cwd=ROOT, env={**os.environ, **QUIET, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{mode} failed:\n{result.stderr[-3000:]}")


# --- speed ----------------------------------------------------------------------------------------


def images_per_second(mode: str, folder: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    """Return images/s of the full training step and of its rollout, without the first step."""
    options = {
        "rewards": "oracle", "evaluation_rewards": "oracle", "num_steps": str(arguments.steps), "evaluate_every": "0",
        "num_evaluation_images": "2", "checkpoint_every": "0", "num_cpu_threads": "1", "run_folder": str(folder),
    }  # fmt: skip
    launch(mode, ["recipes/ddpo.py", *(part for name, value in options.items() for part in (f"--{name}", value))])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"][1:]
    images = sum(row["images"] for row in steps)
    return (
        images / sum(value for row in steps for name, value in row.items() if name.startswith("seconds/")),
        images / sum(row["seconds/rollout"] for row in steps),
    )


def print_speed(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the table of speed; one process is measured again at the end, to show how steady the machine was."""
    say("| 2 processes of one thread | images/s | efficiency | efficiency of the rollout |\n|---|---|---|---|")
    single: tuple[float, float] | None = None
    for number, mode in enumerate([*MODES, "one process"]):
        speed, rollout = images_per_second(mode, folder / str(number), arguments)
        single = single or (speed, rollout)
        ratios = "| |" if mode == "one process" else f"| {speed / single[0] / 2:.2f} | {rollout / single[1] / 2:.2f}"
        say(f"| {mode} | {speed:.1f} {ratios} |")


# --- memory ---------------------------------------------------------------------------------------


def larger_unet() -> nn.Module:
    """Return a U-Net of 68 million parameters for latents so small that they hardly count."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(192, 384, 512), layers_per_block=1, cross_attention_dim=128,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, timesteps and text states."""
    return torch.zeros(BATCH, 4, 8, 8), torch.ones(BATCH), torch.zeros(BATCH, 8, 128)


def resident(field: str) -> int:
    """Return bytes of this process: VmRSS is the current memory, VmHWM the peak since `reset_peak`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    """Reset VmHWM."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(output: Path) -> None:
    """Measure two training steps in a process of `accelerate launch`; write measured and computed bytes to a file."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from rlhf_t2i.distributed.memory import memory_of, peak_bytes
    from rlhf_t2i.distributed.placement import layout_of
    from rlhf_t2i.distributed.processes import end_processes, make_engine, start_processes

    torch.set_num_threads(1)
    accelerator, mode = start_processes("no")
    with FakeTensorMode():
        fake = larger_unet()
        activations = peak_bytes(fake, lambda: fake(*inputs(), return_dict=False)[0].square().mean().backward())
    del fake
    network, warm = larger_unet(), nn.Linear(2, 2)
    warm(torch.zeros(2, 2)).sum().backward()
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    baseline = resident("VmRSS") - weights
    layout = layout_of(network, mode, processes=accelerator.num_processes)
    # The operating system counts only the written part of a buffer; DeepSpeed's bucket is larger than all gradients.
    layout = replace(layout, bucket=min(layout.bucket, layout.trainable))
    expected = memory_of(layout, activations=activations)
    engine = make_engine(
        accelerator, mode, network, torch.optim.AdamW(network.parameters(), foreach=True),  # as on a GPU
        max_gradient_norm=1.0, microbatch_size=BATCH, log=lambda text: None,
    )  # fmt: skip

    def update() -> None:
        for last in (False, True):
            with engine.accumulating(last=last):
                engine.backward(engine.network(*inputs(), return_dict=False)[0].square().mean())

    def sample() -> None:
        with torch.no_grad(), engine.gathered_network() as gathered:
            gathered(*inputs(), return_dict=False)

    def peak(phase: Callable[[], Any]) -> int:
        reset_peak()
        phase()
        return resident("VmHWM") - baseline

    measured = [(peak(sample), peak(update), peak(lambda: engine.optimizer_step(1e-4))) for _ in range(3)][-1]
    most = cast(torch.Tensor, accelerator.gather(torch.tensor([measured]))).amax(0).tolist()
    if accelerator.is_main_process:
        names = ("sampling", "backward", "optimizer_step")
        result = {name: (value, getattr(expected, name)) for name, value in zip(names, most, strict=True)}
        output.write_text(json.dumps({**result, "peak": (max(most), expected.peak)}))
    end_processes(accelerator)


def print_memory(folder: Path) -> None:
    """Print the table of memory: MB, measured / computed."""
    say("| MB per process | sampling | backward | optimizer | peak | computed / measured |\n|---|---|---|---|---|---|")
    for mode in MODES:
        output = folder / f"{mode}.json"
        launch(mode, ["benchmarks/scaling.py", "--worker", str(output)], **RETURN_MEMORY)
        result = json.loads(output.read_text())
        cells = " | ".join(f"{measured / 1e6:.0f} / {computed / 1e6:.0f}" for measured, computed in result.values())
        measured, computed = result["peak"]
        say(f"| {mode} | {cells} | {computed / measured:.2f} |")


def main() -> None:
    """Print the tables, or measure memory as a process of one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=["speed", "memory"], default=["speed", "memory"])
    parser.add_argument(
        "--steps", type=int, default=6, help="Training steps to measure the speed of each strategy; default 6."
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure_memory(arguments.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in arguments.tables:
            print_speed(arguments, Path(folder))
            say()
        if "memory" in arguments.tables:
            print_memory(Path(folder))


if __name__ == "__main__":
    main()
