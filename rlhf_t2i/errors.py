"""One line instead of a traceback for what a user can mend, also below `accelerate launch`.

An error is for the user if a `raise` of this project made it, or if the system or a library refused a file or a
connection to this project (OSError, or a failed write). Anything else is a bug, of this project, of a library or of a
reward, and keeps its traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

_OWN_PACKAGES = ("rlhf_t2i", "reward_model", "recipes", "__main__")
_LAUNCHERS = ("accelerate", "accelerate-launch", "deepspeed")
"""Programs and packages that start recipes."""
_REPEAT = """
import contextlib, psutil, sys, time
with contextlib.suppress(psutil.Error):
    launcher, end = psutil.Process(int(sys.argv[1])), time.monotonic() + 60
    while launcher.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.1)
sys.stderr.write(sys.argv[2])
"""
"""Program that writes a line once a process has ended."""
_tracebacks = False


def show_tracebacks(shown: bool) -> None:
    """Choose whether errors for the user show their traceback too (`--debug`)."""
    global _tracebacks
    _tracebacks = shown


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Context of a whole command: an error for the user ends it with one line on stderr and exit status 2."""
    try:
        yield
    except Exception as error:
        if _tracebacks or not is_for_user(error):
            raise
        exit_with(error)


def is_for_user(error: BaseException) -> bool:
    """Return True for an error that a `raise` of this project made, and for what the system said to a call of it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError) or _is_failed_write(error):
        callers = [frame for frame in frames if _is_own(frame) or not _is_library(frame)]
        return bool(callers) and _is_own(callers[-1])
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return bool(last) and _is_own(frames[-1]) and (last[0].line or "").startswith("raise")


def _is_failed_write(error: BaseException) -> bool:
    """Return True for what safetensors and torch.save raise instead of the system's OSError, as when a disk is full."""
    is_safetensors = type(error).__name__ == "SafetensorError" and "I/O error" in str(error)
    return is_safetensors or (isinstance(error, RuntimeError) and "inline_container.cc" in str(error))


def exit_with(error: BaseException | str) -> NoReturn:
    """Write one line about an error for the user to stderr and exit with status 2.

    Of several processes on a machine only the first writes it. `accelerate launch` ends with a traceback of its own,
    which does not know the reason: torch's agent gets the line for its table, and after any other launcher the line
    appears once more.
    """
    line = f"error: {' '.join(_text(error).split())}\n"
    _end_progress_bars()
    record = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if record is None:
        sys.stderr.write(line)
        _repeat_after_launcher(line)
    elif _is_first(Path(record)):
        sys.stderr.write(line)
        with suppress(OSError):
            Path(record).write_text(json.dumps({"message": line.rstrip(), "timestamp": int(time.time())}))
    else:
        time.sleep(10)  # until the agent ends it, so that the reason stays the first failure in its table
    raise SystemExit(2)


def _end_progress_bars() -> None:
    """End the line of each open progress bar, so that what is written next has a line of its own."""
    if (tqdm := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _text(error: BaseException | str) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, BaseException) and _is_failed_write(error):
        return f"A file could not be written; is the disk full, or a file too large for it? ({error})"
    return str(error)


def _is_own(frame: FrameType) -> bool:
    return _package(frame) in _OWN_PACKAGES


def _is_library(frame: FrameType) -> bool:
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(frame.f_code.co_filename).parts)
    return is_installed or _package(frame) in sys.stdlib_module_names


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_first(record: Path) -> bool:
    """Return True for the first process that asks, of those that torch's agent has started on this machine."""
    try:
        (record.parent.parent / "reported").touch(exist_ok=False)  # record is ATTEMPT/RANK/error.json
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _repeat_after_launcher(line: str) -> None:
    """If a launcher started this process, start another that writes the line again after the launcher's traceback."""
    import psutil

    with suppress(OSError, psutil.Error):
        launcher = psutil.Process(os.getppid())
        if any(Path(word).name.split(".")[0] in _LAUNCHERS for word in launcher.cmdline()):
            subprocess.Popen(
                [sys.executable, "-c", _REPEAT, str(launcher.pid), line],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
