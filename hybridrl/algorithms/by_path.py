"""Functions of the user's own, named by import path (`package.module:function`) wherever a name is taken."""

import importlib
import re
from collections.abc import Callable

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_path(name: str) -> bool:
    """Whether `name` has the form of an import path."""
    return _PATH.fullmatch(name) is not None


def load(name: str, key: str) -> Callable:
    """The function that an import path names. ValueError, naming the configuration key, where there is none."""
    module, function = name.split(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(
            f"{key}={name}: {module} does not import: {type(error).__name__}: {error}. Correct it, or put its folder on"
            " PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"{key}={name}: {module} has no function {function!r}; define it, or name another")
    return found
