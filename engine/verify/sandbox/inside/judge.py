"""The tests process: runs the tests, which use the program's objects through proxies.

Input: a job {"nonce", "program": [parts], "setup", "tests", "entry_point"}. Output: a verdict {"nonce", "correct", "reason", "lost"}.
The tests come from the data set and are trusted. The rules of proxies.py keep the program from learning or deciding what they expect.
"""

from __future__ import annotations

import asyncio
import builtins
import functools
import inspect
import io
import json
import os
import random
import re
import socket
import sys
import traceback
import types
from _sitebuiltins import Quitter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from engine.verify.sandbox.inside.names import ProgramNames, last_lines, modules, program_names
from engine.verify.sandbox.inside.peer import Peer
from engine.verify.sandbox.inside.proxies import SPECIAL, Remote
from engine.verify.sandbox.inside.values import plain_base
from engine.verify.sandbox.inside.wire import Lost, receive

REASON_MAX = 300  # characters
SHARED_MAX = 20_000  # items of containers that are kept equal on both sides; checking them costs time in each request
CONTAINER_COST = 20  # what an empty container costs, in items
TESTS = "tests"  # the module of the tests
DESCRIPTIVE = ("__name__", "__qualname__", "__doc__")
OPEN = (io.StringIO, io.BytesIO, random.Random, re.Pattern, re.Match)  # attributes of these reveal nothing of the tests
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.MethodDescriptorType, functools.partial)


class Judge(Peer):
    """The connection to one program."""

    def __init__(self, channel: socket.socket) -> None:
        super().__init__(channel, first_number=0)
        sys.modules[TESTS] = types.ModuleType(TESTS)  # dataclasses look up the module of a class
        self.namespace = sys.modules[TESTS].__dict__
        self.rules = self
        self.mentioned: set[int] = set()  # numbers in the next message
        self.names = ProgramNames(frozenset(), frozenset())
        self.own: set[int] = set()  # numbers of objects that the tests created from the program's classes
        self.hidden: set[int] = set()  # numbers of objects that know a plain value of the tests by an operator
        self.classes: set[int] = set()  # numbers of what the tests use as classes
        self.last_lines: frozenset[int] = frozenset()

    def ask_for(self, names: ProgramNames, required: str | None) -> None:
        """Bind the program's names in the tests' namespace, now and whenever the program changes them."""
        self.names = names
        self.request("watch", *sorted(names.read))
        if required is not None and required not in self.namespace:
            raise NameError(f"the program defines no {required}")
        self.classes = {self.numbers[id(self.namespace[name])] for name in names.classes if id(self.namespace.get(name)) in self.numbers}

    def _receive(self) -> dict[str, Any]:
        message = super()._receive()
        for name, value in message.get("globals", {}).items():
            if name in self.names.read:
                self.namespace[name] = self.decode(value)
        for stream, original, text in zip((sys.stdout, sys.stderr), (sys.__stdout__, sys.__stderr__), message["output"], strict=False):
            if stream is not original and text:
                stream.write(str(text))
        return message

    def drop_unused(self) -> list[int]:
        """Forget containers that only this object refers to, and the least recently used ones beyond the limit. Returns their numbers.

        Not those of the message that is being sent, which the program may change in place.
        """
        dropped, size = [], 0
        for number in reversed(self.sent):
            size += len(self.sent[number]) + CONTAINER_COST
            unused = sys.getrefcount(self.objects[number]) <= 2  # the table's and the argument's reference
            if unused or (size > SHARED_MAX and number not in self.mentioned):
                dropped.append(number)
        self.mentioned.clear()
        for number in dropped:
            self.forget(number)
        return dropped

    def register(self, value: Any) -> int:
        if isinstance(value, types.ModuleType | types.FrameType | types.TracebackType | types.CodeType):
            raise TypeError(f"a test passes a {type(value).__name__} to the program, which is not supported")
        return super().register(value)

    def encode(self, value: Any) -> Any:
        if isinstance(value, type) or type(value) in (types.BuiltinFunctionType, types.FunctionType):
            module = sys.modules.get(getattr(value, "__module__", None) or "")
            name = getattr(value, "__qualname__", "")
            if module is not None and module.__name__ in sys.stdlib_module_names and getattr(module, name, None) is value:
                return ["named", [module.__name__, name]]
        message = super().encode(value)
        if type(message) is list and message[0] == "ref":
            self.mentioned.add(message[1][0])
        return message

    def perform(self, verb: str, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Serve the program. It may call what was passed to it, and use public attributes and operators of instances of the tests' classes.

        Anything more, such as a function's globals, could reveal what the tests expect.
        """
        name, target = (arguments[0], arguments[1]) if verb == "special" else (None, arguments[0])
        assert id(target) in self.numbers
        ours = TESTS in (type(target).__module__, getattr(target, "__module__", None)) and not isinstance(target, FUNCTIONS)
        if verb == "call" or name == "__call__":
            if callable(target):
                return target(*arguments[1 + (name is not None) :], **named)
        elif verb == "special" and name in SPECIAL and (ours or isinstance(target, (*OPEN, Iterator))):
            return getattr(type(target), name)(*arguments[1:])
        elif verb == "getattr":
            if arguments[1] in DESCRIPTIVE or (_public(arguments[1]) and (ours or isinstance(target, OPEN))):
                return getattr(*arguments)
            raise AttributeError(f"{type(target).__name__} object has no attribute {arguments[1]!r}")
        elif verb == "setattr" and type(target).__module__ == TESTS and _public(arguments[1]):
            if not callable(getattr(type(target), arguments[1], None)):  # a method of the tests stays what it is
                return setattr(*arguments)
        elif verb == "await" and inspect.iscoroutine(target):
            return asyncio.run(target)
        raise TypeError(f"{verb} of a {type(target).__name__} of the tests is not supported")

    # What follows are the rules that proxies.py describes.

    def created(self, value: Any) -> bool:
        return self.numbers.get(id(value)) in self.own

    def is_opaque(self, value: Any) -> bool:
        return self.numbers.get(id(value)) in self.hidden

    def call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        result = self.request("call", function, *arguments, **named)
        if self.numbers.get(id(function)) in self.classes and isinstance(result, Remote):
            self.own.add(self.numbers[id(result)])
        return result

    def combined(self, result: Any, *operands: Any) -> Any:
        """The result of an operator, if the rules allow it."""
        if result is NotImplemented:
            return result
        theirs = [operand for operand in operands if isinstance(operand, Remote)]
        if all(map(self.created, theirs)):
            if isinstance(result, Remote):
                self.own.add(self.numbers[id(result)])
        elif len(theirs) < len(operands) or any(map(self.is_opaque, theirs)):
            if not isinstance(result, Remote) or plain_base(type(result)) is not object:
                raise TypeError("an operator of an object of the program with a plain value gives a plain value")
            self.hidden.add(self.numbers[id(result)])
        return result

    def suppresses(self, error: BaseException | None, trace: types.TracebackType | None) -> bool:
        """Whether the error was raised by the last statement of the `with` block, which is no assertion."""
        if isinstance(error, AssertionError | Lost) or trace is None or trace.tb_lineno not in self.last_lines:
            return False
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
        return frames.count("<tests>") == 1


def _public(name: Any) -> bool:
    return isinstance(name, str) and not name.startswith("_")


def judge(channel: socket.socket, job: dict[str, Any]) -> dict[str, Any]:
    """The verdict: correct if all tests ran, none raised and the program process is still alive; `lost` if it is not."""
    judge = Judge(channel)
    random.seed(0)  # tests with random inputs get the same ones each time
    try:
        judge.request("load", *job["program"])
    except BaseException as error:
        return _wrong(channel, "the program does not load: ", error, "")
    try:
        _run(judge, job)
        judge.request("watch")  # checks that the program process still replies
    except BaseException as error:
        return _wrong(channel, "", error, job["tests"])
    return {"correct": True, "reason": "all tests passed", "lost": False}


def _run(judge: Judge, job: dict[str, Any]) -> None:
    namespace, tests = judge.namespace, job["tests"]
    exec(compile(job["setup"], "<setup>", "exec"), namespace)
    namespace |= modules(tests, namespace)
    names = program_names(tests, job["entry_point"], bool(job["setup"]))
    if not names.read:
        raise NameError("the tests read no name of the program")
    for name in names.read:
        namespace.pop(name, None)
    judge.last_lines = last_lines(tests)
    judge.ask_for(names, job["entry_point"])
    exec(compile(tests, "<tests>", "exec"), namespace)


def _wrong(channel: socket.socket, what: str, error: BaseException, tests: str) -> dict[str, Any]:
    """A wrong verdict. From here on nothing asks the program: it must not choose anything but the characters of the reason."""
    channel.close()
    reason = type(error).__name__
    with suppress(BaseException):  # the error's text may be an object of the program
        reason = f"{reason}: {error}".removesuffix(": ")
    with suppress(BaseException):
        reason += _failing_line(error, tests)
    line = "".join(letter if letter.isprintable() else " " for letter in (what + reason)[:REASON_MAX])
    return {"correct": False, "reason": " ".join(line.split()), "lost": isinstance(error, Lost)}


def _failing_line(error: BaseException, tests: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>" and frame.lineno]
    return f" at {tests.splitlines()[lines[-1] - 1].strip()}" if lines else ""


def serve(channel: socket.socket, host: socket.socket, started: int) -> None:
    """Reads the job, reports on pipe `started` that its time begins, runs it, and writes the verdict with the job's nonce to `host`.

    The program process has neither descriptor. From `started` on, every failure is the response's: it ends in a verdict.
    """
    for name in ("exit", "quit"):
        setattr(builtins, name, Quitter(name, "Ctrl-D (i.e. EOF)"))
    with host.makefile("rb") as lines:
        job = json.loads(lines.read())
    assert receive(channel) == "ready"  # otherwise the program process could not be isolated: a failure of the machine, no verdict
    os.write(started, b"s")  # one byte: the pipe is readable again when this process ends
    try:
        verdict = judge(channel, job)
    except BaseException as error:  # no memory or stack left to describe the failure
        verdict = {"correct": False, "reason": f"the program's values cause {type(error).__name__} in the tests", "lost": False}
    host.sendall(json.dumps({"nonce": job["nonce"], **verdict}).encode())
