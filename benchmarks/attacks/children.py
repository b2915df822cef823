"""Recipes in forked processes, which can be killed at any moment, and what their runs must have in common."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

CHANGING_FILES = ("checkpoints", "logs", "claims")
"""Folders of a run that hold no results."""
TIMEOUT_S = 1200.0


class Outcome(NamedTuple):
    """What came of one try."""

    survived: bool
    what: str
    """What was attacked and what happened, in one line."""
    faults: int = 1
    """Faults in this try."""


class End(NamedTuple):
    """How a process ended."""

    status: int
    """Exit status; minus the number of the signal that ended it; -SIGALRM if it took too long."""
    output: str

    @property
    def refused(self) -> bool:
        """True if it ended with one line for the user instead of a traceback."""
        return self.status == 2 and "\nerror: " in f"\n{self.output}" and "Traceback" not in self.output


def run_recipe(recipe: str, options: dict[str, Any], log: Path, *, first: Callable[[], Any] | None = None) -> End:
    """Run a recipe in a forked process, as its command would; call `first` in the process before."""
    return wait_for_child(start_recipe(recipe, options, log, first=first), log)


def start_recipe(recipe: str, options: dict[str, Any], log: Path, *, first: Callable[[], Any] | None = None) -> int:
    """Start a recipe in a forked process, as its command would, and return the process id."""
    return start_child(lambda: _run(recipe, options), log, first=first)


def run_child(work: Callable[[], Any], log: Path, *, first: Callable[[], Any] | None = None) -> End:
    """Run a function in a forked process with its output in a file."""
    return wait_for_child(start_child(work, log, first=first), log)


def start_child(work: Callable[[], Any], log: Path, *, first: Callable[[], Any] | None = None) -> int:
    """Start a function in a forked process with its output in a file, and return the process id."""
    log.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        _child(work, log, first)
    return pid


def has_ended(pid: int) -> bool:
    """True if a child has ended, whose status still waits for `wait_for_child`."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for_child(pid: int, log: Path) -> End:
    """Wait until a child has ended; it is killed if it takes too long."""
    deadline, late = time.monotonic() + TIMEOUT_S, False
    while not has_ended(pid):
        if late := time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    _, status = os.waitpid(pid, 0)
    code = -signal.SIGALRM if late else os.waitstatus_to_exitcode(status)
    return End(code, log.read_text(errors="replace"))


def _child(work: Callable[[], Any], log: Path, first: Callable[[], Any] | None) -> NoReturn:
    code = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        if first is not None:
            first()
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(recipe: str, options: dict[str, Any]) -> None:
    from rlhf_t2i.config import run_command
    from rlhf_t2i.errors import one_line_errors

    module = import_module(f"recipes.{recipe}")
    with one_line_errors():
        config = module.Config(**options)
    run_command(module.main, config)


def kill_at_event(number: int, folder: Path) -> None:
    """Make this process kill itself before the `number`th (from 1) file operation below `folder`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if _concerns(event, arguments, str(folder)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes: writing fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def count_events(folder: Path, result: Path) -> None:
    """Make this process keep the number of its file operations below `folder` in a file."""
    seen, handle = 0, os.open(result, os.O_CREAT | os.O_WRONLY)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if _concerns(event, arguments, str(folder)):
            seen += 1
            os.pwrite(handle, b"%d" % seen, 0)

    sys.addaudithook(hook)


def _concerns(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """True for what changes files of a folder, and for opening one of them."""
    is_change = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
    return is_change and any(folder in str(part) for part in arguments[:2] if isinstance(part, str | os.PathLike))


def results(folder: Path, *, weights_only: bool = False) -> dict[str, str]:
    """Return the hash of each result of a run: tensors, images, and rows of metrics without their times."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or name.parts[0] in CHANGING_FILES:
            continue
        if path.suffix == ".safetensors":
            found[str(name)] = _hash_of_tensors(path)
        elif path.suffix == ".png" and not weights_only:
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "metrics.jsonl" and not weights_only:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            last = {f"{row['kind']} {row['step']}": row for row in rows}  # a step may be repeated after a resume
            found |= {f"{name} {key}": json.dumps(_without_times(row)) for key, row in last.items()}
    return found


def _hash_of_tensors(path: Path) -> str:
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not any(part in k for part in ("second", "elapsed", "memory", "megabytes"))}
