"""Compute which model fits on which GPU with which method, and the switches that it takes: the ladder of many_gpus.md.

    python benchmarks/ladder.py

Plans (`--dry_run`) each model with each method on one process in bfloat16, with PickScore as reward: first with the
defaults of the model's family, then with one switch after another that saves memory, until it fits on the smallest GPU.
A GPU fits if the peak is at most nine tenths of it. Each plan is a row of a JSONL file, which a later call reads, so
that it can be stopped. Prints Markdown. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from rlhf_t2i.config import parse_config
from rlhf_t2i.plan.dry_run import rehearsed
from rlhf_t2i.plan.text import fits
from rlhf_t2i.plan.types import Plan

HERE = Path(__file__).parent
PROMPTS = HERE.parent / "recipes" / "configs" / "prompts" / "animals.txt"
SIZES = (8, 12, 16, 24, 48, 80)
"""GB of GPUs."""
GIGA = 1e9
Row = Mapping[str, Any]
say = partial(print, flush=True)

MODELS = {
    "SD 1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
    "SDXL": ("stabilityai/stable-diffusion-xl-base-1.0", 1024),
    "SD 3.5 medium": ("stabilityai/stable-diffusion-3.5-medium", 512),
    "FLUX.2 klein 4B": ("black-forest-labs/FLUX.2-klein-base-4B", 512),
    "Z-Image": ("Tongyi-MAI/Z-Image-Turbo", 512),
    "FLUX.1": ("black-forest-labs/FLUX.1-dev", 512),
    "Qwen-Image": ("Qwen/Qwen-Image-2512", 512),
}
"""Hub id, and side of the images in pixels."""
PICK_SCORE = "clip:yuvalkirstain/PickScore_v1"
TRAINING = {"evaluation_prompts": PROMPTS, "evaluation_rewards": "jpeg_compressibility", "rewards": PICK_SCORE}
GROUPS = TRAINING | {"prompts": PROMPTS, "prompts_per_step": 8, "images_per_prompt": 8}
PAIRS = {key: TRAINING[key] for key in ("evaluation_prompts", "evaluation_rewards")} | {
    "pairs": "pairs.jsonl", "pairs_per_step": 64,
}  # fmt: skip
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "policy gradient": ("ddpo", GROUPS),
    "DiffusionNFT": ("diffusion_nft", GROUPS),
    "DRaFT-1": ("draft", TRAINING | {"prompts": PROMPTS, "prompts_per_step": 16, "backprop_steps": 1}),
    "Diffusion-DPO": ("diffusion_dpo", PAIRS),
    "Diffusion-DPO, all weights": ("diffusion_dpo", PAIRS | {"lora_rank": "null"}),
    "FK steering": ("fk_steering", {
        "prompts": PROMPTS, "rewards": PICK_SCORE, "evaluation_rewards": "", "num_particles": 4, "reward_std": 1.0,
        "searches_per_batch": 1, "baseline": False,
    }),
}  # fmt: skip
"""Recipe and options; a flow model's policy gradient is Flow-GRPO."""
UNETS = ("SD 1.5", "SDXL")
SWITCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "away": {"cache_embeddings": "embeddings", "rewards": f"{PICK_SCORE}(offload=True)"},
    "checkpointing": {"gradient_checkpointing": True},
    "8-bit AdamW": {"optimizer": "adamw_8bit"},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
}
"""Options that each rung of the ladder adds to those before it, from the cheapest in speed and precision."""
NOT_RUN = ("cache_embeddings", "rewards", "evaluation_rewards", "quantization")
"""Options of SWITCHES that are computed from the same rehearsal."""


def config_of(model: str, method: str, switches: Iterable[str]) -> Any:
    """Return the options of a recipe with some switches, without those that the recipe or the method cannot have."""
    recipe, options = METHODS[method]
    if recipe == "ddpo" and model not in UNETS:
        recipe = "flow_grpo"
    kind = import_module(f"recipes.{recipe}").Config
    hub_id, resolution = MODELS[model]
    given: dict[str, Any] = {"model": hub_id, "resolution": resolution, "mixed_precision": "bf16", **options}
    is_whole = options.get("lora_rank") == "null"
    for switch in switches:
        given |= {
            name: value
            for name, value in SWITCHES[switch].items()
            if name in kind.__dataclass_fields__
            and (name != "rewards" or name in options)
            and (name != ("quantization" if is_whole else "optimizer"))
        }
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return parse_config(kind, arguments=[*arguments, "--dry_run"])


def rungs_of(model: str, method: str) -> dict[str, Any]:
    """Return the config of each rung of the ladder, by the switch that it adds; without those that add nothing."""
    rungs: dict[str, Any] = {}
    names = list(SWITCHES)
    for count, name in enumerate(names, start=1):
        config = config_of(model, method, names[:count])
        if config not in rungs.values():
            rungs[name] = config
    return rungs


def climb(
    model: str, method: str, *, known: Sequence[Row], write: Callable[[Row], None], rehearse: Any = rehearsed
) -> None:
    """Plan the rungs of a model and a method that are not known, up to the first that fits on the smallest GPU."""
    done = {row["switch"]: row["gigabytes"] for row in known if (row["model"], row["method"]) == (model, method)}
    plan_of: dict[Any, Callable[[Any], Plan]] = {}
    for switch, config in rungs_of(model, method).items():
        if switch not in done:
            start = time.process_time()
            key = repr(
                [(name, getattr(config, name)) for name in type(config).__dataclass_fields__ if name not in NOT_RUN]
            )
            if key not in plan_of:
                main = import_module(type(config).__module__.replace("rlhf_t2i.settings", "recipes")).main
                plan_of = {key: rehearse(main, config)}
            plan = plan_of[key](config)
            worst = max(plan.peaks, key=lambda phase: plan.peaks[phase])
            done[switch] = round(plan.peak / GIGA, 2)
            write({
                "model": model, "method": method, "switch": switch, "gigabytes": done[switch], "phase": worst,
                "seconds": round(time.process_time() - start, 1),
            })  # fmt: skip
        if fits(done[switch] * GIGA, SIZES[0]):
            return


def table(rows: Sequence[Row]) -> str:
    """Return the grid as Markdown: the first switch with which a model and a method fit on each GPU, and its GB."""
    lines = [
        f"| model | method | {' | '.join(f'{size} GB' for size in SIZES)} |", f"|{'---|' * (2 + len(SIZES))}",
    ]  # fmt: skip
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        own = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        cells = [
            next(
                (f"{row['switch']} ({row['gigabytes']:.1f})" for row in own if fits(row["gigabytes"] * GIGA, size)), "–"
            )
            for size in SIZES
        ]
        lines.append(f"| {model} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Plan what is not known yet, and print the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=HERE / "ladder.jsonl", help="file of the plans")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="models to plan")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="methods to plan")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()] if arguments.rows.is_file() else []

    def write(row: Row) -> None:
        rows.append(row)
        with arguments.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    for method in arguments.methods:
        for model in arguments.models:
            if method != "Diffusion-DPO, all weights" or model in UNETS:
                climb(model, method, known=rows, write=write)
    order = list(MODELS), list(METHODS), list(SWITCHES)
    rows.sort(
        key=lambda row: (order[0].index(row["model"]), order[1].index(row["method"]), order[2].index(row["switch"]))
    )
    say(table(rows))


if __name__ == "__main__":
    main()
