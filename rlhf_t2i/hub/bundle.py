"""From a finished run to a folder that strangers can use: weights, images, curves, how it was made, checksums."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_t2i.files import sha256_of, write_atomically
from rlhf_t2i.models.family import FamilyClass
from rlhf_t2i.report import Chart, charts, draw
from rlhf_t2i.training.finished_run import FinishedRun, check_safetensors

CHECKSUMS = "SHA256SUMS"
_OF_A_MODEL = {".json", ".safetensors", ".txt", ".model", ".jinja"}
"""What is taken of a model's folder; never pickled weights, which run code when they are loaded."""


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a run began with."""

    source: str
    """What loads it on this machine."""
    hub_id: str | None
    """What loads it elsewhere; None if it is not on the Hub."""
    built_in: bool
    """Whether it comes with this package."""
    family: FamilyClass | None = None
    """Of a painter: what kind of model it is."""
    lacking: Sequence[str] = ()
    """Parts that a painter goes without, and that diffusers wants to be told of."""


def base_of(run: FinishedRun, *, named: str | None) -> Base:
    """What a run tuned; `named` is the Hub id of what lies in a folder here.

    Raises FileNotFoundError where it is gone, and ValueError for a name beside one that the run knows.
    """
    base = _named_base(run, named=named)
    if run.kind == "reward_model":
        return base
    from rlhf_t2i.models.packaging import family_and_lack  # takes seconds

    family, lacking = family_and_lack(base.source)
    return replace(base, family=family, lacking=lacking)


def _named_base(run: FinishedRun, *, named: str | None) -> Base:
    """What it is called, here and elsewhere."""
    if run.kind == "reward_model":
        from reward_model.checkpoint import backbone_source, read_config  # takes seconds

        source, folder = backbone_source(read_config(run.weights), run.weights), None
        folder, built_in = Path(source) if Path(source).is_dir() else None, run.config["backbone"] == "shapes"
    else:
        source = run.config["model"]
        folder, built_in = Path(source) if Path(source).is_dir() else None, source in ("shapes", "shapes-flow")
    if built_in or folder is not None:
        return Base(source, named, built_in)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"The base of {run.folder}, the folder {source!r}, is gone, and it is no Hub id either."
        )
    if named not in (None, source):
        raise ValueError(f"base is {named!r}, but {run.folder} was tuned from {source!r}, which is on the Hub.")
    return Base(source, source, built_in)


def is_whole_pipeline(run: FinishedRun, *, merge_lora: bool) -> bool:
    """Whether a run is published as a pipeline of its own, or as what is put on its base.

    Raises ValueError for merge_lora where there is no painter's LoRA.
    """
    if merge_lora and run.kind != "lora":
        what = (
            "a judge" if run.kind == "reward_model" else "the whole denoiser, which is published as a pipeline anyway"
        )
        raise ValueError(f"merge_lora is for a painter's LoRA; {run.folder} trained {what}.")
    return merge_lora or run.is_whole_denoiser


def pack_weights(run: FinishedRun, base: Base, folder: Path, *, merge_lora: bool) -> None:
    """Write what loads: a LoRA, a whole pipeline, or a judge, with its backbone if that is nowhere else.

    Raises ValueError for a LoRA whose base strangers cannot have.
    """
    if is_whole_pipeline(run, merge_lora=merge_lora):
        from rlhf_t2i.models.packaging import save_tuned_pipeline  # takes seconds

        save_tuned_pipeline(base.source, run.weights, folder)
    elif run.kind == "reward_model":
        _pack_reward_model(run, base, folder)
    elif base.hub_id is None and not base.built_in:
        raise ValueError(
            f"{run.folder} holds a LoRA of {base.source!r}, a folder of this machine. Say which model of the Hub that "
            f"is (--base OWNER/NAME), or publish the whole pipeline (--merge_lora)."
        )
    else:
        _copy(run.weights / "pytorch_lora_weights.safetensors", folder)


def _pack_reward_model(run: FinishedRun, base: Base, folder: Path) -> None:
    from reward_model.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_config

    backbone = base.hub_id or "backbone"
    if base.hub_id is None:
        for path in sorted(Path(base.source).iterdir()):
            if path.suffix in _OF_A_MODEL:
                _copy(path, folder / backbone)
        weights = list((folder / backbone).glob("*.safetensors"))
        if not weights:
            raise FileNotFoundError(
                f"The backbone {base.source} has no safetensors: save it with save_pretrained first."
            )
        for path in weights:
            check_safetensors(path)
    _copy(run.weights / WEIGHTS_NAME, folder)
    facts = replace(read_config(run.weights), backbone=backbone)
    (folder / CONFIG_NAME).write_text(facts.to_json(), encoding="utf-8")


def pack_story(run: FinishedRun, folder: Path) -> list[tuple[str, Chart]]:
    """Write what happened: config, facts, numbers, report, images, and curves; returns the curves' files."""
    numbers = ["metrics.json", "history.json"] if run.kind == "reward_model" else ["metrics.jsonl"]
    for name in ["config.yaml", "run.json", *numbers]:
        _copy(run.folder / name, folder / "training")
    if run.kind != "reward_model":
        _copy(run.folder / "report.html", folder)
        _copy(run.folder / "images" / "captions.json", folder / "images")
        for name, strip in zip(("before.png", "after.png"), run.strips, strict=True):
            shutil.copyfile(strip, folder / "images" / name)
    drawn: list[tuple[str, Chart]] = []
    for chart in _reward_model_charts(run) if run.kind == "reward_model" else charts(run.rows):
        name = f"curves/{re.sub('[^a-z0-9]+', '-', chart.title.lower()).strip('-')}.svg"
        (folder / "curves").mkdir(exist_ok=True)
        (folder / name).write_text(standalone(draw(chart, "step")), encoding="utf-8")
        drawn.append((name, chart))
    return drawn


def _reward_model_charts(run: FinishedRun) -> list[Chart]:
    """How a judge learnt: in training, and on the validation images."""

    def points(key: str) -> list[tuple[float, float, float]]:
        return [(float(row["step"]), float(row[key]), 0.0) for row in run.history if key in row]

    notes = {"accuracy": "Share of pairs that it orders as people did.", "loss": "Lower is better."}
    both = [
        Chart(name, note, points(name), points(f"eval_{name}"), names=("training", "validation"))
        for name, note in notes.items()
    ]
    return [chart for chart in both if chart.training or chart.evaluation]


def standalone(svg: str) -> str:
    """A curve of the report as a file of its own, on white."""
    style = (
        "path{fill:none;stroke:#e5e2db;stroke-linecap:round;stroke-linejoin:round;stroke-width:1.5}"
        "text{font:11px sans-serif;fill:#62676f;text-anchor:end;dominant-baseline:middle}"
        ".training{stroke:#868b93}.evaluation{stroke:#1f6f69}.dot{stroke-width:7}"
    )
    opening = f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
    head, _, rest = svg.partition(">")
    return f'{head} width="480" xmlns="http://www.w3.org/2000/svg">{opening}{rest}\n'


# --- the folder ---


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when all is written.

    FileExistsError if the target holds anything but an earlier publication that nobody has changed.
    """
    if target.exists() and not (target.is_dir() and (is_publication(target) or not any(target.iterdir()))):
        raise FileExistsError(
            f"{target} is not empty, and no publication as this command left it. Name another --folder, or remove it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        part = Path(scratch) / target.name
        part.mkdir()
        yield part
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)


def files_of(folder: Path) -> list[str]:
    """All files in a folder, in a fixed order, as seen from it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_checksums(folder: Path) -> None:
    """List what is in a folder, for `sha256sum -c SHA256SUMS`."""
    write_atomically(folder / CHECKSUMS, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in files_of(folder)))


def is_publication(folder: Path) -> bool:
    """Whether a folder holds what its checksums say, and nothing else."""
    if not (folder / CHECKSUMS).is_file():
        return False
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    listed = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
    present = [name for name in files_of(folder) if name != CHECKSUMS]
    return sorted(listed) == present and all(sha256_of(folder / name) == listed[name] for name in present)


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)
