"""Environment, model format and processes for the comparisons with trl 0.23.1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlhf_t2i.shapes.names import TOY_MODEL_FOLDER

ROOT = Path(__file__).parent.parent
PACKAGES = ("trl==0.23.1", "diffusers==0.35.2", "transformers==4.57.1", "peft<0.18", "accelerate<1.12")
GUIDANCE = 2.0
"""trl 0.23.1 cannot sample without guidance on the newest diffusers that it supports."""


def say(line: str) -> None:
    """Print a line and flush, also if the output is a file."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def environment_for_trl(folder: Path) -> Path:
    """Return the Python of an environment with trl 0.23.1, which is created in the first call."""
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True)
        torch_version = torch.__version__.split("+")[0]
        own = ("jaxtyping", "scipy", f"torch=={torch_version}")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES, *own], check=True)
        (folder / "ready").touch()
    return python


def model_for_trl(folder: Path) -> Path:
    """Save the toy model for older transformers: with a fast tokenizer, and `text_model.` before all weight names."""
    if not folder.is_dir():
        shutil.copytree(TOY_MODEL_FOLDER, folder, ignore=shutil.ignore_patterns("reward_model"))
        index = json.loads((folder / "model_index.json").read_text())
        index["tokenizer"] = ["transformers", "CLIPTokenizerFast"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=1))
        encoder = folder / "text_encoder" / "model.safetensors"
        weights = {"text_model." + name.removeprefix("text_model."): w for name, w in load_file(encoder).items()}
        save_file(weights, encoder, metadata={"format": "pt"})
    return folder


def run(command: list[str], threads: int, **variables: str) -> None:
    """Run a command in a process of its own; its output is shown only if it fails."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error", **variables,
    }  # fmt: skip
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
