"""The recipes as modules: `rlhf_t2i.recipes.ddpo` is recipes/ddpo.py.

In a clone they lie in the folder `recipes` beside the package; a wheel has them, with their configs, in this folder.
"""

from __future__ import annotations

from pathlib import Path

_CLONE = Path(__file__).resolve().parents[2]
_IS_CLONE = (_CLONE / "recipes" / "ddpo.py").is_file()
FOLDER = _CLONE / "recipes" if _IS_CLONE else Path(__file__).resolve().parent
"""Folder of the recipes and of `configs`."""
ACCELERATE_CONFIGS = (_CLONE if _IS_CLONE else FOLDER) / "accelerate_configs"
"""Folder of the configs of `accelerate launch`."""
if _IS_CLONE:
    __path__.append(str(FOLDER))
