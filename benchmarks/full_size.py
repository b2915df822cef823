"""Measure models of published sizes with random weights on the GPU at hand, the most important rows first.

    python benchmarks/full_size.py --plans plans.json --plan_only    # on any machine: the plans to compare with
    python benchmarks/full_size.py --plans plans.json --output rows  # on the GPU, within --minutes

A row is written to rows.jsonl as soon as it is measured; one that fails is written with its error, and the next one
goes on. Rows: the rate of bfloat16 matrix products; two training steps of a recipe (seconds and share of that rate in
sampling and update, replay error, finite gradients, peak memory beside the plan's); log-ratios of a replay with equal
and other numbers of rows, in bf16 and fp16; where the time of a denoiser's forward and backward pass goes; regional
torch.compile and channels_last; LLaVA-Reward's seconds a score. Then the table is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from benchmarks.full_size_models import QWEN_SIZES, random_pipeline
from benchmarks.full_size_parts import (
    DTYPES,
    Machine,
    Rows,
    Training,
    compile_rows,
    profile_rows,
    rate_row,
    replay_rows,
    score_rows,
)
from rlhf_t2i.passed import PassedObjects, passing

SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
SD35, FLUX, ZIMAGE = (
    "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev", "Tongyi-MAI/Z-Image-Turbo",
)  # fmt: skip
REWARD = "benchmarks.full_size:mean_brightness"
say = partial(print, flush=True)


SMALLEST = Training(
    "ddpo", SD15, 64, 2, 1.0, microbatch_size=2, precision="no", num_denoising_steps=1, num_steps=1
)  # fmt: skip
"""For a CPU, where it takes half a minute."""
TRAININGS = {
    "sd15": Training("ddpo", SD15, 512, 16, 5.0, microbatch_size=16),
    "flux": Training("flow_grpo", FLUX, 512, 8, 3.5, checkpointing=True, microbatch_size=4),
    "sdxl": Training("ddpo", SDXL, 1024, 8, 5.0, checkpointing=True, microbatch_size=4),
    "sd35m": Training("flow_grpo", SD35, 512, 16, 4.5, without=("text_encoder_3", "tokenizer_3")),
    "flux int8": Training("flow_grpo", FLUX, 512, 4, 3.5, checkpointing=True, microbatch_size=2, quantization="int8"),
    "flux nf4": Training("flow_grpo", FLUX, 512, 4, 3.5, checkpointing=True, microbatch_size=2, quantization="nf4"),
    "zimage": Training("flow_grpo", ZIMAGE, 512, 8, 1.0, checkpointing=True, microbatch_size=4),
    "sd15 fp16": Training("ddpo", SD15, 512, 16, 5.0, microbatch_size=16, precision="fp16"),
}
ORDER = (
    "rate", "sd15", "flux", "replay", "sdxl", "sd35m", "score Qwen2.5-VL-3B", "flux nf4", "profile", "compile",
    "flux int8", "zimage", "score Qwen2.5-VL-7B", "sd15 fp16",
)  # fmt: skip


def mean_brightness(images: Tensor, prompts: Any) -> Tensor:
    """Score images by their mean."""
    del prompts
    return images.mean(dim=(1, 2, 3))


# --- training ---------------------------------------------------------------------------------------------


def config_of(training: Training, folder: Path, *, planned: bool = False) -> Any:
    """Return the options of two short steps; `planned` are those of the plan, which names the quantisation."""
    (prompts := folder / "prompts.txt").write_text("a fox\n", encoding="utf-8")
    recipe = import_module(f"recipes.{training.recipe}")
    return recipe.Config(
        model=training.model, prompts=str(prompts), evaluation_prompts=str(prompts), rewards=REWARD,
        evaluation_rewards=REWARD, num_evaluation_images=2, num_evaluation_steps=1, run_folder=str(folder / "run"),
        prompts_per_step=1, images_per_prompt=training.images, num_denoising_steps=training.num_denoising_steps,
        microbatch_size=training.microbatch_size, guidance_scale=training.guidance_scale, num_minibatches=1,
        lora_rank=4, gradient_checkpointing=training.checkpointing, num_steps=training.num_steps,
        resolution=training.resolution, mixed_precision=training.precision, evaluate_every=0, checkpoint_every=0,
        window_end=1.0, offload_text_encoders=True, quantization=training.quantization if planned else None,
        **({"advantages": "whole_batch"} if training.recipe == "ddpo" else {}),
    )  # fmt: skip


def plan_of(training: Training) -> dict[str, float]:
    """Return the plan's peak, and FLOPs of sampling and update."""
    from rlhf_t2i.plan.dry_run import rehearse

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(training, Path(folder), planned=True)
        plan = rehearse(import_module(f"recipes.{training.recipe}").main, config)
    flops = {f"flops/{name}": float(counts.flops) for name, counts in plan.counts.items()}
    return {"peak": float(plan.peak), "denoiser_calls": float(plan.denoiser_calls), **flops}


def training_row(machine: Machine, name: str, training: Training) -> Rows:
    """Measure the second of two training steps of a recipe, and the peak of both."""
    from accelerate.state import AcceleratorState, GradientState

    from reward_model.quantization import quantize
    from rlhf_t2i.models.quiet import only_errors

    dtype, recipe = DTYPES[training.precision], import_module(f"recipes.{training.recipe}")
    pipeline = random_pipeline(training.model, device=machine.device, dtype=dtype, without=training.without)
    if training.quantization:
        with only_errors():
            network = pipeline.components.get("transformer") or pipeline.unet
            quantize(network, training.quantization, device=machine.device, dtype=dtype)  # pyright: ignore
    machine.reset()
    with tempfile.TemporaryDirectory() as folder:
        with passing(PassedObjects({training.model: pipeline}, {}, {})):
            recipe.main(config_of(training, Path(folder)))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    GradientState._reset_state()  # pyright: ignore[reportPrivateUsage]
    last = [row for row in map(json.loads, lines) if row["kind"] == "train"][-1]
    plan, sampling, update = machine.plans.get(name, {}), last["seconds/rollout"], last["seconds/update"]
    yield {
        "images": training.images, "resolution": training.resolution, "microbatch": training.microbatch_size,
        "seconds_sampling": sampling, "seconds_update": update,
        "share_sampling": machine.share(plan.get("flops/rollout"), sampling),
        "share_update": machine.share(plan.get("flops/update"), update),
        "replay_error": last["replay_error"], "clip_range": last["clip_range"], "gradient_norm": last["gradient_norm"],
        "peak": machine.peak(), "planned_peak": plan.get("peak"),
    }  # fmt: skip


# --- all of it --------------------------------------------------------------------------------------------


def rows_of(name: str, machine: Machine) -> Rows:
    """Return the generator of the rows of a name of ORDER, or "smallest" for the CPU."""
    if name == "smallest":
        return training_row(machine, name, SMALLEST)
    if name in TRAININGS:
        return training_row(machine, name, TRAININGS[name])
    if name.startswith("score "):
        return score_rows(machine, QWEN_SIZES[name.removeprefix("score ")], sides=(512, 1024))
    sd15 = TRAININGS["sd15"]
    match name:
        case "rate":
            return rate_row(machine)
        case "replay":
            return replay_rows(machine, {"sd15": sd15, "sdxl": TRAININGS["sdxl"]}, ("bf16", "fp16"))
        case "profile":
            return profile_rows(machine, sd15)
        case "compile":
            return compile_rows(machine, sd15)
        case _:
            raise ValueError(f"{name!r} is no row; there are {', '.join(('smallest', *ORDER))}.")


def measure(names: list[str], machine: Machine, output: Path, *, minutes: float) -> list[dict[str, Any]]:
    """Write the rows of all names, as far as time allows; return them."""
    start, found = time.monotonic(), list[dict[str, Any]]()

    def add(row: dict[str, Any]) -> None:
        found.append({**row, "elapsed": round(time.monotonic() - start, 1)})
        with (output / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[-1]) + "\n")
        say(json.dumps(found[-1]))

    for name in names:
        if time.monotonic() - start > 60 * minutes:
            add({"row": name, "left_out": "no time is left"})
            continue
        try:
            for row in rows_of(name, machine):
                add({"row": name, **row})
        except Exception as error:  # whatever a GPU or a library says: the next row may do
            where = [
                f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
            ]
            add({"row": name, "failed": f"{type(error).__name__}: {error}"[:500], "where": where[-5:]})
        machine.reset()
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure the rows that the command line names, and print them as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ORDER), help="names of rows, in their order")
    parser.add_argument("--plans", type=Path, help="file of plans, which is written if there is none")
    parser.add_argument("--plan_only", action="store_true", help="write the plans and measure nothing")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of rows.jsonl")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row starts later")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    plans = dict[str, dict[str, float]]()
    if options.plans is not None and options.plans.is_file():
        plans = json.loads(options.plans.read_text(encoding="utf-8"))
    elif options.plans is not None:
        for name in [name for name in options.rows if name in TRAININGS]:
            plans[name] = plan_of(TRAININGS[name])
            options.plans.write_text(json.dumps(plans, indent=1), encoding="utf-8")
            say(name, {key: f"{value:.3g}" for key, value in plans[name].items()})
    if options.plan_only:
        return []
    options.output.mkdir(parents=True, exist_ok=True)
    machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), plans)
    return measure(options.rows, machine, options.output, minutes=options.minutes)


if __name__ == "__main__":
    main()
