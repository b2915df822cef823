"""The HTML report of a reward model: metrics, where it fails, and the largest errors. The page is self-contained."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from reward_model.benchmarks.breakdown import Breakdown
from reward_model.benchmarks.evaluation import Mistake
from reward_model.benchmarks.metrics import Metric
from reward_model.images import to_tensor
from reward_model.stored_images import ImageSource

_MAX_SIDE = 320
"""Longest side of an image on the page, in pixels."""
_SMALL_SIDE = 128
"""Longest side below which an image is shown with sharp pixels."""


def render_report(
    name: str,
    metrics: Mapping[str, Sequence[Metric]],
    mistakes: Mapping[str, Sequence[Mistake]],
    breakdowns: Mapping[str, Breakdown] | None = None,
) -> str:
    """Return the HTML page of the reward model `name`; the other arguments are by the name of the data set."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    template = environment.get_template("report.html", globals={"embedded": _embedded, "signed": _signed})
    return template.render(name=name, metrics=metrics, mistakes=mistakes, breakdowns=breakdowns or {})


@dataclass(frozen=True, slots=True)
class _Embedded:
    """An image as a data URL of a small PNG."""

    url: str
    is_small: bool
    """True if the page should show sharp pixels."""


def _signed(text: str) -> str:
    """Return text with minus signs for hyphens before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def _embedded(image: ImageSource) -> _Embedded:
    pixels = (to_tensor(image) * 255).round().to(torch.uint8).permute(1, 2, 0)
    small = Image.fromarray(pixels.numpy())
    is_small = max(small.size) < _SMALL_SIDE
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return _Embedded(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", is_small)
