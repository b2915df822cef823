"""Compute what fits on which GPU: the plan (`--dry_run`) of each config of recipes/configs.

    python benchmarks/what_fits.py
    python benchmarks/what_fits.py recipes/configs/flow_grpo_flux.yaml --options="--quantization nf4"

Prints Markdown, a row for each config, or for each config and `--options` if these are given: the switches that save
memory, the most bytes on the device of one process in bfloat16 and the phase of it, and the smallest GPU of which that
is at most 90 %: a GPU is sold by GB of 2^30 bytes, all other GB are of 10^9. Weights of the config's reward are
included. Nothing is measured.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from rlhf_t2i.config import parse_config
from rlhf_t2i.plan import make_plan
from rlhf_t2i.plan.text import fits
from rlhf_t2i.plan.types import Plan

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
SIZES = (8, 12, 16, 24, 48, 80, 141)
"""GB of GPUs, as they are sold."""
GIGA, TERA = 1e9, 1e12
say = partial(print, flush=True)
HEADER = "| config | trained | switches | GB at the peak | in | smallest GPU | main memory, GB | TFLOP a step | CPU s |"


def recipe_of(path: Path) -> Any:
    """Return the module of the recipe that a config file is for, by the command in its comment."""
    found = re.search(r"recipes/(\w+)\.py", path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{str(path)!r} has no command with a recipe in its comment.")
    return import_module(f"recipes.{found[1]}")


def planned(path: Path, options: str = "") -> tuple[Any, Plan]:
    """Return the options of a config file and the plan of one process in bfloat16."""
    recipe = recipe_of(path)
    arguments = ["--config", str(path), "--mixed_precision", "bf16", "--dry_run", *shlex.split(options)]
    config = parse_config(recipe.Config, arguments=arguments)
    return config, make_plan(recipe.main, config)


def switches(config: Any) -> str:
    """Return the options of a config that decide how much memory it takes."""
    flags = ("gradient_checkpointing", "offload_text_encoders")
    on = [name.replace("_", " ") for name in flags if getattr(config, name, False)]
    return ", ".join(
        [f"microbatch {config.microbatch_size}", *filter(None, [getattr(config, "quantization", None)]), *on]
    )


def row(name: str, config: Any, plan: Plan, *, seconds: float) -> str:
    """Return the row of the table of one plan."""
    worst = max(plan.peaks, key=lambda phase: plan.peaks[phase])
    fitting = next((f"{size} GB" for size in SIZES if fits(plan.peak, size)), "none")
    learned = sum(count for count, _, _ in plan.parts.values()) / 1e6
    trained = f"{learned:,.0f} M" if learned else "nothing"
    cells = [
        name, trained, switches(config), f"{plan.peak / GIGA:.1f}", worst, fitting,
        f"{plan.host / GIGA:.1f}", f"{plan.flops / TERA:,.0f}", f"{seconds:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="*", type=Path, help="YAML files; default: all")
    parser.add_argument("--options", default="", help="further options of the recipes, in one text")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    say(f"{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    for path in arguments.configs or sorted(CONFIGS.glob("*.yaml")):
        start = time.process_time()
        config, plan = planned(path, arguments.options)
        name = " ".join([path.stem, *([arguments.options] if arguments.options else [])])
        say(row(name, config, plan, seconds=time.process_time() - start))


if __name__ == "__main__":
    main()
