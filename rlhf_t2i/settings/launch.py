"""Rules of options that depend on where a command runs: the processes of the launcher and the installed trackers."""

from __future__ import annotations

import importlib.util
import os

from rlhf_t2i.settings.base import Rule
from rlhf_t2i.settings.lists import names

TRACKERS = ("wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio")
"""Experiment trackers that accelerate can log to, which are also the names of their packages."""


def shared_rule(name: str, count: int) -> Rule:
    """Return the rule that the processes of the launcher share `count` items equally."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return name, count % processes == 0, f"a multiple of the number of processes ({processes}): each has the same work"


def tracker_rules(trackers: str) -> list[Rule]:
    """Return the rules that trackers are known and installed."""
    given = names(trackers)
    missing = [name for name in given if name in TRACKERS and importlib.util.find_spec(name) is None]
    return [
        ("trackers", set(given) <= set(TRACKERS), f"comma-separated names of {', '.join(TRACKERS)}"),
        ("trackers", not missing, f"installed: pip install {' '.join(missing)}"),
    ]
