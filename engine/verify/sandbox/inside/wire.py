"""What judge and program say to each other: frames of JSON, in which only plain data travels by value.

None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, deque, range, Decimal and Fraction (subclasses as their
base) arrive as copies built by the receiver, kinds of data by name; anything else stays where it is and travels as a number, its handle.
Reading a frame runs nothing of the sender's.
"""

from __future__ import annotations

import json
import socket
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

FRAME_MAX = 16 << 20  # bytes
BIG = 1 << 53

KINDS = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}
SEQUENCES = (list, tuple, set, frozenset, deque)

Resolve = Callable[[str, Any], Any]  # ("mine" | "yours" | "builtin", number or name) -> the object, or Lost


class Lost(BaseException):
    """The other side is gone or talks nonsense. No `except Exception` of a test may swallow it."""


def send(channel: socket.socket, message: Any) -> None:
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > FRAME_MAX:
        raise ValueError(f"a value of {len(data)} bytes is over the limit of {FRAME_MAX}")
    try:
        channel.sendall(len(data).to_bytes(4, "big") + data)
    except OSError as error:
        raise Lost(str(error)) from None


def receive(channel: socket.socket) -> Any:
    """The next message. Raises Lost at the end of the channel and for whatever is no frame."""
    size = int.from_bytes(_exactly(channel, 4), "big")
    if size > FRAME_MAX:
        raise Lost(f"a frame of {size} bytes")
    try:
        return json.loads(_exactly(channel, size))
    except (ValueError, RecursionError) as error:
        raise Lost(f"not a frame: {error}") from None


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            part = channel.recv(min(size - len(data), 1 << 20))
        except OSError as error:
            raise Lost(str(error)) from None
        if not part:
            raise Lost("the channel ended")
        data += part
    return bytes(data)


def encode(value: Any, handle: Callable[[Any], list[Any]]) -> Any:
    """JSON for `value`; `handle(object)` answers for what is not plain. Raises RecursionError for cycles."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -BIG < number < BIG else ["int", hex(number)]
    if isinstance(value, float):
        return float.__float__(value)
    for kind in SEQUENCES:
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, handle) for item in value]]
    if isinstance(value, dict):
        return ["dict", [["tuple", [encode(key, handle), encode(item, handle)]] for key, item in value.items()]]
    return _rarely(value, handle)


def _rarely(value: Any, handle: Callable[[Any], list[Any]]) -> Any:
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, Decimal | Fraction):
        return ["Decimal" if isinstance(value, Decimal) else "Fraction", str(value)]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [encode(part, handle) for part in (value.start, value.stop, value.step)]]
    if isinstance(value, type) and KINDS.get(value.__name__) is value:
        return ["kind", value.__name__]
    return handle(value)


def decode(message: Any, resolve: Resolve) -> Any:
    """The value; `resolve` answers for handles and builtins. Raises Lost for anything malformed."""
    try:
        return _decode(message, resolve)
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError, MemoryError, ArithmeticError) as error:
        raise Lost(f"not a value: {error}") from None


def _decode(message: Any, resolve: Resolve) -> Any:
    if isinstance(message, dict):
        raise TypeError("an object")
    if not isinstance(message, list):
        return message
    name, body = message
    if name in ("mine", "yours", "builtin"):
        return resolve(name, body)
    if name in _LEAVES:
        return _LEAVES[name](body)
    parts = [_decode(part, resolve) for part in body]
    return _GROUPS[name](parts)


_GROUPS: dict[str, Callable[[list[Any]], Any]] = {
    **{kind.__name__: kind for kind in SEQUENCES},
    "dict": dict,
    "range": lambda parts: range(*parts),
}
_LEAVES: dict[str, Callable[[Any], Any]] = {
    "int": lambda body: int(body, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "kind": KINDS.__getitem__,
    "complex": lambda body: complex(*body),
    "Decimal": Decimal,
    "Fraction": Fraction,
}
