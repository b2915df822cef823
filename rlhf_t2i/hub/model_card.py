"""What a published model says of itself, in Markdown: how to use it, what it is worth, and how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from rlhf_t2i.hub.bundle import Base
from rlhf_t2i.models.family import FamilyClass
from rlhf_t2i.report import Chart, Row, hacking, headline, reward_changes
from rlhf_t2i.training.finished_run import FinishedRun

_HALF_95 = 1.96
"""Half of a normal distribution's middle 95 %, in standard errors."""


def card_text(
    run: FinishedRun,
    base: Base,
    *,
    name: str,
    revision: str | None,
    whole_pipeline: bool,
    curves: Sequence[tuple[str, Chart]],
    warnings: Sequence[str],
) -> str:
    """The body of the model card; `name` is what strangers load, a Hub id or a folder."""
    judge, family = run.kind == "reward_model", base.family
    if family is None:
        usage, again = reward_model_snippet(run, name, revision=revision), None
    else:
        loading = policy_snippet(base, family, name, revision=revision, whole_pipeline=whole_pipeline)
        usage, again = loading + _call(run, family), again_snippet(run, family, whole_pipeline=whole_pipeline)
    return _CARD.render(
        name=name.rpartition("/")[2],
        run=run,
        base=base,
        judge=judge,
        family=family,
        summary=_reward_model_summary(run) if judge else headline(run.rows),
        usage=usage,
        again=again,
        rows=None if judge else reward_rows(run),
        diversity=None if judge else [run.evaluations[i]["diversity"] for i in (0, -1)],
        verdict=None if judge else verdict(run),
        num_images=None if judge else run.evaluations[-1]["num_images"],
        curves=curves,
        warnings=warnings,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True).strip(),
    )


def policy_snippet(base: Base, family: FamilyClass, name: str, *, revision: str | None, whole_pipeline: bool) -> str:
    """Plain diffusers, up to the loaded pipeline `pipe`."""
    pipeline, options = family.pipeline_class.__name__, f', revision="{revision}"' if revision else ""
    imports = f"import torch\nfrom diffusers import {pipeline}\n\n"
    settings = ", ".join([*(f"{part}=None" for part in base.lacking), "dtype=torch.float32"])
    if whole_pipeline:
        return f'{imports}pipe = {pipeline}.from_pretrained("{name}"{options}, {settings})\n'
    source = f'"{base.hub_id}"'
    if base.hub_id is None:
        imports = f"from importlib.resources import files\n\n{imports}"
        folder = "shapes/weights/flow" if base.source == "shapes-flow" else "shapes/weights"
        source = f'str(files("rlhf_t2i") / "{folder}")'
    return (
        f"{imports}pipe = {pipeline}.from_pretrained({source}, {settings})\n"
        f'pipe.load_lora_weights("{name}"{options}, weight_name="pytorch_lora_weights.safetensors")\n'
    )


def again_snippet(run: FinishedRun, family: FamilyClass, *, whole_pipeline: bool) -> str:
    """After the lines that load it: the first image that the run shows, with the run's own DDIM if it is no flow."""
    scheduler = (
        "from diffusers import DDIMScheduler\n\n"
        'spacing = pipe.scheduler.config.get("timestep_spacing", "leading").replace("linspace", "leading")\n'
        "pipe.scheduler = DDIMScheduler.from_config(\n"
        "    pipe.scheduler.config, clip_sample=False, timestep_spacing=spacing\n)\n"
    )
    generator = f"generator = torch.Generator().manual_seed({run.captions['seeds'][0]})\n"
    eta = "" if family.is_flow else f", eta={run.config['evaluation_eta']}"
    call = _call(run, family, more=f"{eta}, generator=generator")
    return ("" if whole_pipeline or family.is_flow else scheduler) + generator + call


def _call(run: FinishedRun, family: FamilyClass, *, more: str = "") -> str:
    guidance_scale = run.config["guidance_scale"] - 1 + family.guidance_when_off
    settings = f"num_inference_steps={run.num_evaluation_steps}, guidance_scale={guidance_scale}"
    if run.resolution is not None:
        settings += f", height={run.resolution}, width={run.resolution}"
    prompt = json.dumps(run.captions["prompts"][0], ensure_ascii=False)
    return f"image = pipe(\n    {prompt},\n    {settings}{more},\n).images[0]"


def reward_model_snippet(run: FinishedRun, name: str, *, revision: str | None) -> str:
    """Plain `reward_model`."""
    imports, source = "from reward_model import LlavaReward\n\n", f'"{name}"'
    if revision:
        imports = f"from huggingface_hub import snapshot_download\n{imports}"
        source = f'snapshot_download("{name}", revision="{revision}")'
    call = 'judge.score(["image.png"], ["a red circle on a blue background"])'
    if run.config.get("loss") == "general_preference":
        call = 'judge.compare(["a.png"], ["b.png"], ["a red circle on a blue background"])'
    return f"{imports}judge = LlavaReward.from_pretrained({source})\nprint({call})"


def reward_rows(run: FinishedRun) -> list[Row]:
    """Each reward before and after; of its change the 95 % interval, the two evaluations taken as independent."""
    first, last = run.evaluations[0], run.evaluations[-1]
    rows: list[Row] = []
    for change in reward_changes(run.rows):
        difference, decimals = last[change.name] - first[change.name], len(change.difference.partition(".")[2])
        reach = _HALF_95 * math.hypot(*(row[f"{change.name}/standard_error"] for row in (first, last)))
        rows.append(
            {
                "change": change,
                "role": "trained on" if change.name in run.trained_on else "held out",
                "interval": f"{difference - reach:+.{decimals}f} to {difference + reach:+.{decimals}f}",
            }
        )
    return rows


def verdict(run: FinishedRun) -> str:
    """How much of the gain is real: what a reward says that was not trained on."""
    gap = hacking(run.rows)
    if gap is None:
        return (
            "No reward that was not trained on watched this training, so nobody knows how much of the gain is real: a "
            "learned reward can be fooled, and training against it finds out how."
        )
    (_, trained, error), (_, held_out, _) = gap.trained_gains[-1], gap.held_out_gains[-1]
    meaning = f"The change of {gap.trained} is within its noise, so this says little."
    if abs(trained) > 3 * error > 0:
        meaning = (
            f"{gap.held_out} confirms {held_out / trained:.0%} of the gain of {gap.trained}; what it does not confirm "
            f"may be the painter fooling the judge."
            if trained > 0
            else f"{gap.trained} fell, although it was trained on."
        )
    return f"{gap.sentence}. {meaning}"


def _reward_model_summary(run: FinishedRun) -> str:
    found = [f"{row['name']} {row['value']:.3f} on {name}" for name, rows in run.measured.items() for row in rows[:1]]
    what = "an image and a prompt go in, a score of how well they fit comes out"
    return f"A LLaVA-Reward judge: {what}. {', '.join(found)}"


def _plain(text: Any) -> str:
    """In a cell of a table."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


_TEMPLATE = """# {{ name }}

{% if judge %}{{ summary }}.
{% else %}{% if base.hub_id %}[{{ base.hub_id }}](https://huggingface.co/{{ base.hub_id }}){% elif base.built_in %}\
The built-in Stable Diffusion of rlhf-t2i{% else %}A {{ family.title }}{% endif %}, tuned by `{{ run.facts.recipe }}`:
{{ summary }}.
{% endif %}
{% for warning in warnings %}> **{{ warning }}**

{% endfor %}## Use it

```python
{{ usage }}
```
{% if judge or "rlhf_t2i" in usage %}
It needs rlhf-t2i (`pip install -e .` in its repository){{ "" if judge else ", with which its base comes" }}.
{% endif %}{% if not judge %}
## The same prompts and seeds, before and after

![before](images/before.png)

![after](images/after.png)

Above before, below after; `images/captions.json` says what was asked for, image by image. After the lines above,
the first of them again{{ "" if run.config.mixed_precision in (none, "no") else ", up to the rounding of float32" }}\
{% if family.is_flow and run.config.evaluation_eta %}, but for the noise in each step (`evaluation_eta`) that this \
pipeline has none of{% endif %}:

```python
{{ again }}
```

## How much of it is real

{{ verdict }}

| reward | | before | after | change | 95 % interval of the change | certainty |
|---|---|---|---|---|---|---|
{% for row in rows %}| {{ plain(row.change.name) }} | {{ row.role }} | {{ row.change.before }} | \
{{ row.change.after }} | {{ row.change.difference }} | {{ row.interval }} | {{ row.change.certainty }} |
{% endfor %}| diversity | | {{ "%.3f" | format(diversity[0]) }} | {{ "%.3f" | format(diversity[1]) }} | \
{{ "%+.3f" | format(diversity[1] - diversity[0]) }} | | |

What follows ± is one standard error over {{ num_images }} images. A fall of diversity, which is how unlike one
another the images of one prompt are, warns of a collapse.
{% else %}
## What it is worth

{% for name, metrics in run.measured.items() %}{{ plain(name) }}:

| metric | value | 95 % interval | of | rule |
|---|---|---|---|---|
{% for m in metrics %}| {{ plain(m.name) }} | {{ "%.4f" | format(m.value) }} | \
{{ "" if m.low is none else "%.4f to %.4f" | format(m.low, m.high) }} | {{ m.count }} | {{ plain(m.note) }} |
{% endfor %}
{% endfor %}The best weights were chosen on the validation pairs, which flatters these a little.
{% endif %}
## Curves

{% for file, chart in curves %}![{{ chart.title }}]({{ file }})

**{{ chart.title }}**: {{ chart.note }}

{% endfor %}Grey: in training; green: in evaluations, with whiskers of one standard error where it is known.
{% if not judge %}`report.html` holds all of this on one page.
{% endif %}
## Limits

{% if judge %}- It was taught what those preferred who labelled its data, on images and prompts like theirs. On others
  its scores may mean nothing.
- A painter that is trained against it will find what fools it. Watch a reward that is not trained on.
- Only differences of scores mean something, and only among images of one prompt.
{% else %}- A learned reward is not what people prefer but a guess at it. The part of the gain that no held-out reward
  confirms may be nothing that anybody would see.
- The numbers hold for the evaluation prompts, at {{ run.num_evaluation_steps }} denoising steps\
{{ "" if run.resolution is none else ", %d x %d pixels" | format(run.resolution, run.resolution) }} and a guidance
  scale of {{ run.config.guidance_scale }}; elsewhere they may differ.
- What the base does badly, unfairly or unsafely, this does too: nothing here was trained against it.
{% endif %}
## How it was made

```
{{ run.facts.command }}
```

Started {{ run.facts.started }}, with commit {{ run.facts.git_commit or "unknown" }} of rlhf-t2i, on \
{{ run.facts.device | default("an unknown device") }}.
{% if run.facts.sessions is defined %}Resumed {{ run.facts.sessions | length }} times; `training/run.json` says how.
{% endif %}{% for name, version in run.facts.versions.items() %}{{ name }} {{ version }}\
{{ "." if loop.last else ", " }}{% endfor %}

<details><summary>Settings</summary>

```yaml
{{ config }}
```

</details>

`training/` holds these settings, the facts of the run and all its numbers. `sha256sum -c SHA256SUMS` checks that every
file has come as it was published.
"""

_CARD = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_TEMPLATE, {"plain": _plain})
