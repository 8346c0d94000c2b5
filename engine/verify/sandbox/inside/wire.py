"""The protocol between the tests process (judge) and the program process: length-prefixed JSON frames that pass plain data by value.

None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, deque, range, Decimal and Fraction (subclasses as their
base class) are copied; their types are sent by name. Any other object stays in its process and is sent as a numbered handle: "mine"
belongs to the sender of the message, "yours" to the receiver. Decoding a frame runs no code of the sender.
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
    """The other process has ended or violates the protocol. A BaseException, so that no `except Exception` in a test catches it."""


def send(channel: socket.socket, message: Any) -> None:
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > FRAME_MAX:
        raise ValueError(f"a value of {len(data)} bytes exceeds the limit of {FRAME_MAX}")
    try:
        channel.sendall(len(data).to_bytes(4, "big") + data)
    except OSError as error:
        raise Lost(str(error)) from None


def receive(channel: socket.socket) -> Any:
    """The next message. Raises Lost if the channel is closed or the frame is malformed."""
    size = int.from_bytes(_exactly(channel, 4), "big")
    if size > FRAME_MAX:
        raise Lost(f"a frame of {size} bytes exceeds the limit of {FRAME_MAX}")
    try:
        return json.loads(_exactly(channel, size))
    except (ValueError, RecursionError) as error:
        raise Lost(f"malformed frame: {error}") from None


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            part = channel.recv(min(size - len(data), 1 << 20))
        except OSError as error:
            raise Lost(str(error)) from None
        if not part:
            raise Lost("the channel was closed")
        data += part
    return bytes(data)


def encode(value: Any, handle: Callable[[Any], list[Any]]) -> Any:
    """`value` as JSON values; `handle(object)` encodes objects that are not plain data. Raises RecursionError for cycles."""
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
    return _encode_rare(value, handle)


def _encode_rare(value: Any, handle: Callable[[Any], list[Any]]) -> Any:
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
    """The value of `message`; `resolve` looks up handles and builtins. Raises Lost if the message is malformed."""
    try:
        return _decode(message, resolve)
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError, MemoryError, ArithmeticError) as error:
        raise Lost(f"malformed value: {error}") from None


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
