"""The program process: loads the tested program, then serves the tests process's requests for its objects.

Nothing in this process is secret or trusted: the program runs in it and may replace this code. That only lets it choose the values it
returns, as any function may. It never receives what the tests expect.
"""

from __future__ import annotations

import asyncio
import builtins
import copy
import io
import operator
import socket
import sys
import types
from _sitebuiltins import Quitter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from engine.verify.sandbox.inside.peer import Peer
from engine.verify.sandbox.inside.wire import Lost, send

OF_CLASSES: dict[str, Callable[..., Any]] = {
    **{f"__{name}__": getattr(builtins, name) for name in ("iter", "len", "reversed")},
    **{f"__{name}__": getattr(operator, name) for name in ("getitem", "contains")},
}
OUTPUT_MAX = 1 << 20  # characters per reply
absent = object()


class ProgramServer(Peer):
    """Serves requests for the program's objects."""

    def __init__(self, channel: socket.socket) -> None:
        super().__init__(channel, first_number=1)
        self.module = types.ModuleType("program")
        self.globals: dict[str, Any] = {}  # names that the tests read, and their values when last sent
        self.output = [io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogatepass", write_through=True) for _ in range(2)]
        sys.modules["program"] = self.module  # dataclasses and pickle look up the module of a class
        sys.stdout, sys.stderr = self.output
        for name in ("exit", "quit"):
            setattr(builtins, name, Quitter(name, "Ctrl-D (i.e. EOF)"))

    def serve(self) -> None:
        """Sends "ready", then serves requests until the tests process closes the channel."""
        send(self.channel, "ready")
        while True:
            try:
                request = self._receive()
            except Lost:
                return
            self._send(self.answer(request))

    def _send(self, message: dict[str, Any]) -> None:
        """Also sends global variables that have changed, and what the program has printed."""
        changed = {name: self.module.__dict__.get(name, absent) for name in self.globals}
        changed = {name: value for name, value in changed.items() if value is not self.globals[name] and value is not absent}
        self.globals |= changed
        message["globals"] = {name: self.encode(value) for name, value in changed.items()}
        message["output"] = [_taken(stream) for stream in self.output]
        super()._send(message)

    def perform(self, verb: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        return getattr(self, f"do_{verb}")(*arguments, **named)

    def named(self, module: str, name: str) -> Any:
        return getattr(import_module(module), name)

    def do_load(self, *parts: str) -> None:
        for part in parts:
            exec(compile(part, "<program>", "exec"), self.module.__dict__)

    def do_watch(self, *names: str) -> None:
        self.globals = dict.fromkeys(names, absent)

    def do_special(self, name: str, target: Any, *arguments: Any) -> Any:
        if isinstance(target, type) and name in OF_CLASSES:
            return OF_CLASSES[name](target, *arguments)
        return getattr(type(target), name)(target, *arguments)

    def do_call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    do_getattr, do_setattr, do_delattr = staticmethod(getattr), staticmethod(setattr), staticmethod(delattr)
    do_copy, do_deepcopy, do_await = staticmethod(copy.copy), staticmethod(copy.deepcopy), staticmethod(asyncio.run)


def _taken(stream: io.TextIOWrapper) -> str:
    """What was written to `stream` since the last call."""
    try:
        text = stream.buffer.getvalue()[:OUTPUT_MAX].decode(errors="replace")  # type: ignore[attr-defined]
        if text:
            stream.seek(0)
            stream.truncate(0)
        return text
    except ValueError:  # the program has closed it
        return ""
