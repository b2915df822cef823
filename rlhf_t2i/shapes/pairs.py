"""Preference pairs of the built-in world: `python -m rlhf_t2i.shapes.pairs --output_folder FOLDER`.

A folder of images and six files in the format of `reward_model.datasets.own`:

    train_drawn.jsonl    drawn pairs of training prompts
    train_painted.jsonl  painted pairs of training prompts, labelled by the oracle
    validation.jsonl     both, from other images
    test_drawn.jsonl     drawn pairs of held-out prompts
    test_relation.jsonl  drawn pairs of held-out prompts that relate two things
    test_painted.jsonl   painted pairs of held-out prompts, labelled by the oracle

Drawn pairs show a scene and a near miss: one word of the prompt is not what the loser shows. Painted pairs are two
images of one prompt by the built-in Stable Diffusion whose graded scores lie `MIN_GAP` apart. In either there are
also hard negatives, one image under two prompts. A prompt of the held-out half is never read in training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlhf_t2i.shapes.generated import GeneratedImages, paint
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
"""How far apart the oracle's scores of two paintings are, so that they make a pair."""
SHARES: dict[Tier, float] = {"one": 0.4, "count": 0.25, "relation": 0.35}
"""Of the tiers among drawn pairs. Relations, the hardest, are tested apart as well, so that no average hides them."""

TESTS = ("test_drawn", "test_painted", "test_relation")
"""The files of held-out prompts."""

Row = dict[str, Any]


def near_misses(scene: Scene) -> dict[str, list[Scene]]:
    """Every scene of the grammar that differs from this one in just one respect, by the name of the respect."""
    first, last = scene.things[0], scene.things[-1]
    two = scene.relation is not None
    shown = {scene.background, *(thing.colour for thing in scene.things)}

    def with_first(thing: Thing) -> Scene:
        return replace(scene, things=(thing, last) if two else (thing,) * len(scene.things))

    found = {
        "colour": [with_first(Thing(c, first.shape)) for c in COLOURS if c not in shown],
        "shape": [with_first(Thing(first.colour, s)) for s in SHAPES if s != first.shape],
        "background": [replace(scene, background=b) for b in BACKGROUNDS if b not in shown],
    }
    if two:
        found["relation"] = [replace(scene, relation=r) for r in RELATIONS if r != scene.relation]
        swapped = Thing(last.colour, first.shape), Thing(first.colour, last.shape)
        found["swap"] = [replace(scene, things=swapped)]
    else:
        counts = {1, *COUNTS.values()} - {len(scene.things)}
        found["count"] = [replace(scene, things=(first,) * n) for n in sorted(counts)]
    return found


def a_near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """One near miss: first which respect, then which value."""
    choices = list(near_misses(scene).values())
    chosen = choices[rng.integers(len(choices))]
    return chosen[rng.integers(len(chosen))]


def drawn_pairs(
    count: int, split: Split, shares: Mapping[Tier, float], *, seed: int, save: Callable[[Tensor], str]
) -> Iterator[Row]:
    """Right drawing against near miss for three pairs in four, right prompt against near miss for the rest."""
    rng = np.random.default_rng([seed, 1])
    scenes = {tier: all_scenes(tier, split) for tier in shares}
    tiers = list(shares)
    while count:
        tier = tiers[rng.choice(len(tiers), p=list(shares.values()))]
        scene = scenes[tier][rng.integers(len(scenes[tier]))]
        miss = a_near_miss(scene, rng)
        right, wrong = roughened(render([scene, miss], rng=rng), rng)
        if rng.random() < 0.75:
            yield {"prompt": scene.prompt, "winner": save(right), "loser": save(wrong)}
        elif split == "training" and miss.held_out:
            continue  # its prompt must not be read
        else:
            yield {"winner_prompt": scene.prompt, "loser_prompt": miss.prompt, "image": save(right)}
        count -= 1


def roughened(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the time with noise, as a camera or a painter might leave it."""
    if rng.random() < 0.5:
        return images
    noise = rng.normal(size=images.shape).astype(np.float32)
    return (images + rng.uniform(0, 0.12) * torch.from_numpy(noise)).clamp(0, 1)


def generated_pairs(count: int, paintings: GeneratedImages, *, seed: int, save: Callable[[int], str]) -> Iterator[Row]:
    """Two paintings of one prompt, the better first, with the gap of the oracle's scores as their rating gap."""
    rng = np.random.default_rng([seed, 2])
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(paintings.prompts):
        by_prompt.setdefault(prompt, []).append(index)
    prompts = [prompt for prompt, indices in by_prompt.items() if len(indices) > 1]
    graded = paintings.graded.tolist()
    seen: set[tuple[int, int]] = set()
    for _ in range(50 * count if prompts else 0):
        if len(seen) == count:
            return
        prompt = prompts[rng.integers(len(prompts))]
        a, b = (int(i) for i in rng.choice(by_prompt[prompt], 2, replace=False))
        winner, loser = (a, b) if graded[a] >= graded[b] else (b, a)
        gap = graded[winner] - graded[loser]
        if gap > MIN_GAP and (winner, loser) not in seen:
            seen.add((winner, loser))
            yield {
                "prompt": prompt, "winner": save(winner), "loser": save(loser), "rating_gap": round(gap, 4),
            }  # fmt: skip
    raise ValueError(f"{len(graded)} paintings do not hold {count} pairs; there are about {len(seen)}.")


def misread_pairs(count: int, paintings: GeneratedImages, *, seed: int, save: Callable[[int], str]) -> Iterator[Row]:
    """One painting under two prompts: the one that the oracle sees in it, and the one it was painted for and misses."""
    rng = np.random.default_rng([seed, 3])
    found = [
        (index, scene.prompt)
        for index, scene in enumerate(paintings.seen)
        if scene is not None and not scene.held_out and scene.prompt != paintings.prompts[index]
    ]
    for row in rng.permutation(len(found))[:count]:
        index, shown = found[row]
        yield {"winner_prompt": shown, "loser_prompt": paintings.prompts[index], "image": save(index)}


def write_pairs(
    folder: Path,
    *,
    num_drawn: int = 10_000,
    num_painted: int = 10_000,
    num_generated: int = 8_800,
    num_validation: int = 1_000,
    num_test: int = 1_500,
    seed: int = 0,
) -> Path:
    """Draw, paint and write all six files; a folder that is there already is left alone.

    `num_test` pairs go into test_drawn and test_painted each, a third of it into test_relation.
    """
    if (folder / "test_painted.jsonl").is_file():
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def painted(split: Split, count: int, number: int) -> GeneratedImages:
        prompts = all_prompts(split)
        return paint([prompts[i % len(prompts)] for i in range(count)], seed=5 * seed + number)

    def rows_of(
        name: str,
        split: Split,
        drawn: int,
        pairs: int,
        paintings: int,
        number: int,
        shares: Mapping[Tier, float] = SHARES,
    ) -> list[Row]:
        saver = _Saver(folder, name)
        rows = list(drawn_pairs(drawn, split, shares, seed=5 * seed + number, save=saver.new))
        if pairs:
            those = painted(split, paintings, number)
            keep = saver.of(those.images)
            rows += generated_pairs(pairs, those, seed=5 * seed + number, save=keep)
            if split == "training":
                rows += misread_pairs(pairs // 5, those, seed=5 * seed + number, save=keep)
        return rows

    fewer = max(num_generated // 5, 200)
    rows = rows_of("train", "training", num_drawn, num_painted, num_generated, 0)
    _write(folder / "train_drawn.jsonl", rows[:num_drawn])
    _write(folder / "train_painted.jsonl", rows[num_drawn:])
    half = num_validation // 2
    _write(folder / "validation.jsonl", rows_of("validation", "training", half, half, fewer, 1))
    _write(folder / "test_drawn.jsonl", rows_of("test_drawn", "held-out", num_test, 0, 0, 2))
    relations = rows_of("test_relation", "held-out", num_test // 3, 0, 0, 3, {"relation": 1.0})
    _write(folder / "test_relation.jsonl", relations)
    _write(folder / "test_painted.jsonl", rows_of("test_painted", "held-out", 0, num_test, fewer, 4))
    return folder


class _Saver:
    """Numbers images as it writes them, each painting at most once."""

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


def main() -> None:
    """The command line of `write_pairs`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("runs/shapes-pairs"))
    parser.add_argument("--num_drawn", type=int, default=10_000)
    parser.add_argument("--num_painted", type=int, default=10_000)
    parser.add_argument("--num_paintings", type=int, default=8_800)
    parser.add_argument("--num_validation", type=int, default=1_000)
    parser.add_argument("--num_test", type=int, default=1_500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    write_pairs(arguments.pop("output_folder"), **arguments)


if __name__ == "__main__":
    main()
