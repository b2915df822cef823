"""The code blocks and command lines of README.md and docs/."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str = "") -> list[str]:
    """The texts of the fenced blocks of a page that have this language."""
    found = re.findall(r"^```(\w*)\n(.*?)\n```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands(text: str) -> list[list[str]]:
    """The commands of a block that start Python or accelerate, split as a shell splits them, without comments."""
    lines = [line.rpartition("&& ")[2].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("accelerate launch ", "python "))]


def command_of(page: str, script: str) -> list[str]:
    """The arguments of the one command of a page that starts a script, the script first."""
    (found,) = [
        command[command.index(script) :] for block in blocks(page) for command in commands(block) if script in command
    ]
    return found
