"""Sample images with exported weights; a script that imports diffusers only: MODEL OUTPUT PROMPTS WEIGHTS ...

PROMPTS is a file with one in each line, OUTPUT will hold the images of each of the weights.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel


def sample(model: str, weights: str, prompts: Sequence[str]) -> torch.Tensor:
    """Return images of the prompts by the seeds of an evaluation; `weights` is the folder of a LoRA or of a U-Net."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if weights.endswith("lora"):
        pipe.load_lora_weights(weights)
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(weights)
    generators = [torch.Generator().manual_seed(1_000_000 + i) for i in range(len(prompts))]
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": generators, "output_type": "pt"}
    return pipe(list(prompts), **settings).images


if __name__ == "__main__":
    model, output, prompts, *folders = sys.argv[1:]
    lines = Path(prompts).read_text().splitlines()
    torch.save([sample(model, folder, lines) for folder in folders], output)
    assert not any(name.startswith("rlhf_t2i") for name in sys.modules)
