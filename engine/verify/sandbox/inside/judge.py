"""The side of the tests: run them here, and ask the program for its values through Remote objects.

Job in: {"nonce", "program", "setup", "tests", "entry_point"}; verdict out: {"nonce", "correct", "reason", "lost"}.
The tests come with the data set and are trusted to be tests; the program's answers are plain data by the time they are compared here.
Comparisons, arithmetic and `in` of a Remote with plain data are never sent over: the program would learn what is expected and could agree.
Nor can a test await an object of the program, enter it with `with`, or derive from its classes.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import random
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from engine.verify.sandbox.inside.wire import Lost, decode, encode, receive, send

REASON_MAX = 300  # characters


class Judge:
    """Talks to one program. `functions` are those of the tests that were handed to it."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.functions: list[Callable[..., Any]] = []

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The program's reply; its exceptions are raised here, as builtins by name. Serves its callbacks meanwhile."""
        send(self.channel, request)
        while True:
            reply = receive(self.channel)
            if not isinstance(reply, dict):
                raise Lost("not a reply")
            if "callback" not in reply:
                break
            send(self.channel, self.call_back(reply))
        if "error" in reply:
            raise _error(str(reply["error"]), str(reply.get("text", "")), request.get("verb") == "next")
        return reply

    def perform(self, verb: str, *arguments: Any, **named: Any) -> Any:
        """One verb of guest.py on the program's side. Lists, dicts and sets among the arguments change as they changed there."""
        parts = [self.encode(argument) for argument in arguments]
        keywords = {name: self.encode(argument) for name, argument in named.items()}
        reply = self.ask({"verb": verb, "arguments": parts, "named": keywords})
        for argument, message in zip(arguments, reply.get("arguments", ()), strict=False):
            _become(argument, self.decode(message))
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
        if getattr(builtins, getattr(value, "__name__", ""), None) is value:  # its own: eval must not run here what it asks for
            return ["builtin", value.__name__]
        if not callable(value):
            raise TypeError(f"a test hands a {type(value).__name__} to the program; only plain data and functions travel")
        self.functions.append(value)
        return ["mine", len(self.functions) - 1]

    def resolve(self, whose: str, number: Any) -> Any:
        if whose == "builtin":
            raise ValueError("builtins travel one way only")
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


def _error(name: str, text: str, next_asked: bool) -> Exception:
    """The builtin exception of that name. StopIteration only from next(): out of map() it would end the tests in silence."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and (next_asked or not issubclass(kind, StopIteration)):
        with suppress(TypeError):  # UnicodeDecodeError and the like want more than a text
            return kind(text)
    return RuntimeError(f"{name}: {text}")


def _become(argument: Any, after: Any) -> None:
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
    """Correct only when every test was reached, none raised, and the program is still there; `lost` when it is not."""
    judge = Judge(channel)
    random.seed(0)  # tests that draw their inputs draw the same ones each time
    try:
        judge.ask({"load": job["program"]})
    except (Exception, Lost) as error:
        return _wrong(f"the program does not load: {_describe(error)}", error)
    try:
        _run(judge, job)
        judge.ask({"name": ""})
    except (Exception, Lost, SystemExit) as error:
        return _wrong(_describe(error) + _where(error, job["tests"]), error)
    return {"correct": True, "reason": "all tests passed", "lost": False}


def _wrong(reason: str, error: BaseException) -> dict[str, Any]:
    """One printable line: the program has a say in it."""
    line = "".join(letter if letter.isprintable() else " " for letter in reason[:REASON_MAX])
    return {"correct": False, "reason": " ".join(line.split()), "lost": isinstance(error, Lost)}


def _run(judge: Judge, job: dict[str, Any]) -> None:
    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(job["setup"], "<setup>", "exec"), namespace)
    entry_point = job["entry_point"]
    for name in _asked_for(job["tests"], namespace) | {entry_point} - {None}:
        reply = judge.ask({"name": name})
        if not reply.get("missing"):
            namespace[name] = judge.decode(reply.get("ok"))
        elif name == entry_point:
            raise NameError(f"the program defines no {name}")
    exec(compile(job["tests"], "<tests>", "exec"), namespace)
    if entry_point is not None:
        namespace["check"](namespace[entry_point])


def _asked_for(tests: str, namespace: dict[str, Any]) -> set[str]:
    """Names that the tests read and only the program can define; modules of the standard library are imported into `namespace` instead.

    A builtin's name means the builtin, so that no program replaces `sorted` under the tests' feet, unless the tests read nothing else.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    read = {node.id for node in nodes if isinstance(node, ast.Name)} - _defined(nodes)
    attributed = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    for name in (read & attributed & set(sys.stdlib_module_names)) - set(namespace):
        namespace[name] = importlib.import_module(name)
    free = read - set(namespace)
    return free - set(dir(builtins)) or free


def _defined(nodes: list[ast.AST]) -> set[str]:
    """Names that the tests give a meaning themselves, anywhere."""
    names = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return names | {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _where(error: BaseException, tests: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>" and frame.lineno]
    return f" at {tests.splitlines()[lines[-1] - 1].strip()}" if lines else ""


def serve(channel: socket.socket, host: socket.socket) -> None:
    """Reads the job, runs it, says the verdict with the job's nonce. The program's process never held this descriptor."""
    with host.makefile("rb") as lines:
        job = json.loads(lines.read())
    assert receive(channel) == "here"  # else the program's walls do not stand, and the machine is to blame: no verdict
    try:
        verdict = judge(channel, job)
    except MemoryError:  # no room even to say what was wrong
        verdict = {"correct": False, "reason": "the program's values are over the memory limit", "lost": False}
    host.sendall(json.dumps({"nonce": job["nonce"], **verdict}).encode())
