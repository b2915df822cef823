"""The folder of a publication: weights, images, curves, training record, and checksums of them all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf_t2i.hub.base import Base
from rlhf_t2i.output.files import check_links, remove_all_but, sha256_of, write_atomically
from rlhf_t2i.output.run_folder import (
    CAPTIONS,
    CONFIG,
    IMAGES,
    KOHYA_LORA,
    LOCK,
    LORA_WEIGHTS,
    METRICS,
    REPORT,
    REWARD_HISTORY,
    REWARD_METRICS,
    RUN_INFO,
)
from rlhf_t2i.report import Chart, charts, draw
from rlhf_t2i.report.reward_model import history_charts
from rlhf_t2i.training.finished_run import FinishedRun, check_safetensors

CHECKSUMS = "SHA256SUMS"
_BACKBONE_FILES = {".json", ".safetensors", ".txt", ".model", ".jinja"}
"""Suffixes of the files that are copied from a backbone's folder. Pickled weights can run code when loaded."""
_CURVE_STYLE = (
    "path{fill:none;stroke:#e5e2db;stroke-linecap:round;stroke-linejoin:round;stroke-width:1.5}"
    "text{font:11px sans-serif;fill:#62676f;text-anchor:end;dominant-baseline:middle}"
    ".training{stroke:#868b93}.evaluation{stroke:#1f6f69}.trained{stroke:#8a3ea8}.held-out{stroke:#2463a8}.dot{stroke-width:7}"
)


def is_full_pipeline(run: FinishedRun, *, merge_lora: bool) -> bool:
    """Return True if a run is published as a full diffusers pipeline, False for a LoRA or a reward model.

    Raises ValueError for `merge_lora` unless the run trained a LoRA of a diffusion model.
    """
    if merge_lora and run.kind != "lora":
        trained = "a reward model" if run.kind == "reward_model" else "all weights of the denoiser"
        raise ValueError(f"merge_lora is True; it needs a run that trained a LoRA, and {run.folder} trained {trained}.")
    return merge_lora or run.is_full_denoiser


def write_weights(run: FinishedRun, base: Base, folder: Path, *, merge_lora: bool) -> None:
    """Write a full pipeline, a LoRA, or a reward model together with its backbone if that is not on the Hub.

    Raises ValueError for a LoRA whose base model is only a folder of this machine, or not the model of the run.
    """
    if is_full_pipeline(run, merge_lora=merge_lora):
        from rlhf_t2i.models.packaging import save_trained_pipeline  # imports torch and diffusers

        save_trained_pipeline(base.source, run.weights, folder)
    elif run.kind == "reward_model":
        _write_reward_model(run, base, folder)
    elif run.config.get("init_weights"):
        raise ValueError(
            f"{run.folder} holds a LoRA of the denoiser in {run.config['init_weights']!r}, not of {base.source!r}. "
            f"Publish a full pipeline (--merge_lora)."
        )
    elif base.hub_id is None and not base.built_in:
        raise ValueError(
            f"{run.folder} holds a LoRA of {base.source!r}, which is a folder of this machine. Name the same model on "
            f"the Hub (--base OWNER/NAME), or publish a full pipeline (--merge_lora)."
        )
    else:
        _copy(run.weights / LORA_WEIGHTS, folder, within=run.folder)
        if (run.folder / KOHYA_LORA).is_file():
            _copy(run.folder / KOHYA_LORA, folder, within=run.folder)


def _write_reward_model(run: FinishedRun, base: Base, folder: Path) -> None:
    from reward_model.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_config

    backbone = base.hub_id or "backbone"
    if base.hub_id is None:
        check_links(Path(base.source))
        for path in sorted(Path(base.source).iterdir()):
            if path.suffix in _BACKBONE_FILES:
                _copy(path, folder / backbone)
        weights = list((folder / backbone).glob("*.safetensors"))
        if not weights:
            raise FileNotFoundError(
                f"The backbone {base.source} has no safetensors: save it with save_pretrained first."
            )
        for path in weights:
            check_safetensors(path)
    _copy(run.weights / WEIGHTS_NAME, folder, within=run.folder)
    config = replace(read_config(run.weights), backbone=backbone)
    (folder / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")


def write_training_record(run: FinishedRun, folder: Path) -> list[tuple[str, Chart]]:
    """Write settings, metrics, report, images and curves of a run; returns the file and the chart of each curve."""
    metrics = [REWARD_METRICS, REWARD_HISTORY] if run.kind == "reward_model" else [METRICS]
    for name in [CONFIG, RUN_INFO, *metrics]:
        _copy(run.folder / name, folder / "training", within=run.folder)
    if (run.folder / REPORT).is_file():
        _copy(run.folder / REPORT, folder, within=run.folder)
    if run.kind != "reward_model":
        _copy(run.folder / IMAGES / CAPTIONS, folder / IMAGES, within=run.folder)
        for name, grid in zip(("before.png", "after.png"), run.grids, strict=True):
            _copy(grid, folder / IMAGES, within=run.folder, name=name)
    curves: list[tuple[str, Chart]] = []
    for chart in history_charts(run.history) if run.kind == "reward_model" else charts(run.rows):
        name = f"curves/{re.sub('[^a-z0-9]+', '-', chart.title.lower()).strip('-')}.svg"
        (folder / "curves").mkdir(exist_ok=True)
        (folder / name).write_text(_svg_file(draw(chart, "step")), encoding="utf-8")
        curves.append((name, chart))
    return curves


def _svg_file(svg: str) -> str:
    """Return an inline SVG of the report as a file that stands alone, on white."""
    opening = f'<style>{_CURVE_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    head, _, rest = svg.partition(">")
    return f'{head} width="480" xmlns="http://www.w3.org/2000/svg">{opening}{rest}\n'


@contextmanager
def new_publication(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an exception.

    Raises FileExistsError if `target` holds anything except an unchanged earlier publication.
    """
    if target.exists() and not (target.is_dir() and (is_publication(target) or not any(target.iterdir()))):
        raise FileExistsError(
            f"{target} is not empty and not an unchanged earlier publication. Choose another --folder, or remove it."
        )
    with _scratch(target.parent / f".{target.name}.part") as scratch:
        part = scratch / target.name
        part.mkdir()
        yield part
        if target.exists():
            target.rename(scratch / "before")
        part.rename(target)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which is removed in the end; BlockingIOError if another process uses it.

    What a killed process has left in it is removed first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"{folder} is in use by another process, which publishes to the same folder.") from error
    try:
        remove_all_but({LOCK}, folder)
        yield folder
    finally:  # the lock is held until nothing is left that another process could begin to use
        shutil.rmtree(folder)
        lock.release()


def list_files(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, relative to it and sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS of all files in a folder, for `sha256sum -c SHA256SUMS`."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in list_files(folder)]
    write_atomically(folder / CHECKSUMS, "".join(lines))


def is_publication(folder: Path) -> bool:
    """Return True if a folder holds exactly the files that its SHA256SUMS lists, unchanged."""
    if not (folder / CHECKSUMS).is_file():
        return False
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    listed = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
    present = [name for name in list_files(folder) if name != CHECKSUMS]
    return sorted(listed) == present and all(sha256_of(folder / name) == listed[name] for name in present)


def _copy(path: Path, folder: Path, *, within: Path | None = None, name: str | None = None) -> None:
    """Copy a file into a folder; ValueError for one that a symbolic link takes from outside of `within`."""
    if within is not None and not path.resolve().is_relative_to(within.resolve()):
        raise ValueError(f"{path} is a link to {path.resolve()}, outside of {within}; it is not published.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / (name or path.name))
