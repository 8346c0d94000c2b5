"""Plain values: the types whose values are rebuilt in the other process, by exact type. All others stay where they are.

An immutable value is a JSON value or [name, parts]. Containers that can change are copied to both processes and kept equal (peer.py).
"""

from __future__ import annotations

import builtins
import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath
from typing import Any, NamedTuple
from uuid import UUID

SMALL = 1 << 53  # integers below it are JSON numbers
HEX_MAX = 1 << 20  # digits of other integers
EXPONENT_MAX = 1 << 20  # of decimals: a short text can otherwise mean a number that fills the memory

NAMED_VALUES = {"NotImplemented": NotImplemented, "Ellipsis": ...}
# By these, dataclasses.asdict and the like recognize the fields of a class.
NAMED_VALUES |= {name: getattr(dataclasses, name) for name in ("MISSING", "_FIELD", "_FIELD_CLASSVAR", "_FIELD_INITVAR")}


def _integer(text: str) -> int:
    if len(text) > HEX_MAX:
        raise ValueError(f"an integer of more than {HEX_MAX} hexadecimal digits")
    return int(text, 16)


def _decimal(text: str) -> Decimal:
    value = Decimal(text)
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int) and abs(exponent) > EXPONENT_MAX:
        raise ValueError(f"a decimal with an exponent beyond {EXPONENT_MAX}")
    return value


def _time_parts(value: datetime | time) -> list[Any]:
    offset = value.utcoffset()
    return [value.hour, value.minute, value.second, value.microsecond, None if offset is None else timezone(offset), value.fold]


def _datetime(*parts: Any) -> datetime:
    return datetime(*parts[:-1], fold=parts[-1])


def _time(*parts: Any) -> time:
    return time(*parts[:-1], fold=parts[-1])


class Immutable(NamedTuple):
    """How values of a type travel: `build(*parts(value))` is the value."""

    parts: Callable[[Any], Iterable[Any]]
    build: Callable[..., Any]


def _of_items(kind: type) -> Immutable:
    return Immutable(lambda value: kind.__iter__(value), lambda *items: kind(items))  # type: ignore[attr-defined]


def _of_text(kind: type) -> Immutable:
    return Immutable(lambda value: [str(value)], kind)


IMMUTABLE: dict[type, Immutable] = {
    int: Immutable(lambda value: [hex(value)], _integer),
    tuple: _of_items(tuple),
    frozenset: _of_items(frozenset),
    bytes: Immutable(lambda value: [bytes.hex(value)], bytes.fromhex),
    complex: Immutable(lambda value: [value.real, value.imag], complex),
    range: Immutable(lambda value: [value.start, value.stop, value.step], range),
    slice: Immutable(lambda value: [value.start, value.stop, value.step], slice),
    Decimal: Immutable(lambda value: [Decimal.__str__(value)], _decimal),
    Fraction: Immutable(lambda value: [value.numerator, value.denominator], Fraction),
    date: Immutable(lambda value: [value.year, value.month, value.day], date),
    datetime: Immutable(lambda value: [value.year, value.month, value.day, *_time_parts(value)], _datetime),
    time: Immutable(_time_parts, _time),
    timedelta: Immutable(lambda value: [value.days, value.seconds, value.microseconds], timedelta),
    timezone: Immutable(lambda value: [value.utcoffset(None)], timezone),
    UUID: Immutable(lambda value: [value.hex], UUID),
    PosixPath: _of_text(PosixPath),
    PurePosixPath: _of_text(PurePosixPath),
    type({}.keys()): Immutable(list, lambda *items: dict.fromkeys(items).keys()),
    type({}.values()): Immutable(list, lambda *items: dict(enumerate(items)).values()),
    type({}.items()): Immutable(list, lambda *items: dict(items).items()),
}
BUILDERS = {kind.__name__: immutable.build for kind, immutable in IMMUTABLE.items()}
BUILDERS["constant"] = NAMED_VALUES.__getitem__

CONTAINERS: tuple[type, ...] = (Counter, OrderedDict, defaultdict, dict, list, set, deque, bytearray)  # subclasses before their bases
EXCEPTIONS = [kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, BaseException)]
# Classes that both processes know by name, and that program classes derive from. str and float need no entry in IMMUTABLE.
KINDS = {kind.__name__: kind for kind in (object, type, type(None), bool, str, float, *IMMUTABLE, *CONTAINERS, *EXCEPTIONS)}
KIND_NAMES = {kind: name for name, kind in KINDS.items()}
BUILDERS["kind"] = KINDS.__getitem__


def encode_plain(value: Any, encode: Callable[[Any], Any]) -> Any:
    """`value` as JSON values if it is immutable and of a known type, else `unknown`. `encode` encodes its parts."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int and -SMALL < value < SMALL:
        return value
    if kind in IMMUTABLE:
        return [kind.__name__, [encode(part) for part in IMMUTABLE[kind].parts(value)]]
    if kind is type and value in KIND_NAMES:
        return ["kind", [KIND_NAMES[value]]]
    name = next((name for name, constant in NAMED_VALUES.items() if constant is value), None)
    return unknown if name is None else ["constant", [name]]


unknown = object()  # not a value of a known immutable type


def plain_base(kind: type) -> type:
    """The first class of `kind`'s MRO that both processes know; `object` if its instances are no plain values."""
    return next(base for base in kind.__mro__ if base in KIND_NAMES)


def plain_value(value: Any, base: type) -> Any:
    """The value of an instance of a subclass of `base`, an immutable type, as an exact `base`."""
    if base is str:
        return str.__add__(value, "")
    if base is float:
        return float.__float__(value)
    return int.__index__(value) if base is int else BUILDERS[base.__name__](*IMMUTABLE[base].parts(value))


def container_base(kind: type) -> type | None:
    return next((base for base in CONTAINERS if issubclass(kind, base)), None)


def contents(value: Any, base: type) -> list[Any]:
    """The items of a container, keys and values in turn for dictionaries, past all overriding methods."""
    if base is bytearray:
        return [bytes(value)]
    if issubclass(base, dict):
        return [part for pair in base.items(value) for part in pair]
    return list(base.__iter__(value))  # type: ignore[attr-defined]


def fill(value: Any, base: Any, items: list[Any]) -> None:
    """Give a container these contents, past all overriding methods."""
    if base is bytearray:
        bytearray.__setitem__(value, slice(None), items[0])
        return
    base.clear(value)
    if issubclass(base, dict):
        for key, item in zip(items[::2], items[1::2], strict=True):
            base.__setitem__(value, key, item)
    else:
        (base.update if base is set else base.extend)(value, items)


def setting(value: Any, base: type) -> Any:
    """What a container has besides its contents: the factory of a defaultdict, the maximal length of a deque."""
    return value.default_factory if base is defaultdict else value.maxlen if base is deque else None


def empty(kind: Any, base: Any, setting: Any) -> Any:
    """A new container of class `kind`, without calling the constructor of a subclass."""
    value = base.__new__(kind)
    if base is defaultdict:
        base.__init__(value, setting)
    elif base is deque:
        base.__init__(value, (), setting)
    return value
