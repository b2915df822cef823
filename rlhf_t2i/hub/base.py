"""The model that a run started from, as its publication names and loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.shapes.names import TOY_BACKBONE, TOY_MODELS
from rlhf_t2i.training.finished_run import FinishedRun


@dataclass(frozen=True, slots=True)
class Base:
    """A model before training: a diffusion model, or the backbone of a reward model."""

    source: str
    """Folder, Hub id or built-in name that loads it on this machine."""
    hub_id: str | None
    """Hub id that loads it on other machines; None if it is not on the Hub."""
    built_in: bool
    """True for a model that is part of this package."""
    family: type[DiffusionPolicy] | None = None
    """Family of a diffusion model; None for a backbone."""
    missing_parts: Sequence[str] = ()
    """Parts of the pipeline that the model lacks; diffusers loads it with each of them set to None."""


def find_base(run: FinishedRun, *, hub_id: str | None) -> Base:
    """Return the model that a run started from; `hub_id` is its name on the Hub if the run loaded it from a folder.

    Raises FileNotFoundError if that folder is gone, and ValueError if the run loaded another model from the Hub.
    """
    if run.kind == "reward_model":
        from reward_model.checkpoint import backbone_source, read_config  # imports torch and transformers

        source = backbone_source(read_config(run.weights), run.weights)
        return _named_base(run, source, built_in=run.config["backbone"] == TOY_BACKBONE, hub_id=hub_id)
    from rlhf_t2i.models.packaging import family_and_missing_parts  # imports torch and diffusers

    base = _named_base(run, run.config["model"], built_in=run.config["model"] in TOY_MODELS, hub_id=hub_id)
    family, missing_parts = family_and_missing_parts(base.source)
    return replace(base, family=family, missing_parts=missing_parts)


def _named_base(run: FinishedRun, source: str, *, built_in: bool, hub_id: str | None) -> Base:
    if built_in or Path(source).is_dir():
        return Base(source, hub_id, built_in)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"The base model of {run.folder}, the folder {source!r}, does not exist, and {source!r} is not a Hub id."
        )
    if hub_id not in (None, source):
        raise ValueError(f"base is {hub_id!r}, but {run.folder} started from {source!r} on the Hub.")
    return Base(source, source, built_in)
