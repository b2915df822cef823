"""Import a published LLaVA-Reward checkpoint: write an adapter checkpoint that gives the same scores.

    python -m reward_model.import_published FOLDER --base microsoft/Phi-3.5-vision-instruct \\
        --perspective alignment --output runs/published

FOLDER holds reward_config.yaml (head and temperature), pytorch_model.bin (head, SkipCA, projector) and lora/
(adapter_config.json, adapter_model.bin). Deviations of the published code from the paper are kept and printed, and so
are weights that are still at their initial values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from reward_model.import_published.importer import import_published
from reward_model.skip_ca import SkipCaKeys


def main(arguments: Sequence[str] | None = None) -> None:
    """Import one checkpoint and print the notes on it."""
    parser = argparse.ArgumentParser(
        prog="python -m reward_model.import_published", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="Folder of the published checkpoint.")
    parser.add_argument("--base", required=True, help="Folder or Hub id of the base model of the training.")
    parser.add_argument(
        "--perspective", required=True, help="Name of the perspective, e.g. alignment, fidelity, safety or ranking."
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder to write the adapter checkpoint to.")
    parser.add_argument(
        "--skip_ca_keys", choices=get_args(SkipCaKeys),
        help="Keys and values of SkipCA; default: those of the published code for this family.",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="Precision of the backbone in scoring; default: bfloat16.",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        made = import_published(
            options.folder, options.base, options.output,
            perspective=options.perspective, skip_ca_keys=options.skip_ca_keys, dtype=options.dtype,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    lines = [*made.notes, "", *made.parts, "", f"reward model  {options.output}"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
