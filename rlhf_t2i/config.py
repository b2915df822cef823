"""From the command line and YAML files to a recipe's config, with every typo an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

ConfigT = TypeVar("ConfigT")


def parse_config(config_class: type[ConfigT], *, description: str, arguments: Sequence[str] | None = None) -> ConfigT:
    """Read a dataclass from `--config FILE.yaml` and `--field value`, the later ones winning.

    Prints a message that names the field and exits with status 2 for an unknown field, a value of the wrong type, or
    values that the dataclass refuses with a ValueError.
    """
    parser = ArgumentParser(description=description, formatter_class=_formatter())
    parser.add_argument("--config", action="config", help="A YAML file with any of the fields below.")
    parser.add_class_arguments(config_class)
    values: dict[str, Any] = parser.parse_args(arguments).as_dict()
    values.pop("config")
    try:
        return config_class(**values)
    except ValueError as error:
        parser.error(str(error))
        raise


def _formatter() -> Any:
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """The default one without the two lines that every help text would open with."""

    return Formatter


def names(text: str) -> list[str]:
    """The parts of a comma-separated list, without blanks around them."""
    return [part.strip() for part in text.split(",") if part.strip()]
