"""The HTML report of a reward model: metrics, where it fails, and the largest errors. The page is self-contained."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from reward_model.attention import AttentionMap
from reward_model.benchmarks.breakdown import FEW, SURE, Breakdown, Group
from reward_model.benchmarks.evaluation import Mistake
from reward_model.benchmarks.metrics import Metric
from reward_model.images import to_tensor
from reward_model.stored_images import ImageSource

_MAX_SIDE = 320
"""Longest side of an image on the page, in pixels."""
_SHARP_BELOW = 128
"""Longest side of images whose pixels are shown as squares when they are enlarged."""
_MAP_COLOUR = (224, 0, 122)
_FULL_MAP = 4.0
"""Attention per area, in units of an even spread, that at least has the full colour of a map."""
_MAX_OPACITY = 0.6
_SHOWN_GROUPS = 12
"""Groups of one criterion that are shown; the others are folded."""


def render_report(
    name: str,
    metrics: Mapping[str, Sequence[Metric]],
    mistakes: Mapping[str, Sequence[Mistake]],
    breakdowns: Mapping[str, Breakdown] | None = None,
    *,
    no_map: str | None = None,
) -> str:
    """Return the HTML page of the reward model `name`; the other arguments are by the name of the data set.

    `no_map` is the reason why the mistakes have no maps of attention.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template(
        "report.html",
        globals={"embedded": _embedded, "overlay": _overlay, "by_criterion": _by_criterion, "signed": _signed},
    )
    return template.render(
        name=name, metrics=metrics, mistakes=mistakes, breakdowns=breakdowns or {}, no_map=no_map, few=FEW, sure=SURE,
        full_map=_FULL_MAP, shown_groups=_SHOWN_GROUPS, sharp_below=_SHARP_BELOW,
    )  # fmt: skip


def _by_criterion(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Return the groups of each criterion."""
    return [(by, [*members]) for by, members in groupby(groups, key=lambda group: group.by)]


def _signed(text: str) -> str:
    """Return text with minus signs for hyphens before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def _embedded(image: ImageSource) -> tuple[str, int, int]:
    """Return an image as a data URL of a small PNG, and its height and width there."""
    pixels = (to_tensor(image) * 255).round().to(torch.uint8).permute(1, 2, 0)
    small = Image.fromarray(pixels.numpy())
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return _data_url(small), small.height, small.width


def _overlay(found: AttentionMap, height: int, width: int) -> tuple[str, float]:
    """Return a map as a data URL of a transparent PNG of a size, and its largest attention per area.

    The opacity is proportional to the attention per area. It is full at the largest one of the image, but at no less
    than `_FULL_MAP` times an even spread, so that an even map is faint.
    """
    scale = max(1, _MAX_SIDE // max(height, width))
    density = found.density(height * scale, width * scale)
    opacity = density / max(_FULL_MAP, density.max().item()) * _MAX_OPACITY
    pixels = torch.empty(*density.shape, 4, dtype=torch.uint8)
    pixels[..., :3] = torch.tensor(_MAP_COLOUR, dtype=torch.uint8)
    pixels[..., 3] = (opacity * 255).round().to(torch.uint8)
    return _data_url(Image.fromarray(pixels.numpy())), density.max().item()


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
