"""Override fields of frozen dataclasses by dotted name, from command-line settings."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import fields, replace
from typing import Any, Literal


def override(config: Any, assignments: list[str]) -> Any:
    """Return `config` with dotted fields replaced, all at once: override(run, ["optim.lr=2e-6", "parallel.tp=2"]).

    Values are parsed by the type of the field. Tuples are JSON lists; a dataclass in them is the value of its first field, or an object of
    its fields. Raises ValueError for a value that cannot be parsed and for an unknown field; the message names similar fields.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"override {assignment!r} must be name=value, such as optim.lr=2e-6")
        *path, last = name.split(".")
        node = changes
        for part in path:
            node = node.setdefault(part, {})
            if isinstance(node, str):
                raise ValueError(f"{assignment}: {part} is also set to {node!r}; set only one of the two")
        node[last] = text
    return _replaced(config, changes, "")


def _replaced(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    names, kinds = [f.name for f in fields(config)], typing.get_type_hints(type(config))
    values = {}
    for name, change in changes.items():
        full_name = prefix + name
        if name not in names:
            similar = [prefix + n for n in difflib.get_close_matches(name, names, n=3, cutoff=0.4)]
            nearest = f"; nearest: {', '.join(similar)}" if similar else ""
            raise ValueError(f"unknown setting {_first(full_name, change)!r}{nearest}; the settings are {', '.join(names)}")
        value = getattr(config, name)
        if not isinstance(change, dict):
            values[name] = _parsed(change, kinds[name], full_name)
        elif dataclasses.is_dataclass(value):
            values[name] = _replaced(value, change, full_name + ".")
        else:
            raise ValueError(f"{_first(full_name, change)!r}: {name} is {value!r} and has no field {next(iter(change))!r}")
    return replace(config, **values)


def _first(full_name: str, change: Any) -> str:
    """The dotted name of the first setting in `change`."""
    while isinstance(change, dict):
        name, change = next(iter(change.items()))
        full_name += "." + name
    return full_name


def _parsed(text: str, kind: Any, name: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin in (typing.Union, types.UnionType):
            if text.lower() in ("none", "null"):
                return None
            return _parsed(text, next(o for o in options if o is not type(None)), name)
        if origin is Literal:
            if text in options:
                return text
            raise ValueError(f"one of {', '.join(options)}")
        if kind is bool:
            if text.lower() in ("true", "1", "yes", "false", "0", "no"):
                return text.lower() in ("true", "1", "yes")
            raise ValueError("true or false")
        if kind in (int, float):
            return kind(text)
        if origin is tuple:
            value = json.loads(text)
            return tuple(_element(v, options[0]) for v in (value if isinstance(value, list) else [value]))
        if kind is str:
            return text
    except (ValueError, TypeError) as error:
        expected = f"a JSON list ({error})" if origin is tuple else str(error) if origin is Literal or kind is bool else kind.__name__
        raise ValueError(f"{name}={text} cannot be parsed; use {expected}") from None
    raise ValueError(f"{name} cannot be set from the command line; set it in the recipe")


def _element(value: Any, kind: Any) -> Any:
    """An element of a tuple: unchanged, or converted to the dataclass `kind`."""
    make: Any = kind
    if not dataclasses.is_dataclass(kind):
        return value
    return make(**value) if isinstance(value, dict) else make(value)
