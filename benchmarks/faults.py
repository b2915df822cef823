"""Test that a run survives the death of a process at any moment: `python benchmarks/faults.py --kills 20`.

Each time two processes train the toy model with a random distribution strategy, one of them is killed (SIGKILL) at a
random moment after the first step, and `accelerate launch --max_restarts 1` resumes the run. Its last checkpoint must
then have equal bits to that of an uninterrupted run. Prints Markdown; exits with status 1 if a run was lost or differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
MODES = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
NUM_STEPS = 5
OPTIONS = {
    "rewards": "oracle", "evaluation_rewards": "oracle", "prompts_per_step": "4", "images_per_prompt": "8",
    "microbatch_size": "16", "lora_rank": "4", "kl_weight": "0.1", "ema_decay": "0.5", "num_steps": str(NUM_STEPS),
    "checkpoint_every": "1", "evaluate_every": "0", "num_evaluation_images": "8", "num_cpu_threads": "1",
}  # fmt: skip
say = partial(print, flush=True)


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


def main() -> None:
    """Kill processes and compare the checkpoints of their runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=29600)
    arguments = parser.parse_args()
    rng, failures = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)

        @cache
        def uninterrupted_run(mode: str) -> tuple[Path, float]:
            """Return the folder of an uninterrupted run, and the seconds after its first step."""
            folder = root / mode
            launcher = start(mode, folder, root / f"{mode}.log", arguments.port)
            wait_for(folder, launcher, num_steps=1)
            first = time.monotonic()
            if launcher.wait():
                raise SystemExit((root / f"{mode}.log").read_text()[-3000:])
            return folder, time.monotonic() - first

        say("| mode | killed | seconds after its first step | exit status | equal bits |\n|---|---|---|---|---|")
        for number in range(arguments.kills):
            mode, rank = rng.choice(arguments.modes), rng.randrange(2)
            uninterrupted, seconds = uninterrupted_run(mode)
            folder, moment = root / f"kill-{number}", rng.uniform(0, seconds)
            launcher = start(mode, folder, log := root / f"kill-{number}.log", arguments.port)
            wait_for(folder, launcher, num_steps=1)
            time.sleep(moment)
            if (victim := process_of(rank, folder)) is not None:
                os.kill(victim, signal.SIGKILL)
            status = launcher.wait()
            equal = not status and equal_bits(last_checkpoint(folder), last_checkpoint(uninterrupted))
            failures += not equal
            killed = f"process {rank}" if victim is not None else "none, the run had ended"
            say(f"| {mode} | {killed} | {moment:.1f} | {status} | {'yes' if equal else 'NO'} |")
            if not equal:
                sys.stderr.write(log.read_text()[-3000:])
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
