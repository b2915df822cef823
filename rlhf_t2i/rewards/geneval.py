"""GenEval as a reward (Ghosh et al., arXiv:2310.11513): the objects, counts, colours and positions of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_t2i.rewards.geneval_rows import CLASSES, GenevalPrompt, ObjectCondition, parse_row

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
_CONFIDENCE, _CONFIDENCE_IN_COUNTING = 0.3, 0.9
_MOST_OBJECTS = 16
"""Objects of one class that are kept, those with the highest scores."""
_NEARNESS = 0.1
"""Share of the objects' sizes by which their distance is reduced."""


@dataclass(frozen=True, slots=True)
class Detection:
    """An object that a detector found in an image."""

    name: str
    """Its class, as GenEval names it."""
    score: float
    box: tuple[int, int, int, int]
    """Left, top, right and bottom edge in pixels."""
    mask: Bool[Tensor, "Y X"]


ColorsOf = Callable[[Sequence[Detection], str], list[str]]
"""Detections of one class, and the class -> the colour of each."""


class GenevalReward:
    """1 for an image that meets every condition of its row and none of `exclude`, else 0; graded, a mean of terms.

    A condition on a count holds for at least so many objects, as in the benchmark, or for exactly so many. The detector
    is Mask2Former, colours are named by CLIP; both are on the device of the images.
    """

    def __init__(
        self,
        *,
        graded: bool = False,
        exact_count: bool = False,
        detector: str | None = None,
        clip: str | None = None,
        batch_size: int = 8,
        device: str | None = None,
    ) -> None:
        """Load both models from folders or the Hub; None are DETECTOR and CLIP.

        `graded`: return `graded_score`, which always counts exactly. `batch_size`: images, or objects, in one forward
        pass. `device`: where the models run; None is the device of the images.
        """
        from rlhf_t2i.rewards.geneval_models import ColorClassifier, Detector

        self.graded, self.exact_count, self.device = graded, exact_count, device
        self.detector = Detector(detector or DETECTOR, batch_size=batch_size)
        self.classifier = ColorClassifier(clip or CLIP, batch_size=batch_size)

    @staticmethod
    def check_row(metadata: Mapping[str, Any]) -> None:
        parse_row(metadata)

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, " B"]:
        """Return the score of each image for its row."""
        del prompts
        images = images.detach().float().clamp(0, 1).to(self.device or images.device)
        found, scores = self.detector(images, threshold=_CONFIDENCE), list[float]()
        for image, detections, row in zip(images, found, metadata, strict=True):
            prompt = parse_row(row)
            objects = objects_by_class(detections, tag=prompt.tag)

            def colors_of(objects: Sequence[Detection], name: str, image: Tensor = image) -> list[str]:
                return self.classifier(image, objects, name)

            scores.append(
                graded_score(prompt, objects, colors_of)
                if self.graded
                else float(meets_all(prompt, objects, colors_of, exact_count=self.exact_count))
            )
        return torch.tensor(scores)


def objects_by_class(detections: Sequence[Detection], *, tag: str) -> dict[str, list[Detection]]:
    """Return the confident detections of each class, the most confident first; counting needs more confidence."""
    confidence = _CONFIDENCE_IN_COUNTING if tag == "counting" else _CONFIDENCE
    sure = sorted((each for each in detections if each.score > confidence), key=lambda each: -each.score)
    return {name: [each for each in sure if each.name == name][:_MOST_OBJECTS] for name in CLASSES}


def meets_all(
    prompt: GenevalPrompt, objects: Mapping[str, Sequence[Detection]], colors_of: ColorsOf, *, exact_count: bool
) -> bool:
    """Return True if all of `include` and none of `exclude` holds.

    Of more objects than a condition counts, the most confident ones must have its colour and position.
    """
    groups: list[Sequence[Detection] | None] = []
    for wanted in prompt.include:
        found = objects[wanted.name] if exact_count else objects[wanted.name][: wanted.count]
        holds = (
            len(found) == wanted.count
            and (wanted.color is None or set(colors_of(found, wanted.name)) == {wanted.color})
            and _is_in_position(wanted, found, groups)
        )
        groups.append(found if holds else None)
    has_too_many = any(len(objects[unwanted.name]) >= unwanted.count for unwanted in prompt.exclude)
    return None not in groups and not has_too_many


def graded_score(prompt: GenevalPrompt, objects: Mapping[str, Sequence[Detection]], colors_of: ColorsOf) -> float:
    """Return the mean of the terms of all conditions of `include`, in [0, 1].

    count      max(0, 1 - |n - found| / n)
    colour     max(0, 1 - |n - found of this colour| / n) if the count is right, else 0
    position   1 if count and colour are right and each object is there from each object that it refers to, else 0
    """
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for wanted in prompt.include:
        found, count = objects[wanted.name], wanted.count
        terms.append(max(0.0, 1 - abs(count - len(found)) / count))
        holds = len(found) == count
        if wanted.color is not None:
            num_right = colors_of(found, wanted.name).count(wanted.color) if holds else 0
            terms.append(1 - (count - num_right) / count)
            holds = num_right == count
        if wanted.position is not None:
            holds = holds and _is_in_position(wanted, found, groups)
            terms.append(float(holds))
        groups.append(found if holds else None)
    return sum(terms) / len(terms)


def relations(one: Detection, other: Detection) -> set[str]:
    """Return where one object is, seen from another: of left of, right of, above and below none, one or two.

        offset = centre - centre'
        d      = sign(offset) * max(|offset| - 0.1 (size + size'), 0) / |offset|_2, for x and y

    A component of d beyond 0.5 decides.
    """
    boxes = torch.tensor([one.box, other.box], dtype=torch.float64).view(2, 2, 2)
    centers, sizes = boxes.mean(1), (boxes[:, 1] - boxes[:, 0]).abs()
    offset = centers[0] - centers[1]
    reduced = (offset.abs() - _NEARNESS * sizes.sum(0)).clamp_min(0) * offset.sign()
    if not reduced.any():
        return set()
    x, y = (reduced / offset.norm()).tolist()
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in found.items() if holds}


def _is_in_position(
    wanted: ObjectCondition, found: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]
) -> bool:
    """Return True without a position, or if each object is there from each object of a condition that holds."""
    if wanted.position is None:
        return True
    relation, index = wanted.position
    others = groups[index]
    return others is not None and all(relation in relations(one, other) for one in found for other in others)
