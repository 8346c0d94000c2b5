"""The program process: loads the tested program, then serves the tests process's requests for its objects.

Nothing in this process is secret or trusted: the program runs in it and may replace this code. That only lets it choose the values it
returns, as any function may. It never receives what the tests expect.
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


class ProgramServer:
    """Serves requests for the program's objects, which stay in this process and are referred to by number."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}  # id -> index; `objects` keeps the ids valid
        self.module = types.ModuleType("program")
        sys.modules["program"] = self.module  # dataclasses and pickle look up the module of a class

    def serve(self) -> None:
        """Sends "ready", then serves requests until the tests process closes the channel."""
        send(self.channel, "ready")
        while True:
            try:
                request = receive(self.channel)
            except Lost:
                return
            send(self.channel, self.reply_to(request))

    def reply_to(self, request: Any) -> dict[str, Any]:
        try:
            if "load" in request:
                for part in request["load"]:
                    exec(compile(part, "<program>", "exec"), self.module.__dict__)
                return {"ok": None}
            if "name" in request:
                value = self.module.__dict__.get(request["name"], Lost)
                return {"missing": True} if value is Lost else {"ok": self.encode(value)}
            return self.perform(request)
        except BaseException as error:  # including SystemExit and KeyboardInterrupt: the program must not end the process this way
            return {"error": type(error).__name__, "text": _message(error)}

    def perform(self, request: Any) -> dict[str, Any]:
        """Runs one of VERBS. The reply includes the arguments if the call changed them in place."""
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
    """A function of the tests that was passed to the program as an argument."""

    def __init__(self, server: ProgramServer, number: int) -> None:
        self.server, self.number = server, number

    def __call__(self, *arguments: Any) -> Any:
        send(self.server.channel, {"callback": self.number, "arguments": [self.server.encode(argument) for argument in arguments]})
        reply = receive(self.server.channel)
        while "verb" in reply:  # the function uses an object of the program
            send(self.server.channel, self.server.reply_to(reply))
            reply = receive(self.server.channel)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return self.server.decode(reply["ok"])


def _message(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""
