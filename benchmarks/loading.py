"""Measure the most resident memory of a training of a model of published size, from start to export, on the CPU.

    python benchmarks/loading.py --folder runs/models sd15 sdxl sd35m

Each model is written once as a pipeline folder of random weights, in the precision of the published files, which takes
4 to 14 GB of disk. A process of its own then trains a LoRA on it by DDPO in bfloat16, one step of 2 x 2 images of one
denoising step each, or only loads it and predicts once (SD 3.5 medium). Prints a row for each model: resident memory
after the imports, its peak up to the first images, up to the end of the first step, and of all, with the checkpoint and
the export. Linux only.
"""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from rlhf_t2i.passed import PassedObjects, passing

REWARD = "benchmarks.loading:mean_brightness"
SHARD = 1 << 30
"""Bytes of weights in one file, about."""
PEAKS: list[int] = []
"""Most resident bytes at each call of the reward."""
say = partial(print, flush=True)


@dataclass(frozen=True)
class Case:
    """A model, and the size of its images."""

    model: str
    resolution: int
    recipe: str = "ddpo"
    half: bool = False
    """True for files in 16 bits, as published, False for float32."""
    without: tuple[str, ...] = ()
    """Parts that the pipeline lacks."""
    trains: bool = True
    """False to load the model, add a LoRA and predict once, where a CPU takes too long to train."""


CASES = {
    "sd15": Case("stable-diffusion-v1-5/stable-diffusion-v1-5", 128),
    "sdxl": Case("stabilityai/stable-diffusion-xl-base-1.0", 256),
    "sd35m": Case(
        "stabilityai/stable-diffusion-3.5-medium", 256, "flow_grpo", half=True,
        without=("text_encoder_3", "tokenizer_3"), trains=False,
    ),
}  # fmt: skip


def mean_brightness(images: Any, prompts: Any) -> Any:
    """Score images by their mean, and note the most resident memory so far."""
    from scaling import resident

    del prompts
    PEAKS.append(resident("VmHWM"))
    return images.mean(dim=(1, 2, 3))


def save_pipeline(case: Case, folder: Path) -> Path:
    """Write a pipeline of published size with random weights, unless it is there."""
    import diffusers
    import transformers
    from torch import nn

    from rlhf_t2i.models.architectures import published_architecture
    from tests.tiny import clip_tokenizer

    architecture: Any = published_architecture(case.model)
    index: dict[str, Any] = {"_class_name": architecture["_class_name"], **{key: [None, None] for key in case.without}}
    for name, given in architecture["parts"].items():
        config, part = dict(given), folder / name
        if name in case.without:
            continue
        if name.startswith("tokenizer"):
            tokenizer = clip_tokenizer()
            tokenizer.model_max_length = 77
            tokenizer.save_pretrained(part)
            index[name] = ["transformers", type(tokenizer).__name__]
            continue
        class_name = config.pop("_class_name")
        library: Any = diffusers if hasattr(diffusers, class_name) else transformers
        kind, index[name] = getattr(library, class_name), [library.__name__, class_name]
        if not issubclass(kind, nn.Module):
            kind.from_config(config).save_pretrained(part)
        elif not (part / "config.json").is_file():
            save_network(kind, config, part, half=case.half)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def save_network(kind: Any, config: dict[str, Any], folder: Path, *, half: bool) -> None:
    """Write a network's random weights, about a gigabyte in each file, and then its config."""
    import torch
    from safetensors.torch import save_file

    of_diffusers = hasattr(kind, "from_config")
    with torch.device("meta"):
        network = kind.from_config(config) if of_diffusers else kind(kind.config_class(**config))
    folder.mkdir(parents=True, exist_ok=True)
    weights, dtype = dict(network.named_parameters()), torch.float16 if half else torch.float32
    weights |= {name: weight for name, weight in network.state_dict().items() if "position_ids" not in name}
    stem, scale = "diffusion_pytorch_model" if of_diffusers else "model", 0.02
    shards, size, block = [dict[str, torch.Tensor]()], 0, torch.empty(1 << 20).uniform_(-scale, scale).to(dtype)
    for name, weight in weights.items():
        if size > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = weight, size + weight.numel() * dtype.itemsize
    files = dict[str, str]()
    for number, shard in enumerate(shards):
        file = f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        values = {
            name: torch.ones(weight.shape, dtype=dtype) if weight.dim() == 1
            else block.repeat(-(-weight.numel() // len(block)))[: weight.numel()].view(weight.shape)
            for name, weight in shard.items()
        }  # fmt: skip
        save_file(values, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        listed = {"metadata": {}, "weight_map": files}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(listed), encoding="utf-8")
    (network.save_config if of_diffusers else network.config.save_pretrained)(folder)


def measure(case: Case, model: Path, cache: str | None) -> dict[str, float]:
    """Train for one step in this process, with the embeddings of a cache; return resident bytes and CPU seconds."""
    from scaling import resident

    if not case.trains:
        return measure_loading(case, model)
    recipe = import_module(f"recipes.{case.recipe}")
    imports, start = resident("VmRSS"), time.process_time()
    with tempfile.TemporaryDirectory() as folder, passing(PassedObjects({}, {}, {REWARD: mean_brightness})):
        (prompts := Path(folder) / "prompts.txt").write_text("a fox\na cat\n", encoding="utf-8")
        recipe.main(
            recipe.Config(
                model=str(model), prompts=str(prompts), evaluation_prompts=str(prompts), rewards=REWARD,
                evaluation_rewards=REWARD, num_evaluation_images=2, num_evaluation_steps=1, num_steps=1,
                prompts_per_step=2, images_per_prompt=2, num_denoising_steps=1, microbatch_size=1, num_minibatches=1,
                lora_rank=4, resolution=case.resolution, mixed_precision="bf16", guidance_scale=5.0, window_end=1.0,
                gradient_checkpointing=True, run_folder=str(Path(folder) / "run"), num_cpu_threads=1,
                cache_embeddings=cache,
            )
        )  # fmt: skip
    return {
        "imports": imports, "first_images": PEAKS[1], "step": PEAKS[-1], "all": resident("VmHWM"),
        "seconds": time.process_time() - start,
    }  # fmt: skip


def measure_loading(case: Case, model: Path) -> dict[str, float]:
    """Load a model with a LoRA and predict for one image in this process; return resident bytes and CPU seconds."""
    import torch
    from scaling import resident

    from rlhf_t2i.models.load import load_policy
    from rlhf_t2i.models.lora import LoraConfiguration

    import_module(f"recipes.{case.recipe}")
    torch.set_num_threads(1)
    imports, start = resident("VmRSS"), time.process_time()
    policy = load_policy(str(model), device=torch.device("cpu"), dtype=torch.bfloat16, resolution=case.resolution)
    policy.set_trainable(LoraConfiguration(4), keep_reference=False, seed=0)
    loaded, schedule = resident("VmHWM"), policy.schedule(2)
    latents, conditioning = policy.initial_noise([torch.Generator()], copies=1), policy.encode(["a fox"])
    with torch.no_grad():
        policy.predict(latents, schedule.at(torch.zeros(1, dtype=torch.int64)), conditioning, guidance_scale=1.0)
    peak = resident("VmHWM")
    return {
        "imports": imports,
        "first_images": loaded,
        "step": peak,
        "all": peak,
        "seconds": time.process_time() - start,
    }


def main() -> None:
    """Measure each model in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(CASES), help="models")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the random models")
    parser.add_argument("--cache_embeddings", help="folder of encoded prompts; a second run loads no text encoders")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        [name] = arguments.names
        say(json.dumps(measure(CASES[name], arguments.folder / name, arguments.cache_embeddings)))
        return
    say("| model | pixels | after imports, GB | up to the first images | up to the end of the step | peak | CPU s |")
    say("|---|---|---|---|---|---|---|")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in arguments.names:
        save_pipeline(CASES[name], arguments.folder / name)
        command = [sys.executable, __file__, name, "--folder", str(arguments.folder), "--measure"]
        command += ["--cache_embeddings", arguments.cache_embeddings] if arguments.cache_embeddings else []
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [f"{found[key] / 1e9:.2f}" for key in ("imports", "first_images", "step", "all")]
        say(f"| {name} | {CASES[name].resolution} | {' | '.join(cells)} | {found['seconds']:.0f} |")


if __name__ == "__main__":
    main()
