"""A user's own reward, given as module:function or file.py:function, with arguments if it takes some."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

_FORM = re.compile(r"(?P<place>.+?):(?P<name>\w*)(?:\((?P<arguments>.*)\))?", re.DOTALL)


def import_reward(reward: str) -> Callable[..., Any]:
    """Import the callable that a text such as `module:function` or `path/to/file.py:Class(scale=2)` names.

    A module is searched for in the working directory and the installed packages. A class is instantiated with the
    arguments, once in a process for equal ones; a function takes them beside images and prompts. Raises ValueError if
    there is no such callable or it does not take the arguments; an import or a constructor that fails raises its own
    error.
    """
    found, name, arguments = _find(reward)
    if arguments is None:
        return as_callable(found, reward)
    positional, named = literals(arguments, reward)
    if inspect.isclass(found):
        _check_arguments(found, reward, *positional, **named)
        return as_callable(_instance(found, arguments), reward)
    if positional:
        raise ValueError(f"The reward {reward!r} is no class, so its arguments need names, as in {name}(scale=2).")
    _check_arguments(found, reward, "images", "prompts", **(named | _metadata(found)))
    return partial(found, **named)


def find_callable(reward: str) -> Callable[..., Any]:
    """Import the function or class that a text as of `import_reward` names, without instantiating the class."""
    return _find(reward)[0]


def _find(reward: str) -> tuple[Any, str, str | None]:
    """Return a callable, its name and the text of its arguments, None without parentheses."""
    parts = _FORM.fullmatch(reward)
    if not parts or not (_is_file(parts["place"]) or all(parts["place"].split("."))):
        raise ValueError(
            f"The reward {reward!r} is not of the form module:function or path/to/file.py:function; arguments are "
            f"written as in module:function(scale=2)."
        )
    place, name = parts["place"], parts["name"]
    module = _module_of_file(place, reward) if _is_file(place) else _module(place, reward)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"The module {place!r} has no callable {name!r}.")
    return found, name, parts["arguments"]


def as_callable(function: Any, reward: str) -> Callable[..., Any]:
    """Return what can be called with images and prompts, and perhaps metadata; ValueError, naming the reward, if not.

    A third parameter must have the name `metadata`.
    """
    if inspect.isclass(function):
        raise ValueError(f"The reward {reward!r} is a class; give an instance of it, as in {function.__name__}().")
    if not callable(function):
        raise ValueError(f"The reward {reward!r} is a {type(function).__name__}, which cannot be called.")
    _check_arguments(function, reward, "images", "prompts", **_metadata(function))
    return function


def takes_metadata(function: Callable[..., Any]) -> bool:
    """Return True for a reward that has a parameter `metadata`, for the rows of the prompts."""
    try:
        return "metadata" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables of C libraries have none
        return False


def _metadata(function: Callable[..., Any]) -> dict[str, str]:
    return {"metadata": "metadata"} if takes_metadata(function) else {}


@cache
def _instance(kind: type, arguments: str) -> Any:
    """Instantiate a class once in a process, so that training and evaluation share its memory."""
    positional, named = literals(arguments, kind.__name__)
    return kind(*positional, **named)


def _check_arguments(function: Any, reward: str, *positional: Any, **named: Any) -> None:
    """Raise ValueError, naming the reward, if a callable does not take these arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables of C libraries have none
        return
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        called = ", ".join([*map(str, positional), *(f"{name}={value!r}" for name, value in named.items())])
        hint = " A third parameter, for the rows of the prompts, is named metadata." if "prompts" in positional else ""
        raise ValueError(f"The reward {reward!r} cannot be called with ({called}): {error}.{hint}") from error


def literals(arguments: str, reward: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the values of a call's arguments, which must be Python literals."""
    try:
        match ast.parse(f"f({arguments})", mode="eval").body:
            case ast.Call(func=ast.Name(), args=positional, keywords=keywords):
                named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
                if len(named) == len(keywords) and all(keyword.arg for keyword in keywords):
                    return [ast.literal_eval(value) for value in positional], named
        raise ValueError("no call, or a repeated name")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"The arguments ({arguments}) of the reward {reward!r} are not Python literals; text needs quotes, as in "
            f"(scale=2, path='weights.pt')."
        ) from error


# --- modules --------------------------------------------------------------------------------------


def _is_file(place: str) -> bool:
    return place.endswith(".py")


def _module(name: str, reward: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"The reward {reward!r} names a module that is neither installed nor in {os.getcwd()}."
        ) from error


def _module_of_file(file: str, reward: str) -> ModuleType:
    """Return the module of a file, executed once in a process; what lies beside the file can be imported by it."""
    path = Path(file).expanduser().resolve()
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ValueError(f"The reward {reward!r} names a file that does not exist: {path}.")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "the name ends with .py"
    assert spec.loader is not None
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
