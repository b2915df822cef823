"""Train recipes one after the other in the same processes: `python tests/recipes_in_turn.py CONFIGS.json`.

The file has a list of [recipe, options]. Started by `accelerate launch`, so that processes start once for all recipes.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState


def main(configs: Path) -> None:
    environment = dict(os.environ)
    destroy, PartialState.destroy_process_group = PartialState.destroy_process_group, lambda *_: None
    for recipe, options in json.loads(configs.read_text()):
        os.environ.update(environment)  # a recipe takes FSDP's setting out of it
        module = import_module(f"recipes.{recipe}")
        module.main(module.Config(**options))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    destroy(PartialState())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
