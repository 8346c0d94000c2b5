"""Override fields of frozen dataclasses by dotted name, from command-line settings."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import fields, replace
from typing import Any, Literal

from engine.files import parse_json


def override(config: Any, assignments: list[str]) -> Any:
    """Return `config` with dotted fields replaced, all at once: override(run, ["optim.lr=2e-6", "parallel.tp=2"]).

    Values are parsed by the type of the field. Tuples are JSON lists; a dataclass in them is the value of its first field, or an object of
    its fields. Raises ValueError for a value that cannot be parsed and for an unknown field; the message names similar fields.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"override {assignment!r:.80} must be name=value, such as optim.lr=2e-6")
        *path, last = name.split(".")
        node = changes
        for part in path:
            node = node.setdefault(part, {})
            if isinstance(node, str):
                raise ValueError(f"{assignment:.80}: {part} is also set to {node!r:.80}; set only one of the two")
        if isinstance(node.get(last), dict):
            raise ValueError(f"{assignment:.80}: {_first(name, node[last])} is also set; set only one of the two")
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
    made = replace(config, **values)  # first: a field that checks itself suggests better values
    if endless := [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise ValueError(f"{prefix}{endless[0]}={values[endless[0]]} must be a finite number")
    return made


def _first(full_name: str, change: Any) -> str:
    """The dotted name of the first setting in `change`."""
    while isinstance(change, dict):
        name, change = next(iter(change.items()))
        full_name += "." + name
    return full_name


def _parsed(text: str, kind: Any, name: str) -> Any:
    """The value of type `kind` that `text` writes, for the field `name`."""
    options = _options(kind)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    (kind,) = (option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind) or kind is Any:
        raise ValueError(f"{name} cannot be set from the command line; set it in the recipe")
    try:
        if typing.get_origin(kind) is tuple:
            return _tuple(parse_json(text.encode(), constants=False), kind)
        return _read(text, kind) if kind is float else _scalar(_read(text, kind), kind)
    except ValueError as error:
        wanted = f"a JSON list ({error})" if typing.get_origin(kind) is tuple else error
        raise ValueError(f"{name}={text:.80} cannot be parsed; use {wanted}") from None


def _options(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _read(text: str, kind: Any) -> Any:
    """`text` as the JSON-like value that _scalar checks."""
    if kind is bool and text.lower() in ("true", "1", "yes", "false", "0", "no"):
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise ValueError(kind.__name__) from None


def _scalar(value: Any, kind: Any) -> Any:
    """`value` if it is of type `kind`: text, a truth value, a whole number of 64 bits, a finite number, or one of some texts."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"one of {', '.join(typing.get_args(kind))}")
    elif kind is bool:
        if type(value) is not bool:
            raise ValueError("true or false")
    elif kind is int:
        if type(value) is not int:
            raise ValueError(f"int, not {value!r:.40}")
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError("a whole number of at most 64 bits")
    elif kind is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"a finite number, not {value!r:.40}")
        return float(value)
    elif type(value) is not kind:
        raise ValueError(f"{kind.__name__}, not {value!r:.40}")
    return value


def _tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    """A JSON list as a tuple of type `kind`; one that is no list is a tuple of one element."""
    values, kinds = value if isinstance(value, list) else [value], typing.get_args(kind)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    if len(values) != len(kinds):
        raise ValueError(f"of {len(kinds)} values, not {len(values)}")
    return tuple(_element(each, kind) for each, kind in zip(values, kinds, strict=True))


def _element(value: Any, kind: Any) -> Any:
    """A JSON value as an element of type `kind`; a dataclass is made of an object of its fields, or of its first field."""
    if not dataclasses.is_dataclass(kind):
        return _scalar(value, kind)
    make: Any = kind
    kinds = typing.get_type_hints(kind)
    given = value if isinstance(value, dict) else {fields(kind)[0].name: value}
    if unknown := given.keys() - kinds.keys():
        raise ValueError(f"{make.__name__} has no field {min(unknown)!r:.40}; it has {', '.join(kinds)}")
    required = [f.name for f in fields(kind) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"{make.__name__} needs {', '.join(missing)}")
    try:
        return make(**{name: _scalar(each, kinds[name]) for name, each in given.items()})
    except ValueError as error:
        raise ValueError(f"{make.__name__}: {error}") from None
