"""Frozen dataclasses with fields replaced by dotted name, as a command line writes them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import fields, replace
from typing import Any, Literal


def override(config: Any, assignments: list[str]) -> Any:
    """`config` with dotted fields replaced, all at once: override(run, ["optim.lr=2e-6", "parallel.tp=2"]).

    Values are read by the field's type; lists and tuples are written as JSON, and a dataclass in them as its first field or as an object
    of its fields. Raises ValueError naming the nearest fields for an unknown one.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"override {assignment!r} is not of the form name=value, such as optim.lr=2e-6")
        *path, last = name.split(".")
        place = changes
        for part in path:
            place = place.setdefault(part, {})
            if isinstance(place, str):
                raise ValueError(f"{assignment}: {part} is set to {place!r} beside it; set only one of the two")
        place[last] = text
    return _replaced(config, changes, "")


def _replaced(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    names, kinds = [f.name for f in fields(config)], typing.get_type_hints(type(config))
    values = {}
    for name, change in changes.items():
        whole = prefix + name
        if name not in names:
            near = [prefix + n for n in difflib.get_close_matches(name, names, n=3, cutoff=0.4)]
            nearest = f"; nearest: {', '.join(near)}" if near else ""
            raise ValueError(f"unknown setting {_first(whole, change)!r}{nearest}; all there are: {', '.join(names)}")
        value = getattr(config, name)
        if not isinstance(change, dict):
            values[name] = _parsed(change, kinds[name], whole)
        elif dataclasses.is_dataclass(value):
            values[name] = _replaced(value, change, whole + ".")
        else:
            raise ValueError(f"{_first(whole, change)!r}: {name} is {value!r} and has no field {next(iter(change))!r}")
    return replace(config, **values)


def _first(whole: str, change: Any) -> str:
    """The dotted name of the first setting in `change`."""
    while isinstance(change, dict):
        name, change = next(iter(change.items()))
        whole += "." + name
    return whole


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
        wanted = f"a JSON list ({error})" if origin is tuple else str(error) if origin is Literal or kind is bool else kind.__name__
        raise ValueError(f"{name}={text} cannot be read; it takes {wanted}") from None
    raise ValueError(f"{name} cannot be set from the command line; set it in the recipe")


def _element(value: Any, kind: Any) -> Any:
    """An element of a tuple: as it is, or the dataclass `kind` made of it."""
    make: Any = kind
    if not dataclasses.is_dataclass(kind):
        return value
    return make(**value) if isinstance(value, dict) else make(value)
