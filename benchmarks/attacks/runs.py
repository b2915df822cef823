"""Faults in the runs of recipes: kills, flipped bits, full disks and clocks that jump.

A try has survived if the run that goes on ends with the bits of an undisturbed one, or refuses with one line.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from attacks.children import (
    End,
    Outcome,
    count_events,
    kill_at_event,
    limit_files,
    results,
    run_recipe,
)

PROMPTS = ("a red circle on a blue background", "a green square on a white background")
_TRAINING: dict[str, Any] = {
    "num_steps": 3, "checkpoint_every": 1, "evaluate_every": 2, "num_evaluation_images": 2, "microbatch_size": 4,
    "lora_rank": 2, "evaluation_rewards": "oracle", "num_denoising_steps": 2, "num_evaluation_steps": 2,
    "prompts_per_step": 2, "num_cpu_threads": 1,
}  # fmt: skip
_GROUPS: dict[str, Any] = {**_TRAINING, "images_per_prompt": 2, "rewards": "oracle"}
_SEARCH: dict[str, Any] = {"rewards": "oracle", "num_denoising_steps": 4, "num_cpu_threads": 1, "images_per_prompt": 1}
RESUMABLE: dict[str, dict[str, Any]] = {
    "ddpo": _GROUPS,
    "flow_grpo": _GROUPS,
    "diffusion_nft": _GROUPS,
    "draft": {**_TRAINING, "num_denoising_steps": 4},
    "diffusion_dpo": {**_GROUPS, "num_inner_epochs": 1},
    "best_of_n": {**_SEARCH, "num_candidates": 2, "searches_per_batch": 1},
    "fk_steering": {**_SEARCH, "num_particles": 2, "searches_per_batch": 1, "reward_std": 0.2},
    "train_reward_model": {
        "num_steps": 2, "microbatch_size": 2, "accumulation_steps": 1, "evaluate_every": 1, "lora_rank": 2,
        "lora_alpha": 4.0,
    },
}  # fmt: skip
"""The recipes whose runs go on, with options for a run of seconds."""
_PRELOADED = (
    *(f"recipes.{recipe}" for recipe in RESUMABLE),
    *(f"recipes.{name}" for name in ("collect_preferences", "compare", "evaluate_policy", "evaluate_reward_model")),
    "recipes.publish", "rlhf_t2i.hub.contents", "rlhf_t2i.hub.model_card", "rlhf_t2i.hub.upload", "uvicorn",
    "rlhf_t2i.models.load", "rlhf_t2i.training.trainer", "rlhf_t2i.search.run", "rlhf_t2i.rewards.llava_reward",
    "rlhf_t2i.data.prompt_files", "reward_model.datasets", "pyarrow.parquet",
)  # fmt: skip


def write_inputs(work: Path) -> None:
    """Write two prompts, and preference pairs of the toy world."""
    from rlhf_t2i.output.image_grids import save_image_grid
    from rlhf_t2i.shapes.scenes import parse_prompt, render

    (work / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    lines = list[str]()
    for number in range(10):
        prompt, other = PROMPTS[number % 2], PROMPTS[1 - number % 2]
        images = render([parse_prompt(prompt), parse_prompt(other)], rng=np.random.default_rng(number))
        names = [f"{number}-{side}.png" for side in ("winner", "loser")]
        for name, image in zip(names, images, strict=True):
            save_image_grid(work / name, image[None], num_columns=1)
        lines.append(json.dumps({"prompt": f"{prompt}", "winner": names[0], "loser": names[1]}))
    (work / "pairs.jsonl").write_text("".join(f"{line}\n" for line in lines))


def options_of(recipe: str, work: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the options of a small run of a recipe."""
    inputs = {"best_of_n": "prompts", "fk_steering": "prompts"}
    given = {"run_folder": str(folder), **RESUMABLE[recipe]}
    if recipe in inputs:
        given["prompts"] = str(work / "prompts.txt")
    if recipe == "train_reward_model":
        pairs = str(work / "pairs.jsonl")
        given |= {"train_data": pairs, "validation_data": pairs}
    return given | changes


def undisturbed(recipe: str, work: Path) -> tuple[Path, int, float]:
    """Return the run that nothing disturbs, the number of its file operations, and its seconds."""
    folder, record = work / "undisturbed" / recipe, work / "undisturbed" / f"{recipe}.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        count, began = record.with_suffix(".count"), time.monotonic()
        end = run_recipe(
            recipe,
            options_of(recipe, work, folder),
            record.with_suffix(".log"),
            first=partial(count_events, folder, count),
        )
        if end.status:
            raise SystemExit(f"The undisturbed run of {recipe} failed:\n{end.output[-3000:]}")
        record.write_text(json.dumps([int(count.read_text()), time.monotonic() - began]))
    return folder, *json.loads(record.read_text())


def go_on(recipe: str, work: Path, folder: Path, log: Path) -> End:
    """Resume a run as a user would; one that has no checkpoint yet begins again."""
    end = run_recipe(recipe, options_of(recipe, work, folder, resume=True), log)
    if end.refused and not list(folder.glob("checkpoints/*[0-9]")):
        end = run_recipe(recipe, options_of(recipe, work, folder), log)
    return end


def verdict(end: End, folder: Path, expected: Path, *, weights_only: bool = False) -> tuple[bool, str]:
    """Return whether a run that went on is as good as undisturbed or was refused, and which."""
    if end.refused:
        return True, "refused: " + end.output.strip().splitlines()[-1][:200]
    if end.status:
        return False, f"exit status {end.status}: {' '.join(end.output.split())[-300:]}"
    found, wanted = (results(path, weights_only=weights_only) for path in (folder, expected))
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return (False, f"differs in {differing[:3]}") if differing or not found else (True, "equal bits")


# --- the attacks ------------------------------------------------------------------------------------


def kill(work: Path, index: int, rng: random.Random) -> Outcome:
    """Kill a run before a chosen file operation, or at a random moment, and go on."""
    recipe = sorted(RESUMABLE)[index % len(RESUMABLE)]
    expected, events, _ = undisturbed(recipe, work)
    folder, log = work / f"kill-{index}", work / f"kill-{index}.log"
    if rng.random() < 0.75:
        at = rng.randint(1, events)
        moment, first = f"before file operation {at} of {events}", partial(kill_at_event, at, folder)
    else:
        after = rng.uniform(0.05, 3.0)
        moment, first = f"after {after:.2f} s", partial(signal.setitimer, signal.ITIMER_REAL, after)
    killed = run_recipe(recipe, options_of(recipe, work, folder), log, first=first)
    end = go_on(recipe, work, folder, log) if killed.status else killed
    survived, what = verdict(end, folder, expected)
    survived &= not end.refused  # a kill is nothing that a user could mend
    return finished(folder, log, Outcome(survived, f"{recipe} killed {moment}: {what}"))


def flip_bit(work: Path, index: int, rng: random.Random) -> Outcome:
    """Flip one bit of a file of an unfinished run, and go on; or of each file that a resumed run does not need."""
    recipe = ("ddpo", "ddpo", "train_reward_model")[index % 3]
    expected, _, _ = undisturbed(recipe, work)
    started = work / "undisturbed" / f"{recipe}-unfinished"
    if not started.exists():
        shutil.copytree(expected, started.with_suffix(".part"))
        last = sorted(started.with_suffix(".part").glob("checkpoints/*[0-9]"))[-1:]
        for checkpoint in last:  # so that there is something left to do
            shutil.rmtree(checkpoint)
        started.with_suffix(".part").rename(started)
    folder, log = work / f"bit-{index}", work / f"bit-{index}.log"
    shutil.copytree(started, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    needed = [p for p in files if "checkpoints" in p.parts or p.name in ("config.yaml", "run.json", "metrics.jsonl")]
    victims = [rng.choice(needed)] if index % 2 else [path for path in files if path not in needed]
    for victim in victims:
        content = bytearray(victim.read_bytes())
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(content)
    end = go_on(recipe, work, folder, log)
    survived, what = verdict(end, folder, expected, weights_only=True)
    names = ", ".join(str(victim.relative_to(folder)) for victim in victims)
    return finished(folder, log, Outcome(survived, f"{recipe}, a bit of {names}: {what}", len(victims)))


def fill_disk(work: Path, index: int, rng: random.Random) -> Outcome:
    """Let no file of a run grow beyond a random size, as on a full disk; then go on with room."""
    recipe = sorted(RESUMABLE)[index % len(RESUMABLE)]
    expected, _, _ = undisturbed(recipe, work)
    folder, log = work / f"disk-{index}", work / f"disk-{index}.log"
    largest = max(path.stat().st_size for path in expected.rglob("*") if path.is_file())
    limit = int(largest ** rng.random())

    stopped = run_recipe(recipe, options_of(recipe, work, folder), log, first=partial(limit_files, limit))
    what = f"{recipe} with files of at most {limit} bytes: "
    if stopped.status and "Traceback" in stopped.output and limit > len(stopped.output) + 4096:
        return finished(folder, log, Outcome(False, f"{what}{' '.join(stopped.output.split())[-300:]}"))
    end = go_on(recipe, work, folder, log) if stopped.status else stopped
    survived, found = verdict(end, folder, expected)
    return finished(folder, log, Outcome(survived, what + found))


def move_clock(work: Path, index: int, rng: random.Random) -> Outcome:
    """Let the clock of the system jump by up to a year, back and forth, each time that it is read."""
    recipe = sorted(RESUMABLE)[index % len(RESUMABLE)]
    expected, _, _ = undisturbed(recipe, work)
    folder, log = work / f"clock-{index}", work / f"clock-{index}.log"
    now, jumps = time.time, random.Random(rng.random())

    def first() -> None:
        time.time = lambda: now() + jumps.uniform(-1, 1) * 365 * 86400

    end = run_recipe(recipe, options_of(recipe, work, folder), log, first=first)
    survived, what = verdict(end, folder, expected)
    return finished(folder, log, Outcome(survived and not end.refused, f"{recipe}: {what}"))


def finished(folder: Path, log: Path, outcome: Outcome) -> Outcome:
    """Remove what a try has left, unless it failed."""
    if outcome.survived:
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
    return outcome


def preload() -> None:
    """Import what recipes import, so that forked processes start at once."""
    import torch

    torch.set_num_threads(1)
    for name in _PRELOADED:
        import_module(name)
