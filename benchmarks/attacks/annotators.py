"""Faults while annotators answer: no answer that was confirmed may be lost or doubled."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from attacks.children import Outcome, count_events, has_ended, kill_at_event, limit_files, start_recipe, wait_for_child
from attacks.runs import finished

_KEYS = ("left", "right", "tie", "bad", "undo", "right", "left")
"""What the annotator presses, in turn."""
_PRESSES = 21
_START_S = 120.0


def disturb(work: Path, index: int, rng: random.Random) -> Outcome:
    """Kill the annotation page or fill its disk while questions are made or answered, then start it again."""
    expected, events = _undisturbed(work)
    folder = work / f"annotate-{index}"
    if index % 2:
        limit = int(2 ** rng.uniform(4, 13))
        what, first = f"full disk: files of at most {limit} bytes", partial(limit_files, limit)
    else:
        at = rng.randint(1, events)
        what, first = f"killed before file operation {at} of {events}", partial(kill_at_event, at, folder)
    confirmed, output = _session(work, folder, first)
    log = folder.with_suffix(".log")
    kept = (folder / "answers.jsonl").read_bytes().count(b"\n") if (folder / "answers.jsonl").is_file() else 0
    if confirmed > kept:
        return Outcome(False, f"{what}: {confirmed} answers were confirmed and {kept} kept")
    total, output = _session(work, folder, None, answered=kept)
    found = _written(folder)
    same = found == expected
    said = f"{confirmed} answers before, {total} after, " + ("equal files" if same else f"{found}: {output[-300:]}")
    return finished(folder, log, Outcome(same, f"{what}: {said}"))


def _undisturbed(work: Path) -> tuple[dict[str, Any], int]:
    """Return what an annotator leaves undisturbed, and the number of file operations."""
    folder, record = work / "undisturbed" / "annotate", work / "undisturbed" / "annotate.json"
    if not record.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        confirmed, output = _session(work, folder, partial(count_events, folder, count := record.with_suffix(".count")))
        if confirmed < _PRESSES:
            raise SystemExit(f"The undisturbed annotation failed:\n{output[-3000:]}")
        record.write_text(json.dumps([_written(folder), int(count.read_text())]))
    found, events = json.loads(record.read_text())
    return found, events


def _session(work: Path, folder: Path, first: Callable[[], Any] | None, *, answered: int = 0) -> tuple[int, str]:
    """Serve the page and answer until the end or a fault; return the number of confirmed answers, and the output."""
    log, confirmed = folder.with_suffix(".log"), 0
    options = {"pairs": str(work / "pairs.jsonl"), "num_pairs": 8, "port": 0, "run_folder": str(folder)}
    resume = (folder / "config.yaml").is_file() and not (folder / ".starting").is_file()
    child = start_recipe("collect_preferences", {**options, "resume": resume}, log, first=first)
    try:
        if (address := _address(log, child)) is not None:
            with httpx.Client(base_url=address, trust_env=False, timeout=_START_S) as client:
                confirmed = _answer(client, answered)
    except httpx.TransportError as error:  # the page has been killed
        confirmed = error.args[-1]
    finally:
        if not has_ended(child):
            os.kill(child, signal.SIGTERM)
    return confirmed, wait_for_child(child, log).output


def _answer(client: httpx.Client, answered: int) -> int:
    """Press the keys from number `answered` on; return how many were confirmed before one was refused."""
    confirmed = 0
    try:
        pair = client.post("/enter", json={"annotator": "ann"}).json()
        for key in (_KEYS[number % len(_KEYS)] for number in range(answered, _PRESSES)):
            if pair["prompt"] is None and key != "undo":
                key = "undo"
            reply = client.post("/answer", json={"annotator": "ann", "shown": pair["shown"], "answer": key})
            if reply.status_code != 200:
                break
            pair, confirmed = reply.json(), confirmed + 1
    except httpx.TransportError as error:
        error.args = (*error.args, confirmed)
        raise
    return confirmed


def _address(log: Path, child: int) -> str | None:
    """Return the address of the page once it is printed; None if the process has ended."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and not has_ended(child):
        if log.exists() and (found := re.search(r"page +(http://\S+)", log.read_text(errors="replace"))):
            return found[1]
        time.sleep(0.01)
    return None


def _written(folder: Path) -> dict[str, Any]:
    """Return the answers without their times, and the pairs."""
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    pairs = (folder / "pairs.jsonl").read_text().splitlines()
    return {"answers": [{k: v for k, v in row.items() if k != "time"} for row in answers], "pairs": pairs}
