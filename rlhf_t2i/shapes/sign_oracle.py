"""The oracle of signs: reads the word of an image by comparing it with drawings of letters.

It knows the font, weights and cells that signs are drawn with (`signs.py`), but no list of words, and has no network.
The colours are estimated first; how much of each pixel the letters cover follows from them, and of all words in all
weights and places the one is read whose drawing differs least:

    sum over cells of min over letters of sum over pixels (cover - drawing)^2

A sign is scored for its prompt in two ways:

    passed   the word is read as asked, its letters are legible, and both colours are right
    graded   share of the letters that are right in their places, halved for each wrong colour
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.shapes.oracle import OracleScores
from rlhf_t2i.shapes.scenes import PALETTE
from rlhf_t2i.shapes.signs import CELL, HEIGHT, LENGTHS, LETTERS, WEIGHTS, WIDTH, Sign, glyphs, parse_sign

MARGIN_X, MARGIN_Y = 2, 3
"""Largest offset in pixels, to either side, at which a word is looked for."""
MIN_FIT = 0.6
"""Smallest `fit` of letters that count as legible."""
_PLACES = tuple(product(range(2 * MARGIN_Y + 1), range(2 * MARGIN_X + 1)))
_COLOURS = torch.tensor(list(PALETTE.values()))


@dataclass(frozen=True, slots=True)
class Reading:
    """What an image of a sign shows, whatever its prompt."""

    sign: Sign
    """The word that is read, and the nearest colours of the palette."""
    fit: float
    """1 - (squared difference from the drawing) / (squared cover), of the worst of all letters and the whole sign.

    It is 1 for a drawing, and at most 0 for a blank sign.
    """


def sign_scores(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> OracleScores:
    """Score each image, with pixels in [0, 1], for its prompt.

    Raises ValueError for a prompt outside the grammar of `signs`, or if there are not as many prompts as images.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images came with {len(prompts)} prompts.")
    readings = read_signs(images)
    scores = [_score(reading, parse_sign(prompt)) for reading, prompt in zip(readings, prompts, strict=True)]
    return OracleScores(
        torch.tensor([graded for graded, _ in scores], dtype=torch.float32),
        torch.tensor([passed for _, passed in scores], dtype=torch.bool),
    )


def _score(reading: Reading, asked: Sign) -> tuple[float, bool]:
    shown = reading.sign
    right = sum(a == b for a, b in zip(shown.word, asked.word, strict=False))
    wrong_colours = (shown.colour != asked.colour) + (shown.background != asked.background)
    graded = right / max(len(shown.word), len(asked.word)) * 0.5**wrong_colours
    return graded, shown == asked and reading.fit >= MIN_FIT


def read_signs(images: Float[Tensor, "B 3 Y X"]) -> list[Reading]:
    """Return what each image shows, with pixels in [0, 1]; other sizes than that of signs are resized."""
    pixels = images.detach().float().cpu().clamp(0, 1)
    if pixels.shape[-2:] != (HEIGHT, WIDTH):
        pixels = F.interpolate(pixels, (HEIGHT, WIDTH), mode="bilinear", antialias=True, align_corners=False)
    return [reading for chunk in pixels.split(64) for reading in _read(chunk)]


def _read(pixels: Float[Tensor, "B 3 Y X"]) -> list[Reading]:
    ground, ink = _two_colours(pixels)
    direction = (ink - ground)[..., None, None]
    contrast = direction.square().sum(1).clamp(min=1e-4)
    cover = (((pixels - ground[..., None, None]) * direction).sum(1) / contrast).clamp(-0.5, 1.5)
    words, fits = _nearest_words(cover)
    names = list(PALETTE)
    colours = [[names[int(i)] for i in torch.cdist(rgb, _COLOURS).argmin(1)] for rgb in (ink, ground)]
    return [Reading(Sign(*shown), fit) for *shown, fit in zip(words, *colours, fits, strict=True)]


def _two_colours(pixels: Float[Tensor, "B 3 Y X"]) -> tuple[Float[Tensor, "B 3"], Float[Tensor, "B 3"]]:
    """Return the background, the median of the rows above and below the letters, and the mean of what differs most."""
    rows = torch.cat([pixels[:, :, :3], pixels[:, :, -2:]], dim=2).flatten(2)
    ground = rows.median(2).values
    flat = pixels.flatten(2)
    farthest = (flat - ground[..., None]).square().sum(1).topk(flat.shape[2] // 32).indices
    return ground, flat.gather(2, farthest[:, None].expand(-1, 3, -1)).mean(2)


@cache
def _drawings() -> Float[Tensor, "weights 26 pixels"]:
    return torch.stack([glyphs(weight).flatten(1) for weight in WEIGHTS])


def _nearest_words(cover: Float[Tensor, "B Y X"]) -> tuple[list[str], list[float]]:
    """Return the word of letters in one weight and place that differs least from each cover, and its fit."""
    drawings, num_cells = _drawings(), WIDTH // CELL
    squares = drawings.square().sum(2)[:, None, None, :]
    padded = F.pad(cover, (MARGIN_X, MARGIN_X, MARGIN_Y, MARGIN_Y))
    whole = padded.square().sum((1, 2))
    found: list[Tensor] = []
    letters: list[Tensor] = []
    fits: list[Tensor] = []
    ends = [n - 1 for n in LENGTHS]
    for y, x in _PLACES:
        cells = padded[:, y : y + HEIGHT, x : x + WIDTH].unflatten(2, (num_cells, CELL)).transpose(1, 2).flatten(2)
        change, best = (squares - 2 * torch.einsum("bkp,wlp->wbkl", cells, drawings)).min(dim=3)
        letters.append(best)
        found.append(change.cumsum(2)[..., ends])
        fit = -change / cells.square().sum(2).clamp(min=1)
        fits.append(torch.minimum(fit.cummin(2).values[..., ends], -found[-1] / whole[:, None].clamp(min=1)))
    changes = torch.stack(found).transpose(0, 2)  # image, weight, place, length
    chosen = torch.unravel_index(changes.flatten(1).argmin(1), changes.shape[1:])
    spelt, all_fits = torch.stack(letters), torch.stack(fits)  # place, weight, image, cell or length
    words = [
        "".join(LETTERS[int(i)] for i in spelt[place, weight, image, : LENGTHS[int(length)]])
        for image, (weight, place, length) in enumerate(zip(*chosen, strict=True))
    ]
    weight, place, length = chosen
    return words, all_fits[place, weight, torch.arange(len(words)), length].tolist()
