"""Mutated files that users and strangers hand over: prompts, preference data, options, and records of runs."""

from __future__ import annotations

import io
import json
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.children import Outcome, run_child
from attacks.mutations import mutated

FILES = 250
"""Mutated files in one try."""
_SECONDS = 10
"""Processor time that one file may take."""
_EXTRA_BYTES = 2**31
"""Memory that a try may take beside what is loaded before."""
Read = Callable[[Path], Any]


def originals() -> dict[str, tuple[bytes, Read]]:
    """Return valid contents by file name, with what reads them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"a fox {i}", "text": "FOX", "size": i / 3} for i in range(4)]
    pairs = [{"prompt": f"a fox {i}", "winner": "a.png", "loser": "b.png", "rating_gap": 0.5} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    info = {"recipe": "ddpo", "version": "1", "evaluation_prompts": {"count": 2, "trained_on": 0, "title": "held-out"}}
    steps = [{"kind": "train", "step": i, "reward": 0.1 * i, "elapsed": 1.0} for i in range(1, 4)]
    metrics = "".join(json.dumps(row) + "\n" for row in steps)
    return {
        "prompts.jsonl": (lines.encode(), _prompts),
        "prompts.json": (json.dumps(rows).encode(), _prompts),
        "prompts.csv": (b'prompt,text\n"a fox, red",FOX\na cat,CAT\n', _prompts),
        "prompts.txt": (b"a fox\na red cat\n", _prompts),
        "prompts.parquet": (table.getvalue(), _prompts),
        "pairs.jsonl": ("".join(json.dumps(pair) + "\n" for pair in pairs).encode(), _pairs),
        "config.yaml": (b"prompts_per_step: 4\nlearning_rate: 1.0e-4\nrewards: [oracle]\nlora_rank: 4\n", _config),
        "run.json": (json.dumps(info).encode(), _run_info),
        "metrics.jsonl": (metrics.encode(), _metrics),
    }


def _prompts(path: Path) -> object:
    from rlhf_t2i.data.prompt_files import read_rows

    return read_rows(str(path))


def _pairs(path: Path) -> object:
    from reward_model.datasets import load_same_prompt_pairs

    return load_same_prompt_pairs([str(path)], skipped=None, log=lambda _: None, image_root=str(path.parent))


def _config(path: Path) -> object:
    from recipes.ddpo import Config
    from rlhf_t2i.config import parse_config

    try:
        return parse_config(Config, "", arguments=["--config", str(path)])
    except SystemExit as error:
        if error.code != 2:  # the one line of a mistake on the command line
            raise
        return None


def _run_info(path: Path) -> object:
    from rlhf_t2i.output.run_folder import read_run_info

    return read_run_info(path.parent)


def _metrics(path: Path) -> object:
    from rlhf_t2i.training.metrics import read_metrics

    return read_metrics(path.parent)


def mutated_files(work: Path, index: int, rng: random.Random) -> Outcome:
    """Read mutated files in a process with little memory: each is read, or refused by an error for the user in time."""
    folder, log = work / f"files-{index}", work / f"files-{index}.log"
    folder.mkdir(exist_ok=True)
    end = run_child(lambda: _read_all(folder, rng), log)
    last = " ".join(end.output.split())[-400:]
    if not end.status:
        for path in (*folder.iterdir(), folder, log):
            path.rmdir() if path.is_dir() else path.unlink()
    return Outcome(not end.status, "read or refused" if not end.status else f"exit status {end.status}: {last}")


def _read_all(folder: Path, rng: random.Random) -> None:
    from rlhf_t2i.errors import is_for_user

    for name in ("a.png", "b.png"):
        _save_image(folder / name)
    contents = originals()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _EXTRA_BYTES, taken + _EXTRA_BYTES))
    failures: dict[str, str] = {}
    for _ in range(FILES):
        name = rng.choice(sorted(contents))
        content, read = contents[name]
        path = folder / name
        path.write_bytes(mutated(content, rng))
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            read(path)
        except Exception as error:
            if not is_for_user(error):
                failures.setdefault(f"{name}: {type(error).__name__}", str(error)[:100])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    if failures:
        raise AssertionError("; ".join(f"{name} {text}" for name, text in sorted(failures.items())))


def _save_image(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(path)
