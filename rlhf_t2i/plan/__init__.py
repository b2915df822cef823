"""The plan of a run before it starts: `--dry_run` runs one step of a recipe on fake tensors, and counts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_t2i.plan.types import Plan


def or_plan(main: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a recipe's `main`, which with the option dry_run prints the plan of a run in place of running it."""

    def main_or_plan(config: Any) -> Any:
        if not config.dry_run:
            return main(config)
        if int(os.environ.get("RANK", "0")):
            return None
        from rlhf_t2i.plan.text import plan_text  # takes seconds

        return sys.stdout.write(plan_text(make_plan(main, config), config))

    return main_or_plan


def make_plan(main: Callable[[Any], Any], config: Any) -> Plan:
    """Return the plan of one process's part in a run of a recipe's `main`."""
    if hasattr(config, "dry_run_image_side"):
        from rlhf_t2i.plan.reward_training import rehearse
    else:
        from rlhf_t2i.plan.dry_run import rehearse
    return rehearse(main, config)
