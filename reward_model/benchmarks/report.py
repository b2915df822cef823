"""One HTML page about a judge: its tables, and the pairs it got most wrong as images. It stands alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image

from reward_model.benchmarks.evaluation import Mistake
from reward_model.benchmarks.metrics import Metric
from reward_model.images import to_tensor

_SIDE = 320
"""Longest side, in pixels, of an image on the page."""


def page(judge: str, found: Mapping[str, Sequence[Metric]], wrong: Mapping[str, Sequence[Mistake]]) -> str:
    """The page as text; `found` and `wrong` by the name of each data set."""
    return _PAGE.render(judge=judge, found=found, wrong=wrong)


def _embedded(path: Path) -> str:
    pixels = (to_tensor(path) * 255).round().to(torch.uint8).permute(1, 2, 0)
    small = Image.fromarray(pixels.numpy())
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ judge }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --page: #faf9f6; --card: #fff; --ink: #24282d; --quiet: #62676f; --rule: #e5e2db }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #1d2024; --ink: #e7e4de; --quiet: #9ca1a9; --rule: #32363c } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
h1, h2 { font-size: 1.1rem; margin: 2.5rem 0 1rem } figure { margin: 0 } .quiet { color: var(--quiet) }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; padding: .75rem 1rem;
  overflow-x: auto } .many { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)) }
table { border-collapse: collapse; width: 100% } tr + tr { border-top: 1px solid var(--rule) }
th, td { text-align: left; padding: .45rem 1rem .45rem 0; white-space: nowrap } th { color: var(--quiet) }
.two { display: flex; gap: .5rem } .two figure { flex: 1 }
img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated }
figcaption { font-size: .875rem; color: var(--quiet) }</style></head><body>
<h1>{{ judge }}</h1><p class="quiet">Each value with the ends of its 95 % bootstrap interval, which takes records as
independent: where several share a prompt it is too narrow.</p>
{% for name, metrics in found.items() %}<h2>{{ name }}</h2><div class="card"><table>
<tr><th>metric</th><th>value</th><th>95 % interval</th><th>of</th><th>rule</th></tr>
{% for m in metrics %}<tr><td>{{ m.name }}</td><td>{{ "%.4f" | format(m.value) }}</td>
<td>{{ "-" if m.low is none else "%.4f to %.4f" | format(m.low, m.high) }}</td><td>{{ "{:,}".format(m.count) }}</td>
<td>{{ m.note }}</td></tr>{% endfor %}</table></div>
{% if wrong[name] %}<h2>{{ name }}: most wrong</h2><p class="quiet">Left the image that was preferred, right the one
that the judge preferred.</p><div class="many">{% for mistake in wrong[name] %}<div class="card"><div class="two">
<figure><img alt="preferred" src="{{ embedded(mistake.winner) }}"><figcaption>{{ mistake.winner_prompt }}</figcaption>
</figure><figure><img alt="preferred by the judge" src="{{ embedded(mistake.loser) }}">
<figcaption>{{ mistake.loser_prompt }}</figcaption></figure></div>
<p class="quiet">log-odds {{ "%.2f" | format(mistake.log_odds) }} for the wrong one; {{ mistake.where }}</p></div>
{% endfor %}</div>{% endif %}{% endfor %}</body></html>
"""

_PAGE = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE, {"embedded": _embedded})
