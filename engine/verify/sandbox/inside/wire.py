"""Frames between the tests process (judge) and the program process: length-prefixed JSON. Reading a frame runs no code of the sender."""

from __future__ import annotations

import json
import socket
from typing import Any

FRAME_MAX = 16 << 20  # bytes


class Lost(BaseException):
    """The other process has ended or violates the protocol. A BaseException, so that no `except Exception` in a test catches it."""


def send(channel: socket.socket, message: Any) -> None:
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > FRAME_MAX:
        raise ValueError(f"values of {len(data)} bytes exceed the limit of {FRAME_MAX}")
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
