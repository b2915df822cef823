"""The HTML report of a reward model: metrics, where it fails, and the largest errors. The page is self-contained."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
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
    template = environment.get_template("report.html", globals={"embedded": _embedded})
    return template.render(name=name, metrics=metrics, mistakes=mistakes, breakdowns=breakdowns or {})


def _embedded(image: ImageSource) -> str:
    """Return an image as a data URL of a small PNG."""
    pixels = (to_tensor(image) * 255).round().to(torch.uint8).permute(1, 2, 0)
    small = Image.fromarray(pixels.numpy())
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
