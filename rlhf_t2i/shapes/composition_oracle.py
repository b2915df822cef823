"""The oracle of compositions: the share of a prompt's conditions that an image meets, from its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.shapes.compositions import Composition
from rlhf_t2i.shapes.oracle import Component, Detection, detect, relation_quality, shape_passes


def composition_scores(images: Float[Tensor, "B 3 Y X"], compositions: Sequence[Composition]) -> Float[Tensor, " B"]:
    """Return the share of conditions that each image, with pixels in [0, 1], meets: 1 if it passes.

    The conditions are the background, the number of things, colour and shape of each thing, and the relation.
    """
    return torch.tensor([_score(*pair) for pair in zip(detect(images), compositions, strict=True)])


def _score(detection: Detection, composition: Composition) -> float:
    things, components = composition.things, detection.components[:6]
    num_conditions = 2 + 2 * len(things) + (composition.relation is not None)
    right = (detection.background == composition.background) + (len(things) == len(components))
    orders = permutations(components, min(len(components), len(things)))
    return (right + max(_matches(order, composition) for order in orders)) / num_conditions


def _matches(components: Sequence[Component], composition: Composition) -> int:
    """Return the number of conditions that the components meet, taken in this order as the things."""
    pairs = list(zip(components, composition.things, strict=False))
    right = sum((found.colour == thing.colour) + shape_passes(found, thing.shape) for found, thing in pairs)
    if composition.relation is not None and len(components) == 2:
        holds = relation_quality(components[0], components[1], composition.relation) >= 0.8
        right += holds != composition.negated
    return right
