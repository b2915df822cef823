"""Defaults that depend on the model: those of the toy world apply to its own models only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rlhf_t2i.models.table import family_entry, pipeline_class_of
from rlhf_t2i.shapes.names import TOY_MODEL, TOY_MODELS, TOY_SIGN_MODEL

REQUIRED: Final = "required"
_EXAMPLES = {
    "prompts": "prompts.txt",
    "evaluation_prompts": "held_out.txt",
    "rewards": "pick_score:yuvalkirstain/PickScore_v1",
    "evaluation_rewards": "pick_score:yuvalkirstain/PickScore_v1",
}


@dataclass(frozen=True, slots=True)
class ByModel:
    """Default of an option: a value for built-in models, and another one for all others."""

    toy: Any
    """Value for built-in models."""
    other: Any = REQUIRED
    """Value for other models; REQUIRED if there is none."""
    family: str = ""
    """Field of the model's row in `FAMILIES` that has the value for other models."""
    signs: Any = None
    """Value for the built-in model of words; None is that of the other built-in models."""

    @property
    def varies(self) -> bool:
        """False if all models have the same default."""
        return bool(self.family) or self.other != self.toy or self.signs is not None

    def built_in(self, model: str) -> Any:
        """Return the value for a built-in model."""
        return self.signs if model == TOY_SIGN_MODEL and self.signs is not None else self.toy

    def __str__(self) -> str:
        """Describe the default in option help."""
        signs = f" ({as_text(self.signs)} for {TOY_SIGN_MODEL})" if self.signs is not None else ""
        toy = f"{as_text(self.toy)}{signs} for built-in models, else"
        if self.family:
            return f"{toy} the model family's"
        return f"{toy} {as_text(self.other)}" if self.varies else as_text(self.toy) + signs


def as_text(value: Any) -> str:
    """Return a value as options write it: null, true, or empty for an empty text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "empty" if value == "" else str(value)


def by_model(toy: Any, other: Any = REQUIRED, *, family: str = "", signs: Any = None) -> Any:
    """Return a default that depends on the model, for a field of settings: see `ByModel`."""
    return ByModel(toy, other, family, signs)


def resolve_defaults(
    unset: Mapping[str, ByModel], *, model: str | None, run: Mapping[str, Any], unused: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return a value for each option that was not given, and the names of those that must be given for this model.

    A value of `run`, the settings of the run whose weights are used, comes first. `model` None is the run's model, or
    the built-in one. Options in `unused` have no effect and get an empty text, or null if that can be. Options that
    must be given are empty too; until they are given, the values of the model's family are left out, and nothing is
    read. Raises ValueError for a model of an unsupported family.
    """
    values = {name: run[name] for name in unset if name in run}
    if model is None:
        model = str(values.setdefault("model", unset["model"].toy)) if "model" in unset else TOY_MODEL
    rest = {name: default for name, default in unset.items() if name not in values}
    values |= {name: None if default.toy is None else "" for name, default in rest.items() if name in unused}
    rest = {name: default for name, default in rest.items() if name not in values}
    if model in TOY_MODELS:
        return values | {name: default.built_in(model) for name, default in rest.items()}, []
    missing = [name for name, default in rest.items() if default.other == REQUIRED and not default.family]
    values |= {name: default.other for name, default in rest.items() if not default.family} | dict.fromkeys(missing, "")
    fields = {name: default.family for name, default in rest.items() if default.family}
    if fields and not missing:
        entry = family_entry(pipeline_class_of(model))
        values |= {name: getattr(entry, field) for name, field in fields.items()}
    return values, missing


def missing_text(model: str, missing: Sequence[str]) -> str:
    """Return one line that asks for options, with an example of each."""
    options = " ".join(f"--{name} {_EXAMPLES.get(name, name.upper())}" for name in missing)
    return f"the model {model} is not a built-in one, so {' and '.join(missing)} must be given, for example: {options}"
