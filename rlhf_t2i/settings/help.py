"""`--help`: the options of a settings class in groups, with their help, range and default, wrapped to the terminal."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import NoReturn

from rlhf_t2i.settings.base import Option, options_of
from rlhf_t2i.settings.by_model import as_text

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Formatter(argparse.HelpFormatter):
    """Wrap the paragraphs and tables of a description to the terminal, and leave its commands as they are."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(_wrapped(block, width) for block in text.strip().split("\n\n"))


def _wrapped(block: str, width: int) -> str:
    """Wrap a paragraph, or each row of an indented table of names and texts; other indented lines stay."""
    if not block.startswith(" "):
        return textwrap.fill(block, width, break_on_hyphens=False)
    rows: list[str] = []
    column = 0
    for line in block.splitlines():
        if row := re.match(r" +\S+ {2,}(?=\S)", line):
            column = row.end()
            rows.append(line)
        elif rows and line.startswith(" " * column) and column:
            rows[-1] += f" {line.strip()}"
        else:
            rows.append(line)
    return "\n".join(
        textwrap.fill(row, width, subsequent_indent=" " * column, break_on_hyphens=False) if column else row
        for row in rows
    )


def option_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    """Return the parser of a settings class: given options as texts, and `config`, `print_config` and `debug`.

    A mistake raises ValueError.
    """
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
    parser.add_argument(
        "--debug", action="store_true", help="Show the traceback of an error that is otherwise one line."
    )
    texts = help_of(config_class)
    options = options_of(config_class)
    groups = dict.fromkeys(option.group for option in options)
    for group in sorted(groups, key=GROUPS.index):
        section = parser.add_argument_group(group)
        for option in [option for option in options if option.group == group]:
            section.add_argument(
                f"--{option.name}", default=argparse.SUPPRESS, metavar=option.metavar,
                nargs="?" if option.base is bool else None, const="true" if option.base is bool else None,
                help=f"{texts.get(option.name, '')} ({bounds_of(option)})".replace("%", "%%"),
            )  # fmt: skip
    return parser


def bounds_of(option: Option) -> str:
    """Return the range of an option, or the names to choose from, and its default."""
    bounds = [f"{option.range} or null" if option.range and option.optional else option.range]
    bounds += [f"NAME: {', '.join(option.names)}"] if option.names else []
    match option.default:
        case dataclasses.MISSING:
            bounds.append("required")
        case value:
            bounds.append(f"default: {as_text(value)}")
    return "; ".join(filter(None, bounds))


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
