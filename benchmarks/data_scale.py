"""Measure the reader of preference data: start, memory, decoding, disk and resuming, from 100,000 to a million pairs.

    python benchmarks/data_scale.py runs/data_scale

Makes 200 JPEGs of 512 pixels, and a JSONL and a Parquet file of pairs of them for each number of rows. Every number is
measured in a process of its own; processor time, which depends little on the load of the machine, is that of all
processes that read rows, without the workers that decode images.
A start loads the pairs, holds out 5 % of the prompts, summarises both sets, and decodes the first batch of 32 pairs
with 2 workers. The first start also converts the rows; later ones map them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

NUM_IMAGES, SIDE, BATCH, NUM_WORKERS = 200, 512, 32, 2
STEP, NUM_STEPS = 20_000, 31_250


def make_images(folder: Path) -> None:
    """Write the images: smooth noise, with about the bytes of a photograph."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(NUM_IMAGES):
        path = folder / "images" / f"{number}.jpg"
        if not path.exists():
            small = np.random.default_rng(number).integers(0, 256, (128, 128, 3), np.uint8)
            Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)


def make_rows(folder: Path, count: int) -> None:
    """Write `count` pairs to ROWS.jsonl and ROWS.parquet; each prompt has two pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (folder / f"{count}.parquet").exists():
        return
    words = "a photograph of a red fox beside an old wooden house in the morning, 35 mm, number"
    rows = [
        {
            "prompt": f"{words} {i // 2}",
            "winner": f"images/{i % NUM_IMAGES}.jpg",
            "loser": f"images/{(i + 1 + i // NUM_IMAGES % (NUM_IMAGES - 1)) % NUM_IMAGES}.jpg",
        }
        for i in range(count)
    ]
    with (folder / f"{count}.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{count}.parquet")


def resident_bytes() -> tuple[int, int]:
    """Return the memory of this process that is its own, and the pages in memory of the files that it has mapped."""
    status = Path("/proc/self/status").read_text()
    own, mapped = (1024 * int(status.partition(f"{name}:")[2].split()[0]) for name in ("RssAnon", "RssFile"))
    return own, mapped


class Peak(threading.Thread):
    """Watches the highest memory of this process above that at its start: its own, and pages of mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.at_start, self.highest = resident_bytes(), (0, 0)

    def run(self) -> None:
        while True:
            now = zip(resident_bytes(), self.at_start, self.highest, strict=True)
            own, mapped = (max(highest, bytes_now - before) for bytes_now, before, highest in now)
            self.highest = own, mapped
            time.sleep(0.02)


def decode(rows: list[tuple[Any, Any]]) -> int:
    """Decode pairs, one image after the other as reward training does, and return the number of images."""
    from reward_model.images import to_tensor

    return sum(to_tensor(image).shape[0] > 0 for pair in rows for image in pair)


def decode_with_pillow(rows: list[tuple[Any, Any]]) -> int:
    """Do the same with Pillow alone."""
    from PIL import Image

    count = 0
    for pair in rows:
        for file in pair:
            with Image.open(file) as image:
                count += image.convert("RGB").width > 0
    return count


def measure_start(path: Path, step: int) -> dict[str, float]:
    """Return seconds to the first batch at a step, and the memory that it took, of a data file."""
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    from reward_model.datasets import load_records
    from reward_model.datasets.order import OrderSampler, random_order
    from reward_model.datasets.prepare import prepare_records

    peak, since, cpu = Peak(), time.monotonic(), time.process_time()
    peak.start()
    records = load_records(path)
    loaded = time.monotonic() - since
    children = resource.getrusage(resource.RUSAGE_CHILDREN)  # the processes that converted the rows
    training, _ = prepare_records(
        records, [], {}, exclude_test_prompts=False, validation_fraction=0.05, hard_negatives=0, seed=0,
        log=lambda _: None,
    )  # fmt: skip
    prepared = time.monotonic() - since

    def collate(indices: list[int]) -> int:
        pairs: list[Any] = [training[index] for index in indices]
        return decode([(pair.winner, pair.loser) for pair in pairs])

    sampler = OrderSampler(partial(random_order, len(training), seed=0), len(training))
    loader = DataLoader(range(len(training)), BATCH, sampler=sampler, num_workers=NUM_WORKERS, collate_fn=collate)  # type: ignore[arg-type]
    images = next(iter(skip_first_batches(loader, step) if step else loader))
    assert images == 2 * BATCH
    seconds = time.monotonic() - since
    return {
        "load": loaded,
        "prepare": prepared - loaded,
        "seconds": seconds,
        "CPU seconds": time.process_time() - cpu + children.ru_utime + children.ru_stime,
        "own MB": peak.highest[0] / 1e6,
        "mapped MB": peak.highest[1] / 1e6,
    }


def measure_decoding(path: Path) -> dict[str, float]:
    """Return the images of a data loader with 2 workers, by Pillow alone and by our reader: a second, and a CPU second.

    The two take turns; each number is the median of its turns, and the ratios are those of neighbouring turns.
    """
    from torch.utils.data import DataLoader

    from reward_model.datasets import load_records

    records: Any = load_records(path)[:800]

    def collate(read: Any, indices: list[int]) -> int:
        pairs: list[Any] = [records[index] for index in indices]
        return read([(pair.winner, pair.loser) for pair in pairs])

    rates: dict[str, list[tuple[float, float]]] = {"Pillow": [], "loader": []}
    for _ in range(7):
        for name, read in (("Pillow", decode_with_pillow), ("loader", decode)):
            before, since = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            count = sum(DataLoader(range(len(records)), 16, num_workers=NUM_WORKERS, collate_fn=partial(collate, read)))  # type: ignore[arg-type]
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            rates[name].append((count / (time.monotonic() - since), count / cpu))
    pairs = list(zip(rates["loader"], rates["Pillow"], strict=True))
    return {
        **{f"{name} a second": median(wall for wall, _ in rates[name]) for name in rates},
        "ratio": median(ours[0] / pillow[0] for ours, pillow in pairs),
        "ratio of CPU time": median(ours[1] / pillow[1] for ours, pillow in pairs),
    }


def in_a_process(folder: Path, *arguments: object) -> dict[str, float]:
    """Return what a measurement gives in a new process."""
    command = [sys.executable, __file__, str(folder), "--measure", *map(str, arguments)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Make the data, measure, and print one line for each number."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the data, of 300 MB for a million rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="numbers of pairs")
    parser.add_argument("--measure", nargs="+", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.measure:
        case ["decoding", path]:
            found = measure_decoding(Path(path))
        case [path, step]:
            found = measure_start(Path(path), int(step))
        case _:
            return measure_all(options.folder, options.rows)
    sys.stdout.write(f"{json.dumps(found)}\n")


def measure_all(folder: Path, counts: list[int]) -> None:
    """Print every number; what an earlier measurement converted is removed first."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    make_images(folder)
    for count in counts:
        make_rows(folder, count)
        for suffix in ("jsonl", "parquet"):
            path = folder / f"{count}.{suffix}"
            for name, step in (("first start", 0), ("later start", 0), (f"resume at step {STEP:,}", STEP)):
                if step and step * BATCH >= 0.95 * count:
                    continue
                facts = ", ".join(f"{key} {value:.1f}" for key, value in in_a_process(folder, path, step).items())
                sys.stdout.write(f"{count:>9,} {suffix:<8} {name:<22} {facts}\n")
                sys.stdout.flush()
    speeds = in_a_process(folder, "decoding", folder / f"{counts[0]}.jsonl")
    sys.stdout.write(f"images of {NUM_WORKERS} workers: {', '.join(f'{k} {v:.2f}' for k, v in speeds.items())}\n")
    files = [file for file in (folder / "cache").rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    unpacked = sum(file.suffix in (".jpg", ".jpeg", ".png") for file in files)
    sys.stdout.write(f"cache of all tables {size / 1e6:.0f} MB in {len(files)} files, {unpacked} of them images\n")


if __name__ == "__main__":
    main()
