"""Compare the plan's peak memory with the resident memory of the same run on the CPU.

    python benchmarks/plan_against_memory.py

Middling models of random float32 weights: like SD 1.5, SDXL and SD 3.5 medium, narrower, trained by DDPO or Flow-GRPO,
and reward training on one like Qwen2.5-VL; LoRA and all weights, with and without gradient checkpointing. Each case is
a process of its own: it makes the plan, which loads all libraries, then runs, and states the most resident memory of
its steps over that before it, and with the checkpoint and the export. Linux only. Prints Markdown.
"""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from rlhf_t2i.passed import PassedObjects, passing

MEGA = 1e6
REWARD = "benchmarks.plan_against_memory:mean_brightness"
HEADER = (
    "| model like | trained | checkpointing | parameters | planned MB | measured MB | planned / measured "
    "| with checkpoint and export, MB | CPU s |"
)
say = partial(print, flush=True)
UNET: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (160, 320, 640), "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
DENOISERS: dict[str, dict[str, Any]] = {
    "sd": UNET,
    "sdxl": UNET | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 4), "attention_head_dim": (5, 10, 20),
    },
    "sd3": {
        "sample_size": 16, "num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64,
        "caption_projection_dim": 768, "pos_embed_max_size": 48, "dual_attention_layers": (0, 1, 2, 3, 4, 5),
    },
}  # fmt: skip
CASES = [
    ("sd", True, False), ("sd", False, True), ("sdxl", True, True), ("sdxl", False, False), ("sd3", True, False),
    ("sd3", False, True), ("qwen2_5_vl", True, False), ("qwen2_5_vl", True, True),
]  # fmt: skip
"""Model, whether a LoRA is trained, gradient checkpointing."""
PEAKS: list[float] = []
"""Most resident bytes at each call of the reward."""


def mean_brightness(images: Any, prompts: Any) -> Any:
    """Score images by their mean, and note the most resident memory so far.

    The last call is that of the evaluation after the last step: the checkpoint and the export, of which a plan says
    nothing and which on a CPU hold copies of the trained weights, come after it.
    """
    del prompts
    note_peak()
    return images.mean(dim=(1, 2, 3))


def note_peak(*_: Any) -> None:
    """Note the most resident memory so far; reward training calls this after a validation, before its checkpoint."""
    from scaling import resident

    PEAKS.append(resident("VmHWM"))


def save_model(name: str, folder: Path) -> Path:
    """Save a pipeline with a middling denoiser of random weights, and tiny other parts."""
    import diffusers

    from tests import tiny

    getattr(tiny, f"save_{name}")(folder)
    part = "transformer" if name == "sd3" else "unet"
    kind: Any = diffusers.SD3Transformer2DModel if name == "sd3" else diffusers.UNet2DConditionModel
    config = {**kind.load_config(folder / part), **DENOISERS[name]}
    kind.from_config(config).save_pretrained(folder / part)
    return folder


def config_of(recipe: Any, model: str, folder: Path, *, lora: bool, checkpointing: bool) -> Any:
    """Return the options of one short training step."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a fox\n", encoding="utf-8")
    return recipe.Config(
        model=str(save_model(model, folder / "model")), prompts=str(prompts), evaluation_prompts=str(prompts),
        rewards=REWARD, num_evaluation_images=2, num_evaluation_steps=1,
        evaluation_rewards=REWARD, run_folder=str(folder / "run"),
        prompts_per_step=1, images_per_prompt=4, num_denoising_steps=2, microbatch_size=2, guidance_scale=5.0,
        num_minibatches=2, lora_rank=16 if lora else None, gradient_checkpointing=checkpointing, num_steps=2,
        num_cpu_threads=1,
    )  # fmt: skip


def reward_config_of(recipe: Any, folder: Path, *, checkpointing: bool) -> Any:
    """Return the options of a short reward training on a middling Qwen2.5-VL, with images of 576 patches."""
    from PIL import Image
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from rlhf_t2i.plan.reward_training import prompt_of
    from tests import reward_models

    text = {
        "vocab_size": 1000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 1024, "bos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 6, "hidden_size": 512, "intermediate_size": 1024, "num_heads": 8, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [2, 5], "out_hidden_size": 768,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=3,
        vision_end_token_id=4,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "model")
    reward_models.save_qwen_preprocessors(folder / "model", reward_models.QWEN_TEMPLATE, patch_size=14)
    for name, colour in (("winner", "white"), ("loser", "black")):
        Image.new("RGB", (336, 336), colour).save(folder / f"{name}.png")
    rows = [{"prompt": prompt_of(60 - 30 * (i % 2)), "winner": "winner.png", "loser": "loser.png"} for i in range(16)]
    for name, count in (("pairs", 16), ("validation", 8)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[:count])), encoding="utf-8")
    return recipe.Config(
        backbone=str(folder / "model"), max_pixels=336**2, train_data=str(folder / "pairs.jsonl"),
        validation_data=str(folder / "validation.jsonl"), run_folder=str(folder / "run"), dry_run_image_side=336,
        microbatch_size=4, accumulation_steps=2, lora_rank=32, gradient_checkpointing=checkpointing, num_steps=2,
        evaluate_every=2, num_cpu_threads=1,
    )  # fmt: skip


def compare(model: str, *, lora: bool, checkpointing: bool) -> dict[str, float]:
    """Plan and run one case in this process; return bytes and seconds."""
    from importlib import import_module

    from scaling import reset_peak, resident

    from rlhf_t2i.plan.dry_run import rehearse
    from rlhf_t2i.plan.reward_training import rehearse as rehearse_reward_training

    warnings.filterwarnings("ignore")
    name = {"sd3": "flow_grpo", "qwen2_5_vl": "train_reward_model"}.get(model, "ddpo")
    recipe = import_module(f"recipes.{name}")
    with tempfile.TemporaryDirectory() as folder:
        if model == "qwen2_5_vl":
            config = reward_config_of(recipe, Path(folder), checkpointing=checkpointing)
            plan = rehearse_reward_training(recipe.main, config)
        else:
            config = config_of(recipe, model, Path(folder), lora=lora, checkpointing=checkpointing)
            plan = rehearse(recipe.main, config, on_gpu=False)
        gc.collect()
        reset_peak()
        before, start = resident("VmRSS"), time.process_time()
        reported = patch.object(recipe, "record_history", note_peak, create=True)
        with passing(PassedObjects({}, {}, {REWARD: mean_brightness})), reported:
            recipe.main(config)
        peak = PEAKS[0] if model == "qwen2_5_vl" else PEAKS[-1]  # a reward training reports after its checkpoint too
        return {
            "parameters": sum(learned + frozen for learned, frozen, _ in plan.parts.values()),
            "planned": plan.peak, "measured": peak - before, "to_the_end": resident("VmHWM") - before,
            "seconds": time.process_time() - start,
        }  # fmt: skip


def main() -> None:
    """Run each case in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", type=int, help="numbers of cases, from 0 on; default: all")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        model, lora, checkpointing = CASES[arguments.measure]
        say(json.dumps(compare(model, lora=lora, checkpointing=checkpointing)))
        return
    say(HEADER)
    say(f"|{'---|' * (HEADER.count('|') - 1)}")
    # What is freed goes back to the system at once, as far as the allocator can.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for number in arguments.cases or range(len(CASES)):
        model, lora, checkpointing = CASES[number]
        command = [sys.executable, __file__, "--measure", str(number)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["planned"] / found["measured"]
        cells = [
            model, "LoRA" if lora else "all weights", "yes" if checkpointing else "no",
            f"{found['parameters'] / 1e6:.0f} M", f"{found['planned'] / MEGA:,.0f}", f"{found['measured'] / MEGA:,.0f}",
            f"{ratio:.2f}", f"{found['to_the_end'] / MEGA:,.0f}", f"{found['seconds']:.0f}",
        ]  # fmt: skip
        say(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
