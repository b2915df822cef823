"""From the command line and YAML files to the settings of a recipe, with every typo an error.

A recipe's settings are a subclass of `rlhf_t2i.settings.base.Settings`. Neither this module nor the settings import
anything heavy, so that `--help` and mistakes are answered before torch is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from reward_model.text_files import compose_yaml
from rlhf_t2i.errors import exit_with, one_line_errors, show_tracebacks
from rlhf_t2i.output.run_folder import check_free, paths_start
from rlhf_t2i.rewards.terms import join_terms, parse_terms
from rlhf_t2i.settings.base import Option, Settings, options_of
from rlhf_t2i.settings.groups import FolderSettings, ResumeSettings
from rlhf_t2i.settings.help import option_parser

ConfigT = TypeVar("ConfigT", bound=Settings)


def parse_config(
    config_class: type[ConfigT], description: str | None = None, *, arguments: Sequence[str] | None = None
) -> ConfigT:
    """Build settings from `--config FILE.yaml` and `--option value`; `--flag` alone is true, `null` is None.

    The command line wins over files wherever `--config` stands, and a later file over an earlier one. Exits with
    status 2 and one line that names the option for an unknown option, a value of the wrong type, or settings that the
    class refuses by a ValueError; with status 0 after `--help` or `--print_config`. `description` is the text of
    `--help`, `arguments` None is the process's own command line.
    """
    _silence_imports_of_torchao()
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_tracebacks("--debug" in given)
    try:
        return _parsed(config_class, description or "", given)
    except (ValueError, OSError) as error:
        if "--debug" in given:
            raise
        exit_with(error)


def run_command(main: Callable[[ConfigT], Any], config: ConfigT) -> None:
    """Run a recipe to its end; an error that the user can mend ends it like a mistake on the command line.

    `--debug` shows its traceback, which other errors show always.
    """
    with one_line_errors():
        main(config)


def _silence_imports_of_torchao() -> None:
    """Silence what importing torchao, as diffusers and peft do, logs in every run."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parsed(config_class: type[ConfigT], description: str, arguments: Sequence[str]) -> ConfigT:
    parser = option_parser(config_class, description)
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
    del given["debug"]
    print_config = given.pop("print_config")
    values |= {name: options[name].validated(text) for name, text in given.items()}
    for name, option in options.items():
        if name not in values and option.default is dataclasses.MISSING:
            raise ValueError(f"the option --{name} is required.")
    config = config_class(**values)
    config.check_complete()
    if print_config:
        sys.stdout.write(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))  # pyright: ignore[reportArgumentType]
        raise SystemExit(0)
    _check_folder(config)
    return config


def _check_folder(config: object) -> None:
    """Raise FileExistsError, before anything is loaded, for a run folder that is taken."""
    resumes = isinstance(config, ResumeSettings) and config.resume
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if isinstance(config, FolderSettings) and config.run_folder and not (resumes or is_restarted):
        check_free(Path(config.run_folder), resumable=isinstance(config, ResumeSettings))


def _read_yaml(path: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """The options of a YAML file, in their types; ValueError, naming the line, for any that is not one."""
    document = compose_yaml(path)
    if document is not None and not isinstance(document, yaml.MappingNode):
        raise ValueError(f"{path} holds no options; write one 'name: value' a line.")
    values: dict[str, Any] = {}
    folder = paths_start(path)
    for key, node in document.value if document else []:
        where, name = f"{path}:{key.start_mark.line + 1}", str(key.value)
        if name not in options:
            raise ValueError(f"{where}: there is no option {name}.{_suggestion(name, options)}")
        if name in values:
            raise ValueError(f"{where}: {name} is given twice.")
        # Scalars are read as the command line's, so that `no` is no boolean and 1e-4 a number.
        try:
            values[name] = options[name].validated(_text(node, options[name]), folder=folder)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return values


def _text(node: yaml.Node, option: Option) -> str:
    """The text that the command line would have: a list of rewards becomes A,B=WEIGHT, and a mapping NAME=WEIGHT.

    A key is a whole name, and so is an item that is not NAME or NAME=WEIGHT; quotes are added where they are needed.
    """
    if isinstance(node, yaml.ScalarNode):
        empty = node.value in ("", "~") and node.style is None
        return "null" if empty and option.optional else str(node.value)
    parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    if not option.names or not all(isinstance(part, yaml.ScalarNode) for part in parts):
        shape = "one value, a list of names, or a mapping of names to weights" if option.names else "one value"
        raise ValueError(f"{option.name} is a list or mapping; it must be {shape}.")
    if isinstance(node, yaml.MappingNode):
        return ",".join(f"{join_terms([str(name.value)])}={weight.value}" for name, weight in node.value)
    return ",".join(_item(str(part.value)) for part in parts)


def _item(text: str) -> str:
    """An item of a list of rewards, as a text that has no further comma or equals sign outside of quotes."""
    try:
        [(_, weight)] = parse_terms(text)
        float(weight or 1)
    except ValueError:
        return join_terms([text])
    return text


def _suggestion(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def require(*modules: str, extra: str) -> None:
    """Exit with status 2 and one line that names the missing extra, unless all modules are installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            exit_with(f"{module} is not installed: pip install 'rlhf-t2i[{extra}]'")
