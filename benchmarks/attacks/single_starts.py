"""Faults in recipes that do not resume: what is left is whole or refused, and a second start does all of it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from attacks.children import End, Outcome, count_events, kill_at_event, limit_files, run_recipe
from attacks.runs import finished, undisturbed

_RUN = "run"
_WITH_TIMES = ("run.json", "config.yaml", ".lock")
"""Files that name the time or the folder of a run."""


def _publish(trained: str, work: Path, folder: Path) -> dict[str, Any]:
    return {"run": str(undisturbed(trained, work)[0]), "folder": str(folder / "publication")}


def _evaluate_policy(work: Path, folder: Path) -> dict[str, Any]:
    return {
        "weights": f"base,{undisturbed('ddpo', work)[0]}", "evaluation_rewards": "oracle", "num_evaluation_images": 2,
        "num_evaluation_steps": 2, "num_cpu_threads": 1, "run_folder": str(folder / _RUN),
    }  # fmt: skip


def _compare(work: Path, folder: Path) -> dict[str, Any]:
    return {"runs": str(undisturbed("ddpo", work)[0]), "output": str(folder / "comparison.html")}


def _evaluate_reward_model(work: Path, folder: Path) -> dict[str, Any]:
    reward, pairs = undisturbed("train_reward_model", work)[0], work / "pairs.jsonl"
    return {"reward": str(reward), "test_data": str(pairs), "num_cpu_threads": 1, "run_folder": str(folder / _RUN)}


COMMANDS: dict[str, tuple[str, Callable[[Path, Path], dict[str, Any]]]] = {
    "compare": ("compare", _compare),
    "evaluate_policy": ("evaluate_policy", _evaluate_policy),
    "evaluate_reward_model": ("evaluate_reward_model", _evaluate_reward_model),
    "publish, LoRA": ("publish", partial(_publish, "ddpo")),
    "publish, reward model": ("publish", partial(_publish, "train_reward_model")),
}
"""The recipes that do not resume, each with the options of a small run."""


def expected(name: str, work: Path) -> tuple[dict[str, str], int]:
    """Return the files that a command writes undisturbed, and the number of its file operations."""
    folder, record = _undisturbed_folder(name, work), work / "undisturbed" / f"{name}.json"
    if not record.exists():
        record.parent.mkdir(exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        recipe, options = COMMANDS[name]
        first = partial(count_events, folder, count := record.with_suffix(".count"))
        end = run_recipe(recipe, options(work, folder), record.with_suffix(".log"), first=first)
        if end.status:
            raise SystemExit(f"The undisturbed {name} failed:\n{end.output[-3000:]}")
        record.write_text(json.dumps([written(folder), int(count.read_text())]))
    files, events = json.loads(record.read_text())
    return files, events


def _undisturbed_folder(name: str, work: Path) -> Path:
    """Return a folder beside those of the tries: pages have relative links."""
    return work / f"single-undisturbed-{name}"


def written(folder: Path) -> dict[str, str]:
    """Return the hash of each file below a folder, whatever the folder is called; ending in the name of a part."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _WITH_TIMES]
    contents = {path: path.read_bytes().replace(str(folder).encode(), b"") for path in paths}
    return {str(path.relative_to(folder)): hashlib.sha256(content).hexdigest() for path, content in contents.items()}


def kill(work: Path, index: int, rng: random.Random) -> Outcome:
    """Kill a command before a chosen file operation, or at a random moment, and start it again."""
    name = sorted(COMMANDS)[index % len(COMMANDS)]
    _, events = expected(name, work)
    folder = work / f"single-{index}"
    if rng.random() < 0.75:
        at = rng.randint(1, events)
        return _disturbed(
            name, work, folder, f"killed before file operation {at} of {events}", partial(kill_at_event, at, folder)
        )
    after = rng.uniform(0.02, 1.5)
    return _disturbed(
        name, work, folder, f"killed after {after:.2f} s", partial(signal.setitimer, signal.ITIMER_REAL, after)
    )


def fill_disk(work: Path, index: int, rng: random.Random) -> Outcome:
    """Let no file of a command grow beyond a random size, as on a full disk; then start it again with room."""
    name = sorted(COMMANDS)[index % len(COMMANDS)]
    expected(name, work)
    largest = max(path.stat().st_size for path in _undisturbed_folder(name, work).rglob("*") if path.is_file())
    limit = int(largest ** rng.random())
    what = f"with files of at most {limit} bytes"
    return _disturbed(name, work, work / f"single-disk-{index}", what, partial(limit_files, limit), limit=limit)


def _disturbed(
    name: str, work: Path, folder: Path, what: str, first: Callable[[], Any], *, limit: int | None = None
) -> Outcome:
    """Start a command with a fault, then without; the second must do all, in a new folder if it refuses the old."""
    (recipe, options), (wanted, _) = COMMANDS[name], expected(name, work)
    folder.mkdir()
    log = folder.with_suffix(".log")
    end = run_recipe(recipe, options(work, folder), log, first=first)
    if limit is not None and end.status and "Traceback" in end.output and limit > len(end.output) + 4096:
        return Outcome(False, f"{name} {what}: {' '.join(end.output.split())[-300:]}")
    said = ""
    if end.status:
        end = run_recipe(recipe, options(work, folder), log)
    if end.refused:
        said, whole = "refused, ", _is_whole(name, work, folder, log)
        shutil.rmtree(folder)
        folder.mkdir()
        end = run_recipe(recipe, options(work, folder), log) if whole is None else whole
    found = {} if end.status else written(folder)
    differing = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
    said += f"exit status {end.status}: {' '.join(end.output.split())[-300:]}" if end.status else (
        f"differs in {differing[:3]}" if differing else "equal files"
    )  # fmt: skip
    return finished(folder, log, Outcome(not end.status and not differing, f"{name} {what}: {said}"))


def _is_whole(name: str, work: Path, folder: Path, log: Path) -> End | None:
    """Return None if what was left of evaluated weights can be compared, or is refused with one line; else the end."""
    if name != "evaluate_policy":
        return None
    page = work / f"{folder.name}.html"
    end = run_recipe("compare", {"runs": str(folder / _RUN), "output": str(page)}, log)
    page.unlink(missing_ok=True)
    return end if end.status and not end.refused else None
