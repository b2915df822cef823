"""Make the preference pairs of the toy world: `python -m rlhf_t2i.shapes.pairs --output_folder FOLDER`.

Writes a folder of images and six files in the format of `reward_model.datasets.own`:

    train_drawn.jsonl      drawn pairs of training prompts
    train_generated.jsonl  generated pairs of training prompts, labelled by the oracle
    validation.jsonl       both kinds, from other images
    test_drawn.jsonl       drawn pairs of held-out prompts
    test_relation.jsonl    drawn pairs of held-out prompts with a relation of two things
    test_generated.jsonl   generated pairs of held-out prompts, labelled by the oracle

A drawn pair is a drawing of a scene and one of a near miss, which differs from the prompt in one respect. A generated
pair is two images of one prompt by the toy Stable Diffusion whose oracle scores differ by more than `MIN_GAP`. Both
kinds include hard negatives: one image with two prompts. Held-out prompts do not occur in the training files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlhf_t2i.config import parse_config
from rlhf_t2i.settings.base import Settings
from rlhf_t2i.settings.ranges import NonNegativeInt, PositiveInt
from rlhf_t2i.shapes.generated import GeneratedImages, generate_images
from rlhf_t2i.shapes.names import TOY_PAIRS
from rlhf_t2i.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    RELATIONS,
    SHAPES,
    Scene,
    Split,
    Thing,
    Tier,
    all_prompts,
    all_scenes,
    render,
)

MIN_GAP = 0.15
"""Smallest difference of the graded oracle scores of a generated pair."""
SHARES: dict[Tier, float] = {"one": 0.4, "count": 0.25, "relation": 0.35}
"""Fraction of drawn pairs from each tier. Relations, the hardest tier, have a test file of their own as well."""

TESTS = ("test_drawn", "test_generated", "test_relation")
"""Names of the files with held-out prompts."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Options of the command line, with the sizes of `write_pairs`."""

    output_folder: str = f"runs/{TOY_PAIRS}-pairs"
    """Folder to write the images and files to; a finished folder is left unchanged."""
    num_drawn_pairs: PositiveInt = 10_000
    """Drawn pairs to train on."""
    num_generated_pairs: PositiveInt = 10_000
    """Generated pairs to train on."""
    num_generated_images: PositiveInt = 8_800
    """Images to generate for them; for validation and test pairs a fifth of this, at least 200."""
    num_validation_pairs: PositiveInt = 1_000
    """Pairs to validate on, half of them drawn."""
    num_test_pairs: PositiveInt = 1_500
    """Pairs of test_drawn and of test_generated; test_relation has a third of this."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers."""


def near_misses(scene: Scene) -> dict[str, list[Scene]]:
    """Return all scenes of the grammar that differ from this one in exactly one respect, by the name of the respect."""
    first, last = scene.things[0], scene.things[-1]
    two = scene.relation is not None
    shown = {scene.background, *(thing.colour for thing in scene.things)}

    def with_first(thing: Thing) -> Scene:
        return replace(scene, things=(thing, last) if two else (thing,) * len(scene.things))

    misses = {
        "colour": [with_first(Thing(c, first.shape)) for c in COLOURS if c not in shown],
        "shape": [with_first(Thing(first.colour, s)) for s in SHAPES if s != first.shape],
        "background": [replace(scene, background=b) for b in BACKGROUNDS if b not in shown],
    }
    if two:
        misses["relation"] = [replace(scene, relation=r) for r in RELATIONS if r != scene.relation]
        swapped = Thing(last.colour, first.shape), Thing(first.colour, last.shape)
        misses["swap"] = [replace(scene, things=swapped)]
    else:
        counts = {1, *COUNTS.values()} - {len(scene.things)}
        misses["count"] = [replace(scene, things=(first,) * n) for n in sorted(counts)]
    return misses


def random_near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a random near miss: a respect is drawn first, then a value."""
    choices = list(near_misses(scene).values())
    chosen = choices[rng.integers(len(choices))]
    return chosen[rng.integers(len(chosen))]


def drawn_pairs(
    count: int, split: Split, shares: Mapping[Tier, float], *, seed: int, save: Callable[[Tensor], str]
) -> Iterator[Row]:
    """Yield `count` drawn pairs: three in four are two images of one prompt, the others one image with two prompts."""
    rng = np.random.default_rng([seed, 1])
    scenes = {tier: all_scenes(tier, split) for tier in shares}
    tiers = list(shares)
    while count:
        tier = tiers[rng.choice(len(tiers), p=list(shares.values()))]
        scene = scenes[tier][rng.integers(len(scenes[tier]))]
        miss = random_near_miss(scene, rng)
        right, wrong = with_noise(render([scene, miss], rng=rng), rng)
        if rng.random() < 0.75:
            yield {"prompt": scene.prompt, "winner": save(right), "loser": save(wrong)}
        elif split == "training" and miss.held_out:
            continue  # held-out prompts must not occur in training
        else:
            yield {"winner_prompt": scene.prompt, "loser_prompt": miss.prompt, "image": save(right)}
        count -= 1


def with_noise(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return the images with random Gaussian noise, or unchanged with probability 1/2."""
    if rng.random() < 0.5:
        return images
    noise = rng.normal(size=images.shape).astype(np.float32)
    return (images + rng.uniform(0, 0.12) * torch.from_numpy(noise)).clamp(0, 1)


def generated_pairs(count: int, generated: GeneratedImages, *, seed: int, save: Callable[[int], str]) -> Iterator[Row]:
    """Yield `count` pairs of generated images of one prompt, with the difference of the oracle scores as rating gap."""
    rng = np.random.default_rng([seed, 2])
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(generated.prompts):
        by_prompt.setdefault(prompt, []).append(index)
    prompts = [prompt for prompt, indices in by_prompt.items() if len(indices) > 1]
    graded = generated.graded.tolist()
    used: set[tuple[int, int]] = set()
    for _ in range(50 * count if prompts else 0):
        if len(used) == count:
            return
        prompt = prompts[rng.integers(len(prompts))]
        a, b = (int(i) for i in rng.choice(by_prompt[prompt], 2, replace=False))
        winner, loser = (a, b) if graded[a] >= graded[b] else (b, a)
        gap = graded[winner] - graded[loser]
        if gap > MIN_GAP and (winner, loser) not in used:
            used.add((winner, loser))
            yield {
                "prompt": prompt, "winner": save(winner), "loser": save(loser), "rating_gap": round(gap, 4),
            }  # fmt: skip
    raise ValueError(f"{len(graded)} generated images are too few for {count} pairs; {len(used)} were found.")


def mismatched_pairs(count: int, generated: GeneratedImages, *, seed: int, save: Callable[[int], str]) -> Iterator[Row]:
    """Yield up to `count` generated images with two prompts: that of the scene shown and its own, which it misses."""
    rng = np.random.default_rng([seed, 3])
    mismatched = [
        (index, scene.prompt)
        for index, scene in enumerate(generated.shown)
        if scene is not None and not scene.held_out and scene.prompt != generated.prompts[index]
    ]
    for row in rng.permutation(len(mismatched))[:count]:
        index, shown = mismatched[row]
        yield {"winner_prompt": shown, "loser_prompt": generated.prompts[index], "image": save(index)}


def write_pairs(
    folder: Path,
    *,
    num_drawn_pairs: int = 10_000,
    num_generated_pairs: int = 10_000,
    num_generated_images: int = 8_800,
    num_validation_pairs: int = 1_000,
    num_test_pairs: int = 1_500,
    seed: int = 0,
) -> Path:
    """Write all six files and return their folder; a finished folder is left unchanged.

    test_drawn and test_generated have `num_test_pairs` pairs each, test_relation a third of that.
    """
    if (folder / "test_generated.jsonl").is_file():
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def rows_of(
        name: str,
        split: Split,
        *,
        number: int,
        drawn: int = 0,
        generated: int = 0,
        num_images: int = 0,
        shares: Mapping[Tier, float] = SHARES,
    ) -> list[Row]:
        own_seed = 5 * seed + number
        saver = _Saver(folder, name)
        rows = list(drawn_pairs(drawn, split, shares, seed=own_seed, save=saver.new))
        if generated:
            prompts = all_prompts(split)
            images = generate_images([prompts[i % len(prompts)] for i in range(num_images)], seed=own_seed)
            save = saver.of(images.images)
            rows += generated_pairs(generated, images, seed=own_seed, save=save)
            if split == "training":
                rows += mismatched_pairs(generated // 5, images, seed=own_seed, save=save)
        return rows

    rows = rows_of(
        "train", "training", number=0, drawn=num_drawn_pairs, generated=num_generated_pairs,
        num_images=num_generated_images,
    )  # fmt: skip
    _write(folder / "train_drawn.jsonl", rows[:num_drawn_pairs])
    _write(folder / "train_generated.jsonl", rows[num_drawn_pairs:])
    fewer, half = max(num_generated_images // 5, 200), num_validation_pairs // 2
    rows = rows_of("validation", "training", number=1, drawn=half, generated=half, num_images=fewer)
    _write(folder / "validation.jsonl", rows)
    _write(folder / "test_drawn.jsonl", rows_of("test_drawn", "held-out", number=2, drawn=num_test_pairs))
    rows = rows_of("test_relation", "held-out", number=3, drawn=num_test_pairs // 3, shares={"relation": 1.0})
    _write(folder / "test_relation.jsonl", rows)
    rows = rows_of("test_generated", "held-out", number=4, generated=num_test_pairs, num_images=fewer)
    _write(folder / "test_generated.jsonl", rows)
    return folder


class _Saver:
    """Write images with consecutive numbers, each generated image at most once."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.count = folder, name, 0

    def new(self, image: Tensor) -> str:
        self.count += 1
        path = f"images/{self.name}_{self.count:06d}.png"
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8)
        Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(self.folder / path)
        return path

    def of(self, images: Tensor) -> Callable[[int], str]:
        written: dict[int, str] = {}

        def save(index: int) -> str:
            if index not in written:
                written[index] = self.new(images[index])
            return written[index]

        return save


def _write(path: Path, rows: Sequence[Row]) -> None:
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def main(config: Config) -> None:
    """Write the pairs of these settings."""
    options = asdict(config)
    write_pairs(Path(options.pop("output_folder")), **options)


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
