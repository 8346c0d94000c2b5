"""One side of the connection between the tests process and the program process, which share objects as if they were one process.

Every object that crosses has a number: even if it belongs to the tests, odd if it belongs to the program. The other side has a proxy for it
(proxies.py), or an equal value if its type is known to both (values.py). A container that can change is a copy on both sides: each message
begins with what has changed since the last one. The sides take turns, so a change is never missed and never made on both sides at once.

A message is {"verb", "arguments", "named"} or a reply to it, {"ok"} or {"error"}. Beside these it has
  "new": objects that the receiver does not know yet, in an order in which it can build them,
  "contents": of containers that are new or have changed,
  "dropped": numbers that the tests no longer use.
"""

from __future__ import annotations

import abc
import socket
from collections.abc import Iterator
from operator import is_
from typing import Any

from engine.verify.sandbox.inside import values
from engine.verify.sandbox.inside.proxies import Remote, Rules, describe, mirror
from engine.verify.sandbox.inside.values import BUILDERS, container_base, contents, encode_plain, plain_base, plain_value, unknown
from engine.verify.sandbox.inside.wire import Lost, receive, send

MALFORMED = (TypeError, ValueError, LookupError, AttributeError, RecursionError, ArithmeticError, AssertionError)


class Peer(abc.ABC):
    """What both sides do. A side defines `perform`, the requests that it serves."""

    rules: Rules | None = None  # of the tests process, for its proxies

    def __init__(self, channel: socket.socket, first_number: int) -> None:
        self.channel, self.next_number = channel, first_number
        self.objects: dict[int, Any] = {}  # by number; keeps the ids in `numbers` valid
        self.numbers: dict[int, int] = {}  # by id
        self.sent: dict[int, list[Any]] = {}  # contents of containers, when last equal on both sides
        self.new: list[Any] = []
        self.unsent: list[int] = []
        self.dropped: list[int] = []

    @abc.abstractmethod
    def perform(self, verb: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        """The result of a request of the other side."""

    def request(self, verb: str, *arguments: Any, **named: Any) -> Any:
        """The other side's result for `verb`. Serves its requests until then. Raises the exception that it raised, or Lost."""
        self._drop()
        parts = [self.encode(argument) for argument in arguments]
        self._send({"verb": verb, "arguments": parts, "named": {name: self.encode(value) for name, value in named.items()}})
        while "verb" in (reply := self._receive()):
            self._send(self.answer(reply))
        if "error" not in reply:
            return self.decode(reply.get("ok"))
        error = self.decode(reply["error"])
        if not isinstance(error, BaseException):
            raise Lost("an error that is no exception")
        # Raised inside map() or a generator, StopIteration would end the tests without an error.
        if isinstance(error, StopIteration | StopAsyncIteration) and (verb != "special" or arguments[0] not in ("__next__", "__anext__")):
            raise RuntimeError(f"{type(error).__name__} from a call") from None
        raise error

    def call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        return self.request("call", function, *arguments, **named)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request. An exception of any kind is part of the reply."""
        try:
            arguments = [self.decode(part) for part in request["arguments"]]
            named = {name: self.decode(part) for name, part in request["named"].items()}
            self._drop()
            return {"ok": self.encode(self.perform(request["verb"], arguments, named))}
        except Lost:
            raise
        except BaseException as error:  # including SystemExit and KeyboardInterrupt, which must not end the process
            return {"error": self.encode(error)}

    def _send(self, message: dict[str, Any]) -> None:
        for number, before in self.sent.items():
            value = self.objects[number]
            if number not in self.unsent and _differ(before, contents(value, _base(value))):
                self.unsent.append(number)
        message["contents"] = list(self._contents())
        message["new"], self.new = self.new, []
        message["dropped"] = self.drop_unused()
        send(self.channel, message)

    def _contents(self) -> Iterator[Any]:
        """Encodes containers until no new ones turn up in them."""
        while self.unsent:
            number = self.unsent.pop()
            value = self.objects[number]
            self.sent[number] = contents(value, _base(value))
            yield [number, [self.encode(item) for item in self.sent[number]]]

    def _receive(self) -> dict[str, Any]:
        message = receive(self.channel)
        try:
            for number, how, *details in message["new"]:
                assert number % 2 != self.next_number % 2
                self.number(number, BUILD[how](self, number, *details))
            for number, items in message["contents"]:
                value = self.objects[number]
                values.fill(value, _base(value), [self.decode(item) for item in items])
                self.sent[number] = contents(value, _base(value))
            self.dropped += message["dropped"]
            return message
        except MALFORMED as error:
            raise Lost(f"malformed message: {type(error).__name__}: {error}") from None

    def number(self, number: int, value: Any) -> int:
        assert number not in self.objects
        self.objects[number] = value
        self.numbers[id(value)] = number
        return number

    def named(self, module: str, name: str) -> Any:
        """An object of the standard library that the other side passes by name. Only the tests process may do so."""
        raise ValueError(f"{module}.{name}")

    def drop_unused(self) -> list[int]:
        """Numbers of containers that need not be kept equal any more. Only the tests process decides this."""
        return []

    def _drop(self) -> None:
        """Forget what the other side has dropped; not earlier than the message that said so is decoded."""
        for number in self.dropped:
            self.forget(number)
        self.dropped = []

    def forget(self, number: int) -> None:
        del self.numbers[id(self.objects.pop(number))]
        del self.sent[number]

    def encode(self, value: Any) -> Any:
        """`value` as JSON values. Raises RecursionError if tuples are nested too deeply, and TypeError if it may not be shared."""
        plain = encode_plain(value, self.encode)
        if plain is not unknown:
            return plain
        number = self.numbers.get(id(value))
        if number is None:
            number = self.register(value)
        elif number in self.sent:
            self.sent[number] = self.sent.pop(number)  # the most recently used is the last
        return ["ref", [number]]

    def encode_class(self, cls: type) -> Any:
        """A class whose mirror the other side needs."""
        return Peer.encode(self, cls)

    def register(self, value: Any) -> int:
        """The number of an object that the other side does not know yet."""
        if isinstance(value, type):
            details = ["class", *describe(value, self.encode_class)]
        else:
            kind, base = self.encode_class(type(value)), plain_base(type(value))
            if container := container_base(type(value)):
                details = ["container", kind, self.encode(values.setting(value, container))]
            elif isinstance(value, BaseException):
                details = ["exception", kind, [self.encode(part) for part in value.args], self.encode(value.__cause__)]
            else:
                details = ["object", kind] if base is object else ["value", kind, self.encode(plain_value(value, base))]
        number, self.next_number = self.next_number, self.next_number + 2
        self.number(number, value)
        self.new.append([number, *details])
        if details[0] == "container":
            self.sent[number] = []
            self.unsent.append(number)
        return number

    def decode(self, message: Any) -> Any:
        """The value of `message`. Raises Lost if it is malformed."""
        try:
            return self._decode(message)
        except MALFORMED as error:
            raise Lost(f"malformed value: {type(error).__name__}: {error}") from None

    def _decode(self, message: Any) -> Any:
        if isinstance(message, dict):
            raise TypeError("an object")
        if not isinstance(message, list):
            return message
        name, parts = message
        if name == "ref":
            return self.objects[parts[0]]
        if name == "named":
            return self.named(*parts)
        return BUILDERS[name](*[self._decode(part) for part in parts])

    def _build_class(self, number: int, *description: Any) -> type:
        return mirror(self, *description)

    def _build_container(self, number: int, kind: Any, setting: Any) -> Any:
        self.sent[number] = []
        cls = self._class(kind)
        return values.empty(cls, container_base(cls), self._decode(setting))

    def _build_value(self, number: int, kind: Any, value: Any) -> Any:
        cls = self._class(kind)
        return plain_base(cls).__new__(cls, *_constructor_arguments(plain_base(cls), self._decode(value)))

    def _build_exception(self, number: int, kind: Any, arguments: list[Any], cause: Any) -> BaseException:
        cls, parts = self._class(kind), [self._decode(part) for part in arguments]
        assert issubclass(cls, BaseException)
        try:
            error = cls(*parts) if type(cls) is type else plain_base(cls).__new__(cls, *parts)
        except TypeError:  # some need more arguments than they keep
            error = RuntimeError(f"{cls.__name__}: {parts}")
        error.__cause__ = self._decode(cause)
        return error

    def _build_object(self, number: int, kind: Any) -> Any:
        cls = self._class(kind)
        assert cls is object or issubclass(cls, Remote)
        if cls.__name__ == "coroutine" and cls.__module__ == "builtins":
            return self._coroutine(number)
        return object.__new__(Remote if cls is object else cls)

    async def _coroutine(self, number: int) -> Any:
        return self.request("await", self.objects[number])

    def _class(self, message: Any) -> type:
        cls = self._decode(message)
        assert isinstance(cls, type)
        return cls


BUILD = {how: getattr(Peer, f"_build_{how}") for how in ("class", "container", "value", "exception", "object")}


def _base(value: Any) -> type:
    base = container_base(type(value))
    assert base is not None
    return base


def _differ(before: list[Any], now: list[Any]) -> bool:
    if len(before) != len(now):
        return True
    return not all(map(is_, before, now)) and not (now and type(now[0]) is bytes and before == now)


def _constructor_arguments(base: type, value: Any) -> tuple[Any, ...]:
    """What `base.__new__` makes an equal value of, for a class derived from `base`."""
    if base in (int, str, float, bytes, tuple, frozenset, complex, values.Decimal, values.Fraction):
        return (value,)
    return tuple(values.IMMUTABLE[base].parts(value))
