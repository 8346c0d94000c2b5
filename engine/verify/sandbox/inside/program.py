"""The side of the tested program: load it, then answer the judge's requests on its objects.

Nothing here is secret and nothing here is trusted: the program shares this process and may answer for itself. All it can then do is what
a function may do anyway, choose the values it returns, and it never hears what the tests expect.
"""

from __future__ import annotations

import builtins
import operator
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from engine.verify.sandbox.inside.wire import Lost, decode, encode, receive, send

VERBS: dict[str, Callable[..., Any]] = {
    **{name: getattr(builtins, name) for name in ("getattr", "setattr", "isinstance", "iter", "next", "len", "str", "repr", "bool")},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "eq", "lt", "le", "gt", "ge", "add", "sub", "mul")},
    "call": lambda function, *arguments, **named: function(*arguments, **named),
}


class Guest:
    """Objects that stay here, by number."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}  # id -> index; `objects` keeps the ids valid
        self.module = types.ModuleType("program")
        sys.modules["program"] = self.module  # dataclasses and pickle look their module up

    def serve(self) -> None:
        """Says that it is there, then answers until the judge hangs up."""
        send(self.channel, "here")
        while True:
            try:
                request = receive(self.channel)
            except Lost:
                return
            send(self.channel, self.answer(request))

    def answer(self, request: Any) -> dict[str, Any]:
        try:
            if "load" in request:
                exec(compile(request["load"], "<program>", "exec"), self.module.__dict__)
                return {"ok": None}
            if "name" in request:
                value = self.module.__dict__.get(request["name"], Lost)
                return {"missing": True} if value is Lost else {"ok": self.encode(value)}
            return self.perform(request)
        except BaseException as error:  # SystemExit and KeyboardInterrupt included: leaving is not an answer
            return {"error": type(error).__name__, "text": _say(error)}

    def perform(self, request: Any) -> dict[str, Any]:
        """One verb; says too what became of arguments that it changed in place."""
        arguments = [self.decode(part) for part in request["arguments"]]
        named = {name: self.decode(part) for name, part in request["named"].items()}
        reply = {"ok": self.encode(VERBS[request["verb"]](*arguments, **named))}
        after = [self.encode(argument) for argument in arguments]
        return reply if after == request["arguments"] else reply | {"arguments": after}

    def encode(self, value: Any) -> Any:
        return encode(value, self.handle)

    def decode(self, message: Any) -> Any:
        return decode(message, self.resolve)

    def handle(self, value: Any) -> list[Any]:
        if isinstance(value, Callback):
            return ["yours", value.number]
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
        return ["mine", number]

    def resolve(self, whose: str, number: Any) -> Any:
        if whose == "builtin":
            return getattr(builtins, number)
        return self.objects[number] if whose == "yours" else Callback(self, number)


class Callback:
    """A function of the tests, handed to the program as an argument."""

    def __init__(self, guest: Guest, number: int) -> None:
        self.guest, self.number = guest, number

    def __call__(self, *arguments: Any) -> Any:
        send(self.guest.channel, {"callback": self.number, "arguments": [self.guest.encode(argument) for argument in arguments]})
        reply = receive(self.guest.channel)
        while "verb" in reply:  # the function asks for something of ours
            send(self.guest.channel, self.guest.answer(reply))
            reply = receive(self.guest.channel)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return self.guest.decode(reply["ok"])


def _say(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""
