"""Sample images with exported weights; a script that imports diffusers only: MODEL WEIGHTS OUTPUT PROMPT ..."""

import sys

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

if __name__ == "__main__":
    model, weights, output, *prompts = sys.argv[1:]
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if weights.endswith("lora"):
        pipe.load_lora_weights(weights)
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(weights)
    generators = [torch.Generator().manual_seed(1_000_000 + i) for i in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=4, guidance_scale=1.0, generator=generators, output_type="pt").images
    torch.save(images, output)
    assert not any(name.startswith("rlhf_t2i") for name in sys.modules)
