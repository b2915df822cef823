"""A user's own reward, given as module:function."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def import_reward(name: str) -> Callable[..., Any]:
    """Import the callable that module:function names, from the working directory or the installed packages.

    Raises ValueError if there is no such module or callable; an import that fails inside the module raises its own
    error.
    """
    module_name, _, function_name = name.partition(":")
    if not all(module_name.split(".")):
        raise ValueError(f"The reward {name!r} is not of the form module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"The reward {name!r} names a module that is neither installed nor in {os.getcwd()}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"The module {module_name!r} has no callable {function_name!r}.")
    return function
