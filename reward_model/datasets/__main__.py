"""Check preference data before training: every record is read and every image is decoded, in several processes.

    python -m reward_model.datasets check pairs.jsonl
    python -m reward_model.datasets check pick_a_pic:data/pickapic_v2 --num_workers 16

PLACE is FORMAT:PATH as in --train_data (docs/data.md). Records that cannot be used are written to bad_records.jsonl,
with file, row and reason. If there is none, the data are stamped: later runs say so, and refuse changed data files.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm


def main(arguments: list[str]) -> int:
    """Run a command and return its exit status: 0, 1 for bad records, 2 if the data cannot be read."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m reward_model.datasets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    check = parser.add_subparsers(required=True).add_parser("check", help="read all records and decode all images")
    check.add_argument("place", metavar="PLACE", help="data to check: PATH or FORMAT:PATH, as in --train_data")
    check.add_argument("--image_root", help="folder that relative image paths start from; default: the data file's own")
    check.add_argument("--image_prefix", help="OLD=NEW: image paths that start with OLD are read as if with NEW")
    check.add_argument("--streaming", action="store_true", help="read hf:ID@SPLIT on the Hub without downloading it")
    check.add_argument(
        "--num_workers", type=int, default=os.cpu_count() or 1, help="processes that decode images; default: one a core"
    )
    check.add_argument(
        "--bad", type=Path, default=Path("bad_records.jsonl"),
        help="file for the records that cannot be used; default: bad_records.jsonl",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    from reward_model.datasets.check import check_data  # takes seconds

    try:
        found = check_data(
            options.place, image_root=options.image_root, image_prefix=options.image_prefix, bad=options.bad,
            num_workers=options.num_workers, streaming=options.streaming,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        tqdm.write(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if found.num_bad:
        tqdm.write(f"{found.num_bad:,} records cannot be used; {options.bad} has file, row and reason of each.")
        return 1
    tqdm.write(f"{found.num_records:,} records and {found.num_images:,} images can be used; stamp: {found.stamp}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
