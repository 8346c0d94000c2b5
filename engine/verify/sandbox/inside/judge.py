"""The tests process: runs the tests and requests the program's values through Remote objects.

Input: a job {"nonce", "program": [parts], "setup", "tests", "entry_point"}. Output: a verdict {"nonce", "correct", "reason", "lost"}.
The tests come from the data set and are trusted. The program's values are plain data when they are compared in this process.
Comparisons, arithmetic and `in` between a Remote and plain data are never sent to the program, because that would reveal the expected
values. A test cannot await an object of the program, use it in a `with` statement, or derive from its classes.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import socket
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from engine.verify.sandbox.inside.names import modules, program_names
from engine.verify.sandbox.inside.wire import Lost, decode, encode, receive, send

REASON_MAX = 300  # characters


class Judge:
    """The connection to one program. `functions` are functions of the tests that were passed to the program."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.functions: list[Callable[..., Any]] = []

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """The program's reply to `request`. Serves callbacks until then. Raises the program's exceptions, as builtin ones by name."""
        send(self.channel, request)
        while True:
            reply = receive(self.channel)
            if not isinstance(reply, dict):
                raise Lost("malformed reply")
            if "callback" not in reply:
                break
            send(self.channel, self.call_back(reply))
        if "error" in reply:
            raise _error(str(reply["error"]), str(reply.get("text", "")), request.get("verb") == "next")
        return reply

    def perform(self, verb: str, *arguments: Any, **named: Any) -> Any:
        """Run one of VERBS in the program process. In-place changes to lists, dicts and sets among the arguments are copied back."""
        parts = [self.encode(argument) for argument in arguments]
        keywords = {name: self.encode(argument) for name, argument in named.items()}
        reply = self.request({"verb": verb, "arguments": parts, "named": keywords})
        for argument, message in zip(arguments, reply.get("arguments", ()), strict=False):
            _copy_back(argument, self.decode(message))
        return self.decode(reply.get("ok"))

    def call_back(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            function = self.functions[request["callback"]]
            return {"ok": self.encode(function(*(self.decode(part) for part in request["arguments"])))}
        except Exception as error:
            return {"error": type(error).__name__}

    def encode(self, value: Any) -> Any:
        return encode(value, self.handle)

    def decode(self, message: Any) -> Any:
        return decode(message, self.resolve)

    def handle(self, value: Any) -> list[Any]:
        if isinstance(value, Remote):
            return ["yours", object.__getattribute__(value, "_number")]
        if (
            getattr(builtins, getattr(value, "__name__", ""), None) is value
        ):  # sent by name, so that the program uses its own eval, not that of this process
            return ["builtin", value.__name__]
        if not callable(value):
            raise TypeError(f"a test passes a {type(value).__name__} to the program; only plain data and functions are supported")
        self.functions.append(value)
        return ["mine", len(self.functions) - 1]

    def resolve(self, whose: str, number: Any) -> Any:
        if whose == "builtin":
            raise ValueError("the program may not send builtins")
        return self.functions[number] if whose == "yours" else Remote(self, int(number))


class Remote:
    """An object of the program: a function, a class, an instance, an iterator."""

    __slots__ = ("_judge", "_number")
    __hash__ = object.__hash__

    def __init__(self, judge: Judge, number: int) -> None:
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_number", number)

    def __iter__(self) -> Iterator[Any]:
        return _perform("iter", self)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and _perform("isinstance", instance, self) is True


def _perform(verb: str, remote: Remote, *arguments: Any, **named: Any) -> Any:
    return object.__getattribute__(remote, "_judge").perform(verb, remote, *arguments, **named)


def _forward(verb: str) -> Callable[..., Any]:
    return lambda self, *arguments, **named: _perform(verb, self, *arguments, **named)


def _among_remotes(verb: str) -> Callable[[Remote, Any], Any]:
    return lambda self, other: _perform(verb, self, other) if isinstance(other, Remote) else NotImplemented


for _verb in ("call", "getattr", "setattr", "getitem", "setitem", "next", "len", "str", "repr", "bool"):
    setattr(Remote, f"__{_verb}__", _forward(_verb))
for _verb in ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul"):
    setattr(Remote, f"__{_verb}__", _among_remotes(_verb))


def _error(name: str, text: str, from_next: bool) -> Exception:
    """The builtin exception of that name. StopIteration only from next(): raised inside map(), it would end the tests without an error."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and (from_next or not issubclass(kind, StopIteration)):
        with suppress(TypeError):  # some, such as UnicodeDecodeError, need more arguments than a message
            return kind(text)
    return RuntimeError(f"{name}: {text}")


def _copy_back(argument: Any, after: Any) -> None:
    """Give `argument` the contents of `after`, if it is a mutable container of the same type."""
    if type(argument) is not type(after):
        return
    if isinstance(argument, list | bytearray):
        argument[:] = after
    elif isinstance(argument, dict | set):
        argument.clear()
        argument.update(after)
    elif isinstance(argument, deque):
        argument.clear()
        argument.extend(after)


def judge(channel: socket.socket, job: dict[str, Any]) -> dict[str, Any]:
    """The verdict: correct if all tests ran, none raised and the program process is still alive; `lost` if it is not."""
    judge = Judge(channel)
    random.seed(0)  # tests with random inputs get the same ones each time
    try:
        judge.request({"load": job["program"]})
    except (Exception, Lost) as error:
        return _wrong(f"the program does not load: {_describe(error)}", error)
    try:
        _run(judge, job)
        judge.request({"name": ""})  # checks that the program process still replies
    except (Exception, Lost, SystemExit) as error:
        return _wrong(_describe(error) + _failing_line(error, job["tests"]), error)
    return {"correct": True, "reason": "all tests passed", "lost": False}


def _wrong(reason: str, error: BaseException) -> dict[str, Any]:
    """A verdict whose reason is one printable line; the program may have chosen its characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in reason[:REASON_MAX])
    return {"correct": False, "reason": " ".join(line.split()), "lost": isinstance(error, Lost)}


def _run(judge: Judge, job: dict[str, Any]) -> None:
    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(job["setup"], "<setup>", "exec"), namespace)
    namespace |= modules(job["tests"], namespace)
    names = program_names(job["tests"], job["entry_point"], bool(job["setup"]))
    for name in names.read:
        reply = judge.request({"name": name})
        if not reply.get("missing"):
            namespace[name] = judge.decode(reply.get("ok"))
        elif name == job["entry_point"]:
            raise NameError(f"the program defines no {name}")
    exec(compile(job["tests"], "<tests>", "exec"), namespace)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _failing_line(error: BaseException, tests: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>" and frame.lineno]
    return f" at {tests.splitlines()[lines[-1] - 1].strip()}" if lines else ""


def serve(channel: socket.socket, host: socket.socket, started: int) -> None:
    """Reads the job, reports on pipe `started` that its time begins, runs it, and writes the verdict with the job's nonce to `host`.

    The program process has neither descriptor. From `started` on, every failure is the response's: it ends in a verdict.
    """
    with host.makefile("rb") as lines:
        job = json.loads(lines.read())
    assert receive(channel) == "ready"  # otherwise the program process could not be isolated: a failure of the machine, no verdict
    os.write(started, b"started")
    try:
        verdict = judge(channel, job)
    except BaseException as error:  # no memory or stack left to describe the failure
        verdict = {"correct": False, "reason": f"the program's values cause {type(error).__name__} in the tests", "lost": False}
    host.sendall(json.dumps({"nonce": job["nonce"], **verdict}).encode())
