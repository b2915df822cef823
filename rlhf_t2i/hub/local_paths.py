"""Replacement of this machine's paths, and of hosts that are not public, in what is published by short names."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import escape

from rlhf_t2i.access import is_loopback
from rlhf_t2i.shapes.names import TOY_BACKBONE, TOY_MODELS, TOY_PROMPT_SETS
from rlhf_t2i.training.finished_run import FinishedRun

_PATH = re.compile(r"(?<![^\s'\"=,:(\[])(?:~[\w.-]*|\.\.|[A-Za-z]:)?(?:[/\\][^/\\\s'\",:=()\[\]]+)+[/\\]?")
"""An absolute path, or one from a home folder or the parent folder, within an option; relative ones are kept."""
_BEFORE = r"(?:(?<![\w/\\.~<-])|(?<=\\[nrt]))"
_AFTER = r"(?![\w-]|\.\w)"
"""Around a whole path: no part of a word, of a longer name or of a tag of HTML. JSON writes a line break as \\n."""
_HOST = re.compile(
    r"(?<=://)(?:\[[0-9a-fA-F:.]+\]|[\w.-]+)|(?<=@)[\w-]+(?:\.[\w-]+)+|(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])"
)
"""The host of a URL or of user@host, and a number that may be one."""
_PRIVATE_NAMES = (".local", ".localdomain", ".lan", ".internal", ".intranet", ".corp", ".home.arpa")
_TEXT_FILES = {".md", ".json", ".jsonl", ".yaml", ".html", ".svg"}


class LocalPaths:
    """The paths in some texts, and the short name of each."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Find the paths; two that end in the same name get different short names."""
        self.names: dict[str, str] = {}
        used = {*TOY_MODELS, TOY_BACKBONE, *TOY_PROMPT_SETS}  # names that mean something else
        for path in dict.fromkeys(path for text in texts for path in _paths_in(text)):
            name = base = re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder" if _is_path(path) else "host"
            number = 2
            while name in used:
                name, number = f"{base}-{number}", number + 1
            used.add(name)
            self.names[path] = name

    def hidden(self, value: Any) -> Any:
        """Return a text, or the lists and dictionaries of texts, with every path replaced."""
        match value:
            case str():
                return _replaced(value, self.names)
            case list():
                return [self.hidden(one) for one in value]
            case dict():
                return {self.hidden(key): self.hidden(one) for key, one in value.items()}
            case _:
                return value

    def hide_in_files(self, folder: Path) -> None:
        """Replace the paths in the text files of a folder, also as JSON or HTML write them."""
        forms = {form: name for path, name in self.names.items() for form in _written_forms(path)}
        for file in (path for path in folder.rglob("*") if path.suffix in _TEXT_FILES):
            before = file.read_text(encoding="utf-8")
            if (text := _replaced(before, forms)) != before:
                file.write_text(text, encoding="utf-8")


def paths_of(run: FinishedRun, *more: str) -> LocalPaths:
    """Return the paths in the settings, commands and reward names of a run, and in `more` texts."""
    return LocalPaths([*more, *_texts([run.config, run.info, run.reward_metrics, *run.rows])])


def without_paths(run: FinishedRun, paths: LocalPaths) -> FinishedRun:
    """Return the run with every path in its settings, commands and names replaced; its folder is the same."""
    found = {name: paths.hidden(getattr(run, name)) for name in ("info", "config", "rows", "reward_metrics", "history")}
    return replace(run, **found)


def _replaced(text: str, names: Mapping[str, str]) -> str:
    """Return a text with the name of each whole path in its place, of the longest where several begin."""
    if not names:
        return text
    paths = "|".join(
        (_BEFORE if _is_path(path) else r"(?<![\w.-])") + re.escape(path) + _AFTER
        for path in sorted(names, key=len, reverse=True)
    )
    return re.sub(paths, lambda found: names[found[0]], text)


def _is_path(text: str) -> bool:
    return "/" in text or "\\" in text


def _is_private(host: str) -> bool:
    """Return True for a host that is not of the public internet; this machine's own names say nothing."""
    if is_loopback(host.strip("[]")):
        return False
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_global
    except ValueError:
        return host.lower().endswith(_PRIVATE_NAMES) or "." not in host


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            yield from (text for one in value for text in _texts(one))
        case dict():
            yield from (text for pair in value.items() for one in pair for text in _texts(one))


def _paths_in(text: str) -> Iterator[str]:
    if text.startswith(("/", "~")) and Path(text).expanduser().exists():
        yield text  # the whole of it, with its blanks and commas
    yield from (found[0] for found in _PATH.finditer(text))
    yield from (found[0] for found in _HOST.finditer(text) if _is_private(found[0]))


def _written_forms(path: str) -> set[str]:
    return {path, json.dumps(path)[1:-1], str(escape(path))}
