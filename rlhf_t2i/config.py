"""Options of a command: a dataclass, read from YAML files and the command line, with every typo an error.

A recipe's options are a subclass of `Settings`, a frozen dataclass whose fields are keyword-only. The type of a field
holds its range, as in `Annotated[int, Ge(1)]`, and the string below the field is its help. This module imports nothing
heavy, so that `--help` and mistakes are answered before torch is imported.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

GROUPS = (
    "model and LoRA",
    "sampling",
    "reward",
    "data",
    "algorithm",
    "optimiser",
    "evaluation",
    "checkpoints and logging",
    "publication",
    "system",
)
"""The groups of `--help`, in its order."""
Rule = tuple[str, bool, str]
"""A field, True if its value can work, and what the value must be."""
ConfigT = TypeVar("ConfigT")


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """In the type of a field (`Annotated[bool, Group("reward")]`): its group in `--help`, other than its class's."""

    name: str


@dataclass(frozen=True, slots=True)
class Names:
    """In the type of a text (`Annotated[str, Names(("oracle", "clip:PATH"))]`): what it may name, for its help."""

    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of all options; a subclass names the group of its fields by `class X(Settings, group="reward")`.

    Creating one raises ValueError, "NAME is VALUE; it must be RULE.", for a value outside the type and range of its
    field, or one that `rules` refuses.
    """

    group: ClassVar[str] = "algorithm"

    def __init_subclass__(cls, *, group: str = "algorithm") -> None:
        cls.group = group

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            object.__setattr__(self, option.name, option.validated(getattr(self, option.name)))
        for name, works, rule in self.rules():
            if not works:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}.")

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

    def validated(self, value: Any) -> Any:
        """Return a Python value or a text in the field's type; ValueError for any other type, or outside the range."""
        if self.optional and (value is None or str(value).lower() in ("null", "none")):
            return None
        try:
            return _adapter(self.type).validate_python(value)
        except ValidationError as error:
            in_type = error.errors()[0]["type"].startswith(("greater_than", "less_than"))
            rules = [self.range] if in_type else [self.kind, self.range]
            rule = ", ".join(filter(None, rules)) + (" or null" if self.optional else "")
            raise ValueError(f"{self.name} is {value}; it must be {rule}.") from error

    @property
    def base(self) -> Any:
        """The type without its range."""
        return get_args(self.type)[0] if get_origin(self.type) is Annotated else self.type

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
        """The value's place in `--help`."""
        if get_origin(self.base) is Literal:
            return f"{{{','.join(get_args(self.base))}}}"
        return {int: "INT", float: "FLOAT", bool: "true|false"}.get(self.base, "TEXT")


@functools.cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind, config=ConfigDict(coerce_numbers_to_str=True))


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


def help_of(config_class: type) -> dict[str, str]:
    """Return the help of each field: the string below it, in the class or the nearest base class that has one."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        found |= _strings_below_fields(base)
    return found


def _strings_below_fields(config_class: type) -> Iterator[tuple[str, str]]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(tree, ast.ClassDef)
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
            case _:
                pass


# --- from the command line and files --------------------------------------------------------------


def parse_config(
    config_class: type[ConfigT], description: str | None = None, *, arguments: Sequence[str] | None = None
) -> ConfigT:
    """Build settings from `--config FILE.yaml` and `--option value`; `--flag` alone is true, `null` is None.

    The command line wins over files wherever `--config` stands, and a later file over an earlier one. Exits with
    status 2 and one line that names the option for an unknown option, a value of the wrong type, or settings that the
    class refuses by a ValueError; with status 0 after `--help` or `--print_config`. `description` is the text of
    `--help`, `arguments` None is the process's own command line.
    """
    try:
        return _parsed(config_class, description or "", list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


def _parsed(config_class: type[ConfigT], description: str, arguments: Sequence[str]) -> ConfigT:
    parser = _parser(config_class, description)
    namespace, unknown = parser.parse_known_args(arguments)
    options = {option.name: option for option in options_of(config_class)}
    for argument in unknown:
        name = argument.partition("=")[0]
        if name.startswith("-"):
            raise ValueError(f"there is no option {name}.{_suggestion(name.lstrip('-'), options)}")
        raise ValueError(f"{argument!r} belongs to no option.")
    given = vars(namespace)
    values: dict[str, Any] = {}
    for path in given.pop("config"):
        values |= _read_yaml(Path(path), options)
    print_config = given.pop("print_config")
    values |= {name: options[name].validated(text) for name, text in given.items()}
    for name, option in options.items():
        if name not in values and option.default is dataclasses.MISSING:
            raise ValueError(f"the option --{name} is required.")
    config = config_class(**values)
    if print_config:
        sys.stdout.write(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))  # pyright: ignore[reportArgumentType]
        raise SystemExit(0)
    return config


def _read_yaml(path: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """The options of a YAML file, in their types; ValueError, naming the line, for any that is not one."""
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if document is not None and not isinstance(document, yaml.MappingNode):
        raise ValueError(f"{path} holds no options; write one 'name: value' a line.")
    values: dict[str, Any] = {}
    for key, node in document.value if document else []:
        where, name = f"{path}:{key.start_mark.line + 1}", str(key.value)
        if name not in options:
            raise ValueError(f"{where}: there is no option {name}.{_suggestion(name, options)}")
        if name in values:
            raise ValueError(f"{where}: {name} is given twice.")
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"{where}: {name} is a list or mapping; it must be one value.")
        # Scalars are read as the command line's, so that `no` is no boolean and 1e-4 a number.
        empty = node.value in ("", "~") and node.style is None
        try:
            values[name] = options[name].validated("null" if empty and options[name].optional else node.value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return values


def _suggestion(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f" Did you mean {close[0]}?" if close else ""


# --- help -----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Formatter(argparse.HelpFormatter):
    """Wrap the paragraphs of a description to the terminal, and leave its indented lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = text.strip().split("\n\n")
        return "\n\n".join(
            block if any(line.startswith(" ") for line in block.splitlines()) else textwrap.fill(block, width)
            for block in blocks
        )


def _parser(config_class: type, description: str) -> argparse.ArgumentParser:
    main = sys.modules["__main__"].__spec__
    parser = _Parser(
        prog=f"python -m {main.name.removesuffix('.__main__')}" if main else None,
        usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]",
        description=description.replace("%", "%%"),
        formatter_class=functools.partial(_Formatter, max_help_position=32),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE.yaml",
        help="YAML file with any of the options below. The command line wins over files, a later file over an earlier.",
    )  # fmt: skip
    parser.add_argument("--print_config", action="store_true", help="Print all options as YAML and exit.")
    texts = help_of(config_class)
    options = options_of(config_class)
    groups = dict.fromkeys(option.group for option in options)
    for group in sorted(groups, key=GROUPS.index):
        section = parser.add_argument_group(group)
        for option in [option for option in options if option.group == group]:
            section.add_argument(
                f"--{option.name}", default=argparse.SUPPRESS, metavar=option.metavar,
                nargs="?" if option.base is bool else None, const="true" if option.base is bool else None,
                help=f"{texts.get(option.name, '')} ({_bounds(option)})".replace("%", "%%"),
            )  # fmt: skip
    return parser


def _bounds(option: Option) -> str:
    """The range and the default of an option, for its help."""
    bounds = f"{option.range} or null" if option.range and option.optional else option.range
    for part in get_args(option.type):
        if isinstance(part, Names):
            bounds = f"NAME: {', '.join(part.names)}"
    shown = {None: "null", True: "true", False: "false", "": "empty"}
    is_number = isinstance(option.default, int | float) and not isinstance(option.default, bool)
    default = str(option.default if is_number else shown.get(option.default, option.default))
    return "; ".join(
        filter(None, [bounds, "required" if option.default is dataclasses.MISSING else f"default: {default}"])
    )


def require(*modules: str, extra: str) -> None:
    """Exit with status 2 and one line that names the missing extra, unless all modules are installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.stderr.write(f"error: {module} is not installed: pip install 'rlhf-t2i[{extra}]'\n")
            raise SystemExit(2)


# --- texts with several values --------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Return the parts of a comma-separated list, without blanks around them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str) -> list[int]:
    """Return the numbers of a range such as 0-999, ends included, or of a list such as 249,499; [] for other text."""
    first, dash, last = text.partition("-")
    parts = [first.strip(), last.strip()] if dash else names(text)
    if not all(part.isdecimal() for part in parts):
        return []
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in parts]
