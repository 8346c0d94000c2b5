"""Proxies for objects of the other process, and the classes of these proxies.

A class that is not known to both processes is mirrored: its mirror has the same name, bases and special methods, so that isinstance,
issubclass, callable, hasattr and the interpreter's protocols give the same answers. Other attributes are requested. An instance of a class
that derives from a plain type is also a plain value, which the interpreter compares without asking the other process.

In the tests process, the rules below keep a program from learning what the tests expect, or from deciding a comparison with it:
- Comparisons with plain values are never sent to the program; between two of its objects they are.
- Arithmetic with plain values is sent, since `v * 3` may be a vector, but the result must be an object as well, and no operator turns that
  into a plain value: `abs(f(1) - 7) < 1e-6` cannot pass with an object of the program's. Its attributes and text can be asked for.
- `in` with a plain value is decided by iteration. Methods by which text and sets are compared are not requested.
- The last two rules do not hold for objects that the tests create from a class of the program, by names.py.
- A `with` block's error is suppressed only if nothing of the block is skipped.
"""

from __future__ import annotations

import abc
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from engine.verify.sandbox.inside.values import KINDS, plain_base

if TYPE_CHECKING:
    from engine.verify.sandbox.inside.peer import Peer


def _dunder(names: str) -> frozenset[str]:
    return frozenset(f"__{name}__" for name in names.split())


COMPARISONS = _dunder("eq ne lt le gt ge")
_ARITHMETIC = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod"
BINARY = _dunder(" ".join(f"{name} r{name} i{name}" for name in _ARITHMETIC.split()))
UNARY = _dunder("abs neg pos invert")  # give an object of the same kind
CONVERSIONS = _dunder("bool len iter next getitem reversed int float complex index hash round trunc floor ceil contains bytes length_hint")
SPECIAL = COMPARISONS | BINARY | UNARY | CONVERSIONS
SPECIAL |= _dunder("call str repr format setitem delitem enter exit missing dir fspath await aiter anext")
PREDICATES = frozenset(name for kind in (str, set) for name in dir(kind) if name.startswith(("is", "startswith", "endswith")))
PREDICATES |= {"difference", "symmetric_difference"}  # with which unittest compares sets
OF_CLASSES = ("__iter__", "__len__", "__getitem__", "__contains__", "__reversed__")  # of an enumeration, for example

Encode = Callable[[Any], Any]


class Rules(Protocol):
    """What the tests process knows about proxies, for the rules above."""

    def created(self, value: Any) -> bool: ...
    def is_opaque(self, value: Any) -> bool: ...
    def combined(self, result: Any, *operands: Any) -> Any: ...
    def suppresses(self, error: BaseException | None, trace: types.TracebackType | None) -> bool: ...


class Remote:
    """An object of the other process: a function, an instance, an iterator."""


def describe(cls: type, encode: Encode) -> list[Any]:
    """The arguments of `mirror`: name, module, bases, {special method: whether it is None}, attributes that hide one of a plain type."""
    known = [base for base in cls.__mro__ if base in KINDS.values() and base is not object]
    own = vars(cls)
    hiding = [name for name in own if not name.startswith("__") and any(hasattr(base, name) for base in known)]
    special = {name: own[name] is None for name in SPECIAL & own.keys()}
    return [cls.__name__, str(cls.__module__), [encode(base) for base in cls.__bases__], special, hiding]


def mirror(peer: Peer, name: str, module: str, bases: list[Any], special: dict[str, bool], hiding: list[str]) -> type:
    """The class of proxies for instances of a class of the other process."""
    same = _same_class(module, name)
    parents = [peer.decode(base) for base in bases]
    if same is not None and issubclass(same, BaseException):
        parents = [same]
    if not any(issubclass(parent, Remote) for parent in parents):
        parents = [*(parent for parent in parents if parent is not object), Remote]
    assert all(hidden.isidentifier() and not hidden.startswith("__") for hidden in hiding)
    assert all(method in SPECIAL for method in special)
    namespace: dict[str, Any] = {hidden: _attribute(peer, hidden) for hidden in hiding}
    namespace |= {"__module__": module, "__doc__": _Documentation(peer), "_peer": peer, **_attributes(peer)}
    for method, is_none in special.items():
        namespace[method] = None if is_none else _special(peer, method)
    if "__eq__" in special:
        namespace.setdefault("__hash__", None)
    if isinstance(same, abc.ABCMeta):
        cls = type.__new__(RemoteType, name, tuple(parents), namespace)
        same.register(cls)
        return cls
    if same is not None and not issubclass(same, BaseException):
        namespace["__class__"] = property(lambda self: same if type(self) is cls else type(self))
    cls = type.__new__(RemoteType, name, tuple(parents), namespace)
    return cls


def _same_class(module: str, name: str) -> type | None:
    """This process's class of that name in the standard library, if it is loaded."""
    found = None
    if module == "builtins":
        found = next((kind for kind in vars(types).values() if isinstance(kind, type) and kind.__name__ == name), None)
    elif (root := module.split(".")[0]) in sys.stdlib_module_names and root != "unittest":  # whose SkipTest would end a test as passed
        found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


class _Documentation:
    """`__doc__` of a class or an instance of the other process."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.peer.request("getattr", owner if instance is None else instance, "__doc__")


def _attribute(peer: Peer, name: str) -> property:
    return property(lambda self: peer.request("getattr", self, name))


def _attributes(peer: Peer) -> dict[str, Any]:
    """Attribute access and copying of every proxy."""

    def get(self: Any, name: str) -> Any:
        if peer.rules and name in PREDICATES and not peer.rules.created(self):
            raise AttributeError(f"{type(self).__name__} object has no attribute {name!r}")
        return peer.request("getattr", self, name)

    def set_(self: Any, name: str, value: Any) -> None:
        if name.startswith("__") and isinstance(self, BaseException):  # __traceback__, for example
            object.__setattr__(self, name, value)
        else:
            peer.request("setattr", self, name, value)

    return {
        "__getattr__": get,
        "__setattr__": set_,
        "__delattr__": lambda self, name: peer.request("delattr", self, name),
        "__dict__": _attribute(peer, "__dict__"),
        "__copy__": lambda self: peer.request("copy", self),
        "__deepcopy__": lambda self, memo: peer.request("deepcopy", self),
    }


def _special(peer: Peer, name: str) -> Callable[..., Any]:
    """A special method that asks the other process, as far as the rules allow."""

    def ask(self: Any, *arguments: Any, **named: Any) -> Any:
        return peer.request("special", name, self, *arguments, **named)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        return peer.call(self, *arguments, **named)

    if name == "__call__":
        return call
    return _ruled(peer.rules, name, ask) if peer.rules else ask


def _ruled(rules: Rules, name: str, ask: Callable[..., Any]) -> Callable[..., Any]:
    """`ask`, the special method that asks the other process, under the rules."""

    def compare(self: Any, other: Any) -> Any:
        return ask(self, other) if isinstance(other, Remote) else _locally(name, self, other)

    def combine(self: Any, *others: Any) -> Any:
        if plain_base(type(self)) is not object and not all(isinstance(other, Remote) for other in others):
            return _locally(name, self, *others)
        return rules.combined(ask(self, *others), self, *others)

    def unary(self: Any) -> Any:
        return rules.combined(ask(self), self)

    def convert(self: Any, *arguments: Any) -> Any:
        if rules.is_opaque(self):
            raise TypeError(f"{name} of a combination of a {type(self).__name__} with a plain value")
        return ask(self, *arguments)

    def contains(self: Any, item: Any) -> Any:
        if isinstance(item, Remote) or rules.created(self):
            return convert(self, item)
        if hasattr(plain_base(type(self)), name):
            return _locally(name, self, item)
        return any(item is each or item == each for each in self)

    def leave(self: Any, kind: Any, error: Any, trace: Any) -> bool:
        return bool(ask(self, kind, error, None)) and rules.suppresses(error, trace)

    if name in ("__contains__", "__exit__"):
        return contains if name == "__contains__" else leave
    kinds = ((COMPARISONS, compare), (BINARY, combine), (UNARY, unary), (CONVERSIONS, convert))
    return next((method for names, method in kinds if name in names), ask)


def _locally(name: str, value: Any, *others: Any) -> Any:
    """The special method of the plain type that `value` is of; of `object`, if of none."""
    method = getattr(plain_base(type(value)), name, None)
    return NotImplemented if method is None else method(value, *others)


class RemoteType(type):
    """The class of mirrors. Calls and attributes of a class are requests."""

    _peer: Peer

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> RemoteType:
        raise TypeError(f"a test derives {name} from a class of the program, which is not supported")

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        return cls._peer.call(cls, *arguments, **named)

    def __getattr__(cls, name: str) -> Any:
        return cls._peer.request("getattr", cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if name.startswith("__") or name.startswith("_abc"):
            type.__setattr__(cls, name, value)
        else:
            cls._peer.request("setattr", cls, name, value)

    def __delattr__(cls, name: str) -> None:
        cls._peer.request("delattr", cls, name)

    def __bool__(cls) -> bool:
        return True


def _of_class(name: str) -> Callable[..., Any]:
    return lambda cls, *arguments: cls._peer.request("special", name, cls, *arguments)


for _name in OF_CLASSES:
    setattr(RemoteType, _name, _of_class(_name))
