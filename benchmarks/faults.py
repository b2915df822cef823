"""Attack runs, files and servers in every way that the system can fail: `python benchmarks/faults.py --folder faults`.

Each try is one fault: a process killed, a bit flipped, a disk that is full, a clock that jumps, a broken request or
file, a connection that stays half open. Prints Markdown with the tries that were survived and that failed; exits with
status 1 if one failed. A folder keeps the outcome of every try, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from attacks import annotators, files, runs, servers, single_starts, two_processes
from attacks.children import Outcome

Attempt = Callable[[Path, int, random.Random], Outcome]
"""(folder for files, number of the try, its random numbers) -> what came of it."""


say = partial(print, flush=True)


class Part(NamedTuple):
    """One kind of attack."""

    title: str
    attempt: Attempt
    tries: int
    """Default number of tries."""
    size: int = 1
    """Faults in one try."""


PARTS = {
    "kills": Part("SIGKILL in a run of each recipe that resumes, then resume", runs.kill, 96),
    "single_kills": Part("SIGKILL in a recipe that does not resume, then start again", single_starts.kill, 40),
    "single_disk": Part("full disk in a recipe that does not resume, then room", single_starts.fill_disk, 20),
    "annotation": Part("SIGKILL or a full disk while an annotator answers", annotators.disturb, 40),
    "two_processes": Part("SIGKILL of one of two processes, then restart", two_processes.kill, 10),
    "bits": Part("one flipped bit in any file of a run, then resume", runs.flip_bit, 99),
    "disk": Part("full disk in a run, then resume with room", runs.fill_disk, 40),
    "clock": Part("clock that jumps by up to a year", runs.move_clock, 16),
    "requests": Part("mutated requests to a reward server", servers.mutated_requests, 100, servers.REQUESTS),
    "half_open": Part("connections that send half a request and stay", servers.half_open, 5, servers.CONNECTIONS),
    "files": Part("mutated prompt files, preference data, configs and records", files.mutated_files, 20, files.FILES),
}


def attack(name: str, folder: Path, *, tries: int, seed: int, say: Callable[[str], None]) -> None:
    """Make the tries of a part that are not in the folder's record yet."""
    part, record = PARTS[name], folder / f"{name}.jsonl"
    done = len(record.read_text().splitlines()) if record.exists() else 0
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "pairs.jsonl").exists():
        runs.write_inputs(work)
    for index in range(done, tries):
        outcome = part.attempt(work, index, random.Random(f"{seed} {name} {index}"))
        with record.open("a") as file:
            file.write(json.dumps({"try": index, **outcome._asdict()}) + "\n")
        if not outcome.survived:
            say(f"FAILED {name} {index}: {outcome.what}")


def table(folder: Path) -> str:
    """Return the outcomes in a folder as Markdown."""
    lines = ["| attack | tries | survived | failed |", "|---|---|---|---|"]
    for name, part in PARTS.items():
        if (record := folder / f"{name}.jsonl").exists():
            rows = [json.loads(line) for line in record.read_text().splitlines()]
            tries, failed = (sum(row.get("faults", 1) for row in some) for some in (rows, _failed(rows)))
            unit = f"{tries:,}" if part.size == 1 else f"{tries:,} x {part.size}"
            lines.append(f"| {part.title} | {unit} | {tries - failed:,} | {failed:,} |")
    return "\n".join(lines)


def _failed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not row["survived"]]


def main() -> None:
    """Attack, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="one kind of attack; all by default")
    parser.add_argument("--tries", type=int, help="number of tries of each part; by default its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where outcomes are kept; by default nowhere")
    arguments = parser.parse_args()
    runs.preload()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        for part in arguments.part or PARTS:
            tries = PARTS[part].tries if arguments.tries is None else arguments.tries
            attack(part, folder.resolve(), tries=tries, seed=arguments.seed, say=say)
        text = table(folder)
    say(text)
    raise SystemExit(1 if any(not line.endswith("| 0 |") for line in text.splitlines()[2:]) else 0)


if __name__ == "__main__":
    main()
