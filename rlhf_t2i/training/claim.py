"""Claim a run folder: create it or resume in it, and describe the run in it."""

from __future__ import annotations

import atexit
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from tqdm import tqdm

from rlhf_t2i.output.files import remove_all_but, write_atomically
from rlhf_t2i.output.run_folder import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    RUN_INFO,
    STARTING,
    check_free,
    holds_run,
    read_config,
    read_run_info,
)
from rlhf_t2i.training.environment import restarted

_PACKAGES = (
    "rlhf-t2i", "torch", "diffusers", "transformers", "trl", "peft", "accelerate", "deepspeed", "safetensors", "numpy",
)  # fmt: skip


@dataclass
class _Claim:
    """A run folder that this process writes to."""

    lock: FileLock | None
    """The lock of the folder; None on all but the main process."""
    before: frozenset[str] | None
    """Names in the folder before a run that has no results yet; None once there are results to keep. The file STARTING
    has them too, for a process that is killed."""


_claims: dict[Path, _Claim] = {}


def claim_folder(config: Mapping[str, Any], *, recipe: str, free_to_change: Set[str], checkpoints: bool = True) -> Path:
    """Create the run folder or resume in it, lock it, write config.yaml and run.json; return its path. Collective.

    Until `keep_folder`, a new folder is removed when the process ends. Reads run_folder and resume of `config`; a
    restarted process resumes in any case. Without run_folder the newest run is resumed, of those that have a checkpoint
    if runs of this recipe write `checkpoints`. Raises ValueError for a folder with another config (settings in
    `free_to_change` may differ), FileExistsError for one that holds a run if `resume` is false, BlockingIOError for one
    that another process writes to, and FileNotFoundError if a process cannot read the folder.
    """
    state, given = PartialState(), config["run_folder"]
    folder = Path(given) if given else _default_folder(recipe, resume=config["resume"], checkpoints=checkpoints)
    [folder] = broadcast_object_list([folder])
    problem = before = None
    if state.is_main_process:
        resume = config["resume"] or (restarted() and (folder / CONFIG).is_file())
        try:
            before = _claim(folder, config, resume=resume, free_to_change=free_to_change)
            _describe(folder, recipe, state)
        except (OSError, ValueError) as error:
            problem = error
    for found in gather_object([problem]):
        if found is not None:
            raise found
    [before] = broadcast_object_list([before])
    if not state.is_main_process:
        _claims[folder.absolute()] = _Claim(None, before)
    _wait_for_file(folder / CONFIG)
    return folder


def keep_folder(folder: Path) -> None:
    """Keep a run folder whatever happens: its first results are to be written."""
    if (claim := _claims.get(folder.absolute())) and claim.before is not None:
        claim.before = None
        if claim.lock:
            (folder / STARTING).unlink(missing_ok=True)


def release_folder(folder: Path) -> None:
    """Let other processes write to a run folder."""
    claim = _claims.pop(folder.absolute(), None)
    if claim and claim.lock:
        claim.lock.release()


@atexit.register
def remove_failed_starts() -> None:
    """Remove the folders of runs that ended before `keep_folder`."""
    for folder, claim in list(_claims.items()):
        if claim.before is not None:
            with contextlib.suppress(OSError):
                _remove_start(folder, kept=claim.before)
                folder.rmdir()
        release_folder(folder)


def _remove_start(folder: Path, *, kept: Set[str]) -> None:
    """Remove what a start has written; wherever a kill ends this, the folder holds no run and may be claimed.

    The config goes first, without which there is no run, and the list of what to keep last.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    remove_all_but(kept | {STARTING}, folder)
    if STARTING not in kept:
        (folder / STARTING).unlink(missing_ok=True)


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


def _default_folder(recipe: str, *, resume: bool, checkpoints: bool) -> Path:
    """Return a new folder under runs/, the recipe's newest one to resume, or the one from before a restart."""
    if resume:
        earlier = [path.parent for path in sorted(Path("runs").glob(f"{recipe}-[0-9]*/{CONFIG}"))]
        usable = [folder for folder in earlier if not checkpoints or any((folder / CHECKPOINTS).glob("*[0-9]"))]
        if not usable:
            lacking = "has a checkpoint" if earlier else "exists"
            raise FileNotFoundError(f"There is no run to resume: no folder runs/{recipe}-* {lacking}.")
        return usable[-1]
    # The launcher outlives the processes that it restarts, so its id stays the same.
    owner = os.getppid() if "TORCHELASTIC_RESTART_COUNT" in os.environ else os.getpid()
    if restarted() and (own := sorted(Path("runs").glob(f"{recipe}-[0-9]*-{owner}/{CONFIG}"))):
        return own[-1].parent
    return Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}-{owner}"


def _claim(folder: Path, config: Mapping[str, Any], *, resume: bool, free_to_change: Set[str]) -> frozenset[str] | None:
    """Lock the folder and write config.yaml; return what it held before a new run. Raises as `claim_folder` does."""
    path = folder / CONFIG
    earlier = _claims.get(folder.absolute())
    if resume and not path.is_file():
        raise FileNotFoundError(f"There is no run to resume in {folder}: it has no {CONFIG}.")
    if not resume:
        check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = frozenset(path.name for path in folder.iterdir())
    lock = earlier.lock if earlier else _locked(folder)
    before = None if holds_run(folder) else _before_start(folder, found)
    _claims[folder.absolute()] = _Claim(lock, before)
    if before is None:
        try:
            _report_changes(read_config(folder), config, folder, free_to_change)
        except ValueError:
            release_folder(folder)
            raise
    stored = {name: value for name, value in config.items() if name != "resume"}
    write_atomically(path, yaml.safe_dump(stored, sort_keys=False, allow_unicode=True))
    return before


def _before_start(folder: Path, found: frozenset[str]) -> frozenset[str]:
    """Return what a folder without a run held before anything was written, and remove what a killed start has left."""
    marker = folder / STARTING
    if marker.is_file():
        found = frozenset(json.loads(marker.read_text(encoding="utf-8")))
        _remove_start(folder, kept=found | {LOCK, STARTING})
    else:
        write_atomically(marker, json.dumps(sorted(found)))
    return found


def _locked(folder: Path) -> FileLock:
    """Lock a folder until the process ends, which also frees it; a restarted process waits for its predecessor.

    The holder's process id and machine are in the file that is locked.
    """
    path = folder / LOCK
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=60 if restarted() else 0)
    except Timeout as error:
        raise BlockingIOError(
            f"{folder} is in use: {_holder(path)} still writes to it. Stop that run, or wait until it has ended."
        ) from error
    path.write_text(f"{os.getpid()}\n{platform.node()}\n", encoding="utf-8")
    return lock


def _holder(lock: Path) -> str:
    """Return the process that holds a lock, as it has named itself in the locked file."""
    with contextlib.suppress(OSError, ValueError):  # Windows lets nobody else read it
        process, machine = lock.read_text(encoding="utf-8").split()
        return f"process {int(process)} on {machine}"
    return "another process"


def _report_changes(
    stored: Mapping[str, Any], config: Mapping[str, Any], folder: Path, free_to_change: Set[str]
) -> None:
    """Print the settings that have changed; ValueError if one of them is not in `free_to_change`."""
    changed = [name for name in sorted(stored.keys() | config.keys()) if stored.get(name) != config.get(name)]
    start = f"{read_run_info(folder).get('working_directory', folder)}/"  # see `paths_start`
    texts = [{name: str(values.get(name)).replace(start, "") for name in changed} for values in (stored, config)]
    changed = [name for name in changed if name not in ("resume", "run_folder") and texts[0][name] != texts[1][name]]
    if refused := [name for name in changed if name not in free_to_change]:
        listed = "; ".join(f"{name} was {stored.get(name)!r} and is now {config.get(name)!r}" for name in refused)
        raise ValueError(f"{folder} holds a run with another config: {listed}.")
    for name in changed:
        tqdm.write(f"Changed on resuming: {name} {stored.get(name)} -> {config.get(name)}")


def _command() -> str:
    """Return the command that started this process, as far as a process can know it."""
    main = sys.modules["__main__"]
    module, file = main.__spec__, getattr(main, "__file__", None)
    if module is None and file is None and sys.argv[0] != "-c":
        return "an interactive Python session or a notebook"
    arguments = ["-m", module.name.removesuffix(".__main__"), *sys.argv[1:]] if module else sys.argv
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return f"accelerate launch {shlex.join(arguments)}"
    return f"{'torchrun' if 'TORCHELASTIC_RUN_ID' in os.environ else 'python'} {shlex.join(arguments)}"


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
        "command": _command(),
        "working_directory": os.getcwd(),
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
