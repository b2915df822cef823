"""Claim a run folder: create it or resume in it, and describe the run in it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from rlhf_t2i.files import write_atomically
from rlhf_t2i.run_folder import CONFIG, RUN_INFO, read_config, read_run_info
from rlhf_t2i.training.environment import restarted

_PACKAGES = (
    "rlhf-t2i", "torch", "diffusers", "transformers", "trl", "peft", "accelerate", "deepspeed", "safetensors", "numpy",
)  # fmt: skip


def claim_folder(config: Mapping[str, Any], *, recipe: str, free_to_change: Set[str]) -> Path:
    """Create the run folder or resume in it, write config.yaml and run.json, and return its path. Collective.

    Reads run_folder and resume of `config`; a restarted process resumes in any case. Raises ValueError for a folder
    with another config (settings in `free_to_change` may differ), FileExistsError for one that holds a run if `resume`
    is false, and FileNotFoundError if a process cannot read the folder.
    """
    state, given = PartialState(), config["run_folder"]
    folder = Path(given) if given else _default_folder(recipe, resume=config["resume"])
    [folder] = broadcast_object_list([folder])
    problem = None
    if state.is_main_process:
        resume = config["resume"] or (restarted() and (folder / CONFIG).is_file())
        problem = _claim(folder, config, resume=resume, free_to_change=free_to_change)
        if problem is None:
            _describe(folder, recipe, state)
    for found in gather_object([problem]):
        if found is not None:
            raise found
    _wait_for_file(folder / CONFIG)
    return folder


def _wait_for_file(path: Path, *, seconds: float = 60.0) -> None:
    """Wait for a file of the main process, which may take a while to appear on other machines; raise if it does not."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{path.parent.resolve()} is not on a file system that this machine ({platform.node()}) shares with "
                f"the first one; give all of them a --run_folder that they share."
            )
        time.sleep(0.5)


def _default_folder(recipe: str, *, resume: bool) -> Path:
    """Return a new folder under runs/, the recipe's newest one to resume, or the one from before a restart."""
    if resume:
        earlier = sorted(Path("runs").glob(f"{recipe}-[0-9]*/{CONFIG}"))
        if not earlier:
            raise FileNotFoundError(f"There is no run to resume: runs/{recipe}-* does not exist.")
        return earlier[-1].parent
    # The launcher outlives the processes that it restarts, so its id stays the same.
    owner = os.getppid() if "TORCHELASTIC_RESTART_COUNT" in os.environ else os.getpid()
    if restarted() and (own := sorted(Path("runs").glob(f"{recipe}-[0-9]*-{owner}/{CONFIG}"))):
        return own[-1].parent
    return Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}-{owner}"


def _claim(folder: Path, config: Mapping[str, Any], *, resume: bool, free_to_change: Set[str]) -> Exception | None:
    """Create the folder and write config.yaml; return the error, if any, so that all processes can raise it."""
    path = folder / CONFIG
    if resume and not path.is_file():
        return FileNotFoundError(f"There is no run to resume in {folder}: it has no {CONFIG}.")
    if path.exists():
        if not resume:
            return FileExistsError(
                f"{folder} already holds a run. Continue it with --resume, or choose another --run_folder."
            )
        stored = read_config(folder)
        changed = [
            f"{name} was {stored.get(name)!r} and is now {config.get(name)!r}"
            for name in sorted((stored.keys() | config.keys()) - free_to_change)
            if stored.get(name) != config.get(name)
        ]
        if changed:
            return ValueError(f"{folder} holds a run with another config: {'; '.join(changed)}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    except OSError as error:
        return error
    return None


def _describe(folder: Path, recipe: str, state: PartialState) -> None:
    """Write run.json; a resumed run adds a session to it."""
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = cast(torch.device, state.device)
    info = {
        "recipe": recipe,
        "command": f"accelerate launch {shlex.join(sys.argv)}",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "versions": {"python": platform.python_version(), **versions},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": state.num_processes,
    }
    path = folder / RUN_INFO
    if path.is_file():
        earlier = read_run_info(folder)
        sessions = [
            *earlier.get("sessions", []),
            {k: info[k] for k in ("command", "started", "git_commit", "versions")},
        ]
        info = {**earlier, "sessions": sessions}
    write_atomically(path, json.dumps(info, indent=1))
