"""How a key is declared: a dataclass field with its default and its one line of documentation."""

from dataclasses import field
from typing import Any


def key(default: Any, doc: str) -> Any:
    """A config leaf with its one-line documentation."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def node(cls: type) -> Any:
    """A group of keys."""
    return field(default_factory=cls)
