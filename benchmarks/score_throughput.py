"""Throughput of scoring with LLaVA-Reward on one CPU thread: `python benchmarks/score_throughput.py`.

The baseline scores as the published code does: one image a call, eager attention, one run of the whole backbone for
each perspective, and SkipCA at every position with explicit keys and values. Both score the same images with the same
weights, in turns in one process; their scores must agree within 1e-4. Times are processor times, which depend little
on the load of the machine.

Two models: the built-in one (16 visual tokens), and a random LLaVA of some 30 million parameters (LoRA of rank 16), in
which arithmetic takes more of the time than Python. Prints Markdown.
"""

# transformers has no usable types.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward_model.backbones.llava import Llava
from reward_model.backbones.prompts import PromptTokenizer, find_chat_template
from reward_model.config import RewardModelConfig
from reward_model.model import Perspective, RewardModel, last_real_token
from reward_model.scoring import LlavaReward
from rlhf_t2i.shapes.names import TOY_BACKBONE_FOLDER, TOY_REWARD_MODELS, TOY_SKIP_CA_REWARD_MODEL

NAMES = ("alignment", "fidelity", "safety", "ranking")
PROMPTS = ("a red circle on a blue background", "two green squares on a white background", "three yellow triangles")
PATCH = 14
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Work:
    """Images and prompts to score, with a model and some of its perspectives."""

    reward_model: LlavaReward
    images: Float[Tensor, "B 3 Y X"]
    prompts: Sequence[str]
    names: Sequence[str]
    batch_size: int


def main() -> None:
    """Compare both implementations, then measure the effect of single settings."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--num_images", type=int, default=8, help="images for the random LLaVA; the built-in model scores 64"
    )
    parser.add_argument("--image_size", type=int, default=224, help="pixels per side; 224 is 256 visual tokens")
    parser.add_argument("--num_rounds", type=int, default=1, help="repetitions; the fastest counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scores_of(work(built_in(), 4, 32))  # warm-up
    print_comparison(arguments.num_images, arguments.image_size, rounds=arguments.num_rounds)
    print_settings(arguments.num_images)


def print_comparison(num_images: int, image_size: int, *, rounds: int) -> None:
    """Print the throughput of both implementations."""
    small = built_in()
    works = {"built-in, one perspective": work(small, 64, 32, names=NAMES[:1])}
    reward_model = random_llava(image_size)
    works["random LLaVA, one perspective"] = work(reward_model, num_images, image_size, names=NAMES[:1])
    works["random LLaVA, four perspectives"] = work(reward_model, num_images, image_size)
    write("| model | images | baseline, images/s | this project, images/s | ratio | largest difference |")
    write("|---|---|---|---|---|---|")
    for words, wanted in works.items():
        slow, fast = interleaved([lambda w=wanted: baseline(w), lambda w=wanted: scores_of(w)], rounds=rounds)
        difference = max((slow[1][name] - fast[1][name]).abs().max().item() for name in wanted.names)
        if difference > TOLERANCE:
            raise AssertionError(f"{words}: the scores of both implementations differ by {difference:.2g}.")
        count = len(wanted.images)
        write(
            f"| {words} | {count} | {count / slow[0]:.2f} | {count / fast[0]:.2f} | {slow[0] / fast[0]:.2f} "
            f"| {difference:.1e} |"
        )


def print_settings(num_images: int) -> None:
    """Print throughput and memory with one setting changed at a time."""
    write("\n| random LLaVA, 256 visual tokens, batches of 2, float32 | images/s | peak, MB more |")
    write("|---|---|---|")
    reward_model = random_llava(224)
    one = work(reward_model, num_images, 224, names=NAMES[:1])
    rows: list[tuple[str, Work, dict[str, Any]]] = [
        *((f"batch size {size}", one, {"batch_size": size}) for size in (1, 2, 4, 8)),
        *(
            (f"{(size // PATCH) ** 2} visual tokens", work(random_llava(size), num_images, size, names=NAMES[:1]), {})
            for size in (112, 168)
        ),
        *((f"{num} perspectives", work(reward_model, num_images, 224, names=NAMES[:num]), {}) for num in (2, 4)),
        ("bfloat16", work(random_llava(224, dtype=torch.bfloat16), num_images, 224, names=NAMES[:1]), {}),
        ("with the gradient to the pixels", one, {"gradient": True}),
    ]
    for words, wanted, options in rows:
        with peak_memory() as more:
            [(seconds, _)] = interleaved([lambda w=wanted, o=options: scores_of(w, **o)], rounds=1)
        write(f"| {words} | {len(wanted.images) / seconds:.2f} | {more[0]:.0f} |")


# --- implementations --------------------------------------------------------------------------------------


def scores_of(wanted: Work, *, batch_size: int | None = None, gradient: bool = False) -> dict[str, Tensor]:
    """Score as this project does."""
    batch_size = batch_size or wanted.batch_size
    images = wanted.images.clone().requires_grad_(gradient)
    scores = wanted.reward_model.score_all(images, wanted.prompts, perspectives=wanted.names, batch_size=batch_size)
    if gradient:
        torch.stack(list(scores.values())).sum().backward()
    return {name: score.detach() for name, score in scores.items()}


@torch.no_grad()
def baseline(wanted: Work) -> dict[str, Tensor]:
    """Score as the published code does, with the same weights."""
    model = wanted.reward_model.model
    model.backbone.model.set_attn_implementation("eager")
    found: dict[str, list[Tensor]] = {name: [] for name in wanted.names}
    for name in wanted.names:
        with model.using(name):
            for image, prompt in zip(wanted.images, wanted.prompts, strict=True):
                output = model.backbone.forward(model.backbone.prepare([image], [prompt]))
                part = model.perspectives[name]
                assert isinstance(part, Perspective)
                states = skip_ca_everywhere(part, output.hidden.float(), output.visual.float())
                assert part.head is not None
                values = F.linear(states, part.head.weight)
                found[name].append(last_real_token(values, output.hidden_mask)[:, 0])
    model.backbone.model.set_attn_implementation("sdpa")
    return {name: torch.cat(values) for name, values in found.items()}


def skip_ca_everywhere(
    part: Perspective, hidden: Float[Tensor, "1 L D"], visual: Float[Tensor, "1 V D"]
) -> Float[Tensor, "1 L D"]:
    """Return SkipCA of one head with a query at every position and explicit keys and values."""
    layer = part.skip_ca
    if layer is None:
        return hidden
    if layer.num_heads != 1:
        raise ValueError(f"The published SkipCA has one head; this one has {layer.num_heads}.")
    query, key, value = layer.query(hidden), layer.key(visual), layer.value(visual)
    weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)
    return F.rms_norm(hidden + weights @ value, hidden.shape[-1:], layer.norm.weight, layer.norm.eps)


def interleaved(
    functions: Sequence[Callable[[], dict[str, Tensor]]], *, rounds: int
) -> list[tuple[float, dict[str, Tensor]]]:
    """Run all functions in turns; return the least processor seconds and the last result of each."""
    seconds = [math.inf] * len(functions)
    results: list[dict[str, Tensor]] = [{} for _ in functions]
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.process_time()
            results[i] = function()
            seconds[i] = min(seconds[i], time.process_time() - start)
    return list(zip(seconds, results, strict=True))


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure the peak memory of the process minus its memory before, in MB (Linux)."""
    more = [math.nan]
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, so that it counts again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _megabytes("VmRSS")
    yield more
    more[0] = _megabytes("VmHWM") - before


def _megabytes(field: str) -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


# --- models --------------------------------------------------------------------------------------


def work(reward_model: LlavaReward, num_images: int, size: int, *, names: Sequence[str] | None = None) -> Work:
    """Return random images with prompts of different lengths.

    Small images are scored in one batch; of larger ones a core's cache holds the states of two.
    """
    images = torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(num_images)]
    known = reward_model.perspectives
    return Work(reward_model, images, prompts, known if names is None else known[: len(names)], 64 if size < 100 else 2)


def built_in() -> LlavaReward:
    """Load the built-in model."""
    return LlavaReward.from_pretrained(TOY_REWARD_MODELS[TOY_SKIP_CA_REWARD_MODEL])


def random_llava(image_size: int, *, dtype: torch.dtype = torch.float32) -> LlavaReward:
    """Return a random LLaVA with four perspectives, each with a LoRA of its own."""
    source = TOY_BACKBONE_FOLDER
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=image_size,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    network = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token_id)
    )
    network = network.to(dtype).eval().requires_grad_(False)
    square = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)
    prompt_tokenizer = PromptTokenizer(tokenizer, image_token_id, find_chat_template(str(source), tokenizer), 1024)
    model = RewardModel(Llava(network, prompt_tokenizer, processor))
    for seed, name in enumerate(NAMES):
        model.add(
            RewardModelConfig(
                perspective=name, backbone="", model_type="llava", width=512, lora_rank=16, lora_alpha=32.0
            ),
            seed=seed,
        )
        scatter(model, name, ("lora", "skip_ca", "head"), seed=seed)
    return LlavaReward(model.requires_grad_(False))


def scatter(model: RewardModel, name: str, groups: Sequence[str], *, seed: int) -> None:
    """Move weights away from their initial values, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        for parameter in model.groups(name)[group].values():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.02 if group == "lora" else 0.3 / math.sqrt(parameter.shape[-1])
            parameter.data = scale * noise if group == "lora" else parameter.data + scale * noise


def write(line: str) -> None:
    """Print a line and flush it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
