"""Kill one of two processes that train together; `accelerate launch --max_restarts 1` then resumes the run.

Its last checkpoint must have equal bits to that of an uninterrupted run.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from attacks.children import Outcome

ROOT = Path(__file__).parent.parent.parent
PORT = 29600
MODES = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
NUM_STEPS = 5
OPTIONS = {
    "rewards": "oracle", "evaluation_rewards": "oracle", "prompts_per_step": "4", "images_per_prompt": "8",
    "microbatch_size": "16", "lora_rank": "4", "kl_weight": "0.1", "ema_decay": "0.5", "num_steps": str(NUM_STEPS),
    "checkpoint_every": "1", "evaluate_every": "0", "num_evaluation_images": "8", "num_cpu_threads": "1",
}  # fmt: skip


def start(mode: str, folder: Path, log: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the launcher of a run."""
    options = [part for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
    return subprocess.Popen(
        [
            *launcher, "--config_file", f"accelerate_configs/{mode}.yaml", "--max_restarts", "1",
            "recipes/ddpo.py", *options, "--run_folder", str(folder),
        ],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log.open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def process_of(rank: int, folder: Path) -> int | None:
    """Return the id of the process of this rank that trains into `folder`, or None if there is none."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((path / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has ended
            continue
        trains = str(folder).encode() in command and f"RANK={rank}".encode() in environment
        if trains and b"accelerate.commands.launch" not in command:
            return int(path.name)
    return None


def wait_for(folder: Path, launcher: subprocess.Popen[bytes], *, num_steps: int) -> None:
    """Wait until `num_steps` steps are logged or the run has ended."""
    rows = folder / "metrics.jsonl"
    while launcher.poll() is None and not (rows.is_file() and rows.read_text().count('"train"') >= num_steps):
        time.sleep(0.02)


def last_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights, optimiser state and averages."""
    files = sorted((folder / "checkpoints" / f"step_{NUM_STEPS:06d}").glob("weights-*"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """True if the tensors have equal names and bits, and there are any."""
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def uninterrupted(mode: str, work: Path) -> tuple[Path, float]:
    """Return the folder of an uninterrupted run, and its seconds after the first step."""
    folder, record = work / "two-processes" / mode, work / "two-processes" / f"{mode}.txt"
    if not record.exists():
        folder.parent.mkdir(exist_ok=True)
        launcher = start(mode, folder, log := record.with_suffix(".log"), PORT)
        wait_for(folder, launcher, num_steps=1)
        first = time.monotonic()
        if launcher.wait():
            raise SystemExit(log.read_text()[-3000:])
        record.write_text(str(time.monotonic() - first))
    return folder, float(record.read_text())


def kill(work: Path, index: int, rng: random.Random) -> Outcome:
    """Kill one of two processes, in a random mode at a random moment after the first step."""
    mode, rank = MODES[index % len(MODES)], rng.randrange(2)
    expected, seconds = uninterrupted(mode, work)
    folder, moment = work / f"two-processes-{index}", rng.uniform(0, seconds)
    launcher = start(mode, folder, log := work / f"two-processes-{index}.log", PORT)
    wait_for(folder, launcher, num_steps=1)
    time.sleep(moment)
    if (victim := process_of(rank, folder)) is not None:
        os.kill(victim, signal.SIGKILL)
    status = launcher.wait()
    equal = not status and equal_bits(last_checkpoint(folder), last_checkpoint(expected))
    found = "equal bits" if equal else f"exit status {status}: {log.read_text()[-300:]}"
    return Outcome(equal, f"{mode}, process {rank} {moment:.1f} s after the first step: {found}")
