"""The command `rlhf-t2i`: list the recipes, and copy some with their configs into the working folder.

    rlhf-t2i list
    rlhf-t2i copy ddpo accelerate_configs

Copies have the paths that they have in a clone, such as recipes/ddpo.py and recipes/configs/ddpo_sd15.yaml, so that the
commands of the documentation work.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import rlhf_t2i
from rlhf_t2i.recipes import ACCELERATE_CONFIGS, FOLDER


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 2 and one line that says why nothing was copied."""
    parser = argparse.ArgumentParser(prog="rlhf-t2i", description="List the recipes, or copy some with their configs.")
    parser.add_argument("--version", action="version", version=rlhf_t2i.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the recipes and their configs")
    copy = commands.add_parser("copy", help="copy recipes with their configs into the working folder")
    copy.add_argument("names", nargs="+", metavar="NAME", help="a recipe such as ddpo, or accelerate_configs")
    given = parser.parse_args(arguments)
    if given.command == "list":
        sys.stdout.write(listing())
        return
    try:
        for path in copy_recipes(given.names, Path()):
            sys.stdout.write(f"{path}\n")
    except (ValueError, FileExistsError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


def recipes() -> dict[str, list[Path]]:
    """Return the configs of each recipe, by its name."""
    found: dict[str, list[Path]] = {path.stem: [] for path in sorted(FOLDER.glob("[!_]*.py"))}
    for path in sorted((FOLDER / "configs").glob("*.yaml")):
        command = re.search(r"accelerate launch.*?recipes/(\w+)\.py", path.read_text(encoding="utf-8"), re.DOTALL)
        assert command, f"{path} names no recipe"
        found[command[1]].append(path)
    return found


def listing() -> str:
    """Return a text with each recipe, what it does, and its configs."""
    lines: list[str] = []
    for name, configs in recipes().items():
        docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
        lines.append(f"{name:22}{docstring.splitlines()[0]}")
        lines += [f"{'':22}configs/{path.name}" for path in configs]
    names = ", ".join(sorted(path.name for path in ACCELERATE_CONFIGS.glob("*.yaml")))
    return "\n".join([*lines, f"{'accelerate_configs':22}{names}"]) + "\n"


def copy_recipes(names: Sequence[str], folder: Path) -> list[Path]:
    """Copy recipes with their configs below a folder, under the paths of a clone; return the new files.

    Raises ValueError for an unknown name, and FileExistsError, before anything is copied, for a file of other content.
    """
    files = {path: folder / target for name in names for path, target in _files_of(name).items()}
    for path, target in files.items():
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise FileExistsError(f"{target} exists and differs, so nothing was copied; move or rename it first.")
    new = {path: target for path, target in files.items() if not target.exists()}
    for path, target in new.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return list(new.values())


def _files_of(name: str) -> dict[Path, Path]:
    """Return the files of a recipe, with their paths in a clone."""
    if name == ACCELERATE_CONFIGS.name:
        return {path: Path(name, path.name) for path in sorted(ACCELERATE_CONFIGS.glob("*.yaml"))}
    known = recipes()
    if name not in known:
        raise ValueError(f"There is no recipe {name!r}; choose from {', '.join([*known, ACCELERATE_CONFIGS.name])}.")
    texts = "".join(path.read_text(encoding="utf-8") for path in known[name])
    prompts = [path for path in sorted((FOLDER / "configs" / "prompts").iterdir()) if path.name in texts]
    paths = [FOLDER / f"{name}.py", *known[name], *prompts]
    return {path: "recipes" / path.relative_to(FOLDER) for path in paths}


if __name__ == "__main__":
    main()
