"""The base class of all options: types and ranges beside the fields, rules between them, and their description.

A field's type holds its range, as in `Annotated[int, Ge(1)]`, and the string below the field is its help.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlhf_t2i.settings.by_model import REQUIRED, ByModel, as_text, missing_text, resolve_defaults
from rlhf_t2i.settings.paths import Inputs, Prefix, Rewards, resolve_paths

SettingsT = TypeVar("SettingsT", bound="Settings")
Rule = tuple[str, bool, str]
"""A field, True if its value can work, and what the value must be."""


@dataclass(frozen=True, slots=True)
class Group:
    """Marker in the type of a field, `Annotated[bool, Group("reward")]`: its group in `--help`, if not its class's."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of all options; a subclass names the group of its fields by `class X(Settings, group="reward")`.

    Creating one raises ValueError, "NAME is VALUE; it must be RULE.", for a value outside the type and range of its
    field, or one that `rules` refuses. While options are `missing`, those that depend on the model's family have no
    value, and `rules` is not asked.
    """

    group: ClassVar[str] = "algorithm"

    def __init_subclass__(cls, *, group: str = "algorithm") -> None:
        cls.group = group

    def __post_init__(self) -> None:
        options = options_of(type(self))
        unset = {option.name: value for option in options if isinstance(value := getattr(self, option.name), ByModel)}
        given = {o.name: o.validated(getattr(self, o.name)) for o in options if o.name not in unset}
        for name, value in given.items():
            self._set(name, value)
        unset |= {name: replace(unset[name], other=REQUIRED) for name in self.needed() if name in unset}
        defaults, missing = resolve_defaults(
            unset, model=given.get("model"), run=self.run_settings(), unused=frozenset(self.unused())
        )
        self._set("_given", given)
        self._set("_model_defaults", defaults)
        self._set("_missing", missing)
        known = given | defaults
        values = {option.name: option.validated(known[option.name]) for option in options if option.name in known}
        for name, value in values.items():
            self._set(name, value)
        if set(missing) - set(self.given_later()):
            self.check_complete()
        if missing:
            return
        for name, value in self.derived().items():
            self._set(name, value)
        for name, works, rule in self.rules():
            if not works:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen for everybody else

    @property
    def model_defaults(self) -> dict[str, Any]:
        """The options that were not given and whose value depends on the model, with their values."""
        return dict(vars(self)["_model_defaults"])

    @property
    def missing(self) -> list[str]:
        """The options that this model needs and that were not given; `with_options` adds them."""
        return list(vars(self)["_missing"])

    def check_complete(self) -> None:
        """Raise ValueError, with a line to copy, if options are missing."""
        if self.missing:
            raise ValueError(missing_text(vars(self)["_given"]["model"], self.missing))

    def defaults_text(self) -> str:
        """Return one line that says which model and options for it were chosen or taken from a run."""
        defaults = {o.name: o.default for o in options_of(type(self)) if isinstance(o.default, ByModel)}
        chosen = [
            f"{name} {as_text(value)}"
            for name, value in self.model_defaults.items()
            if value not in (None, "") and (name == "model" or defaults[name].varies or value != defaults[name].toy)
        ]
        return f"defaults  {', '.join(chosen) or 'none depends on the model'}"

    def with_options(self: SettingsT, **given: Any) -> SettingsT:
        """Return settings with other options; defaults that depend on the model are those of the new model."""
        return type(self)(**vars(self)["_given"] | given)

    def run_settings(self) -> Mapping[str, Any]:
        """Return the settings of the run whose weights are used: they precede defaults that depend on the model."""
        return {}

    def unused(self) -> Collection[str]:
        """Return the options that have no effect with these settings, and need not be given."""
        return ()

    def needed(self) -> Collection[str]:
        """Return the options that must be given with these settings unless the model is a built-in one."""
        return ()

    def given_later(self) -> Collection[str]:
        """Return the options that may be missing for a while, since a caller in Python gives them to `train`."""
        return ()

    def derived(self) -> Mapping[str, Any]:
        """Return values to replace, such as a list that is completed from another option."""
        return {}

    def rules(self) -> list[Rule]:
        """Return the rules that relate fields with one another; a subclass adds its own to those of `super()`."""
        return []


@dataclass(frozen=True, slots=True)
class Option:
    """A field of settings, as the command line offers it."""

    name: str
    type: Any
    """The type of a value, with its range, without None."""
    optional: bool
    """True if the value may be None, written null."""
    default: Any
    """`dataclasses.MISSING` if the option is required."""
    group: str

    def validated(self, value: Any, *, folder: Path | None = None) -> Any:
        """Return a Python value or a text in the field's type; ValueError for any other type, or outside the range.

        `folder` is that of the file of options which the value is from: paths of inputs may be relative to it.
        """
        if self.optional and (value is None or str(value).lower() in ("null", "none")):
            return None
        if isinstance(value, str) and self.base is str:
            value = resolve_paths(value, self._marker(Inputs, Prefix, Rewards), folder=folder)
        try:
            found = _adapter(self.type).validate_python(value)
        except ValidationError as error:
            or_null, kind = " or null" if self.optional else "", self.kind
            fault = error.errors()[0]["type"]
            parts = [kind + or_null, self.range]
            if fault.startswith(("greater_than", "less_than")):
                parts = [self.range + or_null]
            elif fault == "finite_number":
                parts[0] = f"a finite number{or_null}"
            rule = ", ".join(filter(None, parts))
            raise ValueError(f"{self.name} is {_shown(value)}; it must be {rule}.") from error
        if isinstance(found, int) and abs(found) >= 1 << 63:
            raise ValueError(f"{self.name} is {_shown(value)}; it must be below 2^63.")
        return found

    @property
    def base(self) -> Any:
        """The type without its range."""
        return get_args(self.type)[0] if get_origin(self.type) is Annotated else self.type

    @property
    def names(self) -> tuple[str, ...]:
        """The names that its help lists, empty for an option that takes any text."""
        found = self._marker(Rewards)
        return found.names if found else ()

    def _marker(self, *kinds: type) -> Any:
        return next((part for part in get_args(self.type) if isinstance(part, kinds)), None)

    @property
    def kind(self) -> str:
        """The type in words."""
        if get_origin(self.base) is Literal:
            return f"one of {', '.join(get_args(self.base))}"
        return {int: "a whole number", float: "a number", bool: "true or false"}.get(self.base, "text")

    @property
    def range(self) -> str:
        """The range in words, empty if there is none."""
        low = high = None
        for limit in get_args(self.type)[1:]:
            match limit:
                case Ge(ge=value):
                    low = value, "["
                case Gt(gt=value):
                    low = value, "("
                case Le(le=value):
                    high = value, "]"
                case Lt(lt=value):
                    high = value, ")"
                case _:
                    pass
        if low and high:
            return f"in {low[1]}{low[0]}, {high[0]}{high[1]}"
        if low:
            return "positive" if low == (0, "(") else f"{'at least' if low[1] == '[' else 'above'} {low[0]}"
        return f"{'at most' if high[1] == ']' else 'below'} {high[0]}" if high else ""

    @property
    def metavar(self) -> str:
        """Placeholder of the value in `--help`."""
        if get_origin(self.base) is Literal:
            return f"{{{','.join(get_args(self.base))}}}"
        return {int: "INT", float: "FLOAT", bool: "true|false"}.get(self.base, "TEXT")


@functools.cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False))


def _shown(value: Any) -> str:
    """Return a value as text for a message, its first 100 characters."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


@functools.cache
def options_of(config_class: type) -> tuple[Option, ...]:
    """Return the options of a settings class, in the order of its fields."""
    hints = get_type_hints(config_class, include_extras=True)
    return tuple(
        Option(
            name=field.name,
            type=_without_none(hints[field.name]),
            optional=NoneType in get_args(hints[field.name]),
            default=field.default,
            group=_group_of(field.name, config_class),
        )
        for field in dataclasses.fields(config_class)
    )


def _without_none(hint: Any) -> Any:
    """The one type of `X | None`, or the type itself."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) else hint


def _group_of(name: str, config_class: type) -> str:
    """The group that the class which first declares a field gives it."""
    first = next(base for base in reversed(config_class.__mro__) if name in inspect.get_annotations(base))
    kind = _without_none(get_type_hints(first, include_extras=True)[name])
    groups = [part.name for part in get_args(kind) if isinstance(part, Group)]
    return groups[0] if groups else getattr(first, "group", Settings.group)
