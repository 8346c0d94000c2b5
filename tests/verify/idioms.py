"""Everyday programs with tests that any Python programmer would write. Each is right and should pass, however values are kept apart.

IDIOMS: name -> (program, tests). UNSUPPORTED: the same for what docs/verifiers.md lists as not supported; these are judged wrong.
"""

IDIOMS: dict[str, tuple[str, str]] = {}
UNSUPPORTED: dict[str, tuple[str, str]] = {}


def _add(text: str, table: dict[str, tuple[str, str]]) -> None:
    for block in text.split("\n### ")[1:]:
        name, body = block.split("\n", 1)
        program, tests = body.split("\n---\n")
        assert name not in table
        table[name] = (program, tests.rstrip() + "\n")


_add(
    '''
### exception: subclass of ValueError caught as ValueError
class Bad(ValueError): pass
def f(): raise Bad("no")
---
try:
    f()
    assert False
except ValueError as e:
    assert str(e) == "no"
### exception: caught by its own name
class InsufficientFunds(Exception):
    def __init__(self, balance, amount):
        super().__init__(f"{balance} < {amount}")
        self.balance, self.amount = balance, amount
def pay(balance, amount):
    if amount > balance: raise InsufficientFunds(balance, amount)
---
try:
    pay(1, 5)
    raise AssertionError
except InsufficientFunds as e:
    assert (e.balance, e.amount) == (1, 5) and str(e) == "1 < 5"
### exception: KeyError.args
def f(): return {}["x"]
---
try:
    f()
except KeyError as e:
    assert e.args == ("x",) and e.args[0] == "x"
else:
    assert False
### exception: text of KeyError
def f(): return {}["x"]
---
try:
    f()
    assert False
except KeyError as e:
    assert str(e) == "'x'"
### exception: caught by the base class of a hierarchy
class AppError(Exception): pass
class NotFound(AppError): pass
def f(): raise NotFound("page")
---
try:
    f()
    assert False
except AppError as e:
    assert isinstance(e, NotFound) and type(e) is NotFound and type(e).__name__ == "NotFound"
### exception: two bases
class MissingKey(KeyError, AttributeError): pass
def f(): raise MissingKey("a")
---
for kind in (KeyError, AttributeError, LookupError):
    try:
        f()
        assert False
    except kind:
        pass
### exception: issubclass
class Bad(ValueError): pass
---
assert issubclass(Bad, ValueError) and issubclass(Bad, Exception) and not issubclass(Bad, KeyError)
### exception: raised by the test
class Bad(ValueError):
    def __init__(self, code): super().__init__(f"code {code}"); self.code = code
---
try:
    raise Bad(5)
except Bad as e:
    assert e.code == 5 and str(e) == "code 5"
### exception: __str__ of its own
class Bad(Exception):
    def __init__(self, x): self.x = x
    def __str__(self): return f"bad {self.x}"
def f(): raise Bad(3)
---
try:
    f()
    assert False
except Bad as e:
    assert str(e) == "bad 3"
### exception: cause
def f():
    try: {}["a"]
    except KeyError as e: raise ValueError("wrapped") from e
---
try:
    f()
    assert False
except ValueError as e:
    assert isinstance(e.__cause__, KeyError) and e.__cause__.args == ("a",)
### exception: assertRaises of unittest
class Bad(ValueError): pass
def f(x): raise Bad(x)
---
import unittest
case = unittest.TestCase()
with case.assertRaises(Bad) as caught:
    f(3)
assert caught.exception.args == (3,)
with case.assertRaisesRegex(ValueError, "3"):
    f(3)
### exception: SystemExit with a code
import sys
def f(): sys.exit(3)
---
try:
    f()
    assert False
except SystemExit as e:
    assert e.code == 3
### exception: exit()
def f(): exit(2)
---
try:
    f()
    assert False
except SystemExit as e:
    assert e.code == 2
### exception: FrozenInstanceError
from dataclasses import dataclass
@dataclass(frozen=True)
class P:
    x: int
---
from dataclasses import FrozenInstanceError
p = P(1)
try:
    p.x = 2
    assert False
except FrozenInstanceError:
    pass
assert p.x == 1
### exception: JSONDecodeError
import json
def load(text): return json.loads(text)
---
import json
try:
    load("{")
    assert False
except json.JSONDecodeError as e:
    assert e.pos == 1
### exception: in a callback of the test, through the program
def retry(function, times):
    for _ in range(times - 1):
        try: return function()
        except ConnectionError: pass
    return function()
---
calls = []
def flaky():
    calls.append(1)
    if len(calls) < 3:
        raise ConnectionError("again")
    return "done"
assert retry(flaky, 5) == "done" and len(calls) == 3
### exception: of the test, through the program and back
def apply(function): return function()
---
class Mine(Exception): pass
def fail(): raise Mine("x", 1)
try:
    apply(fail)
    assert False
except Mine as e:
    assert e.args == ("x", 1)
### exception: FileNotFoundError
def f(): open("/tmp/missing")
---
import errno
try:
    f()
    assert False
except FileNotFoundError as e:
    assert e.errno == errno.ENOENT
### exception: kept and returned
def f(x):
    try: return int(x)
    except ValueError as e: return e
---
assert isinstance(f("a"), ValueError) and f("3") == 3
### date: returned
from datetime import date
def f(): return date(2024, 2, 29)
---
from datetime import date
assert f() == date(2024, 2, 29) and f().weekday() == 3 and f().isoformat() == "2024-02-29"
### date: arithmetic
from datetime import date, timedelta
def add(d, n): return d + timedelta(days=n)
---
import datetime
assert add(datetime.date(2024, 2, 28), 2) == datetime.date(2024, 3, 1)
assert add(datetime.date(2024, 1, 2), 1) - datetime.date(2024, 1, 1) == datetime.timedelta(2)
### timedelta: total_seconds
from datetime import datetime
def between(a, b): return b - a
---
from datetime import datetime
assert between(datetime(2024, 1, 1), datetime(2024, 1, 2)).total_seconds() == 86400
### datetime: time zone
from datetime import datetime, timezone, timedelta
def f(): return datetime(2024, 1, 1, 12, 30, tzinfo=timezone(timedelta(hours=2)))
---
from datetime import datetime, timezone
assert f() == datetime(2024, 1, 1, 10, 30, tzinfo=timezone.utc) and f().utcoffset().total_seconds() == 7200
### datetime: time of day
from datetime import time
def f(): return time(9, 5)
---
from datetime import time
assert f() == time(9, 5) and f() < time(10)
### namedtuple: attributes
from collections import namedtuple
Point = namedtuple("Point", "x y")
def f(): return Point(1, 2)
---
p = f()
assert p.x == 1 and p.y == 2 and p == (1, 2) and p[0] == 1 and len(p) == 2
x, y = p
assert (x, y) == (1, 2)
### namedtuple: methods and text
from collections import namedtuple
Point = namedtuple("Point", "x y")
---
p = Point(1, y=2)
assert p._asdict() == {"x": 1, "y": 2} and p._replace(x=5) == Point(5, 2) and Point._fields == ("x", "y")
assert repr(p) == "Point(x=1, y=2)" and isinstance(p, tuple) and isinstance(p, Point)
### NamedTuple: method and operator of its own
from typing import NamedTuple
class Vec(NamedTuple):
    x: int
    y: int = 0
    def norm(self): return self.x ** 2 + self.y ** 2
    def __add__(self, other): return Vec(self.x + other.x, self.y + other.y)
---
assert Vec(3, 4).norm() == 25 and Vec(1, 2) + Vec(3, 4) == Vec(4, 6) and Vec(1).y == 0
### Counter: most_common
from collections import Counter
def f(s): return Counter(s)
---
c = f("banana")
assert c.most_common(1) == [("a", 3)] and c["z"] == 0 and sum(c.values()) == 6 and sorted(c.elements())[0] == "a"
### Counter: arithmetic
from collections import Counter
def f(s): return Counter(s)
---
from collections import Counter
assert f("aab") - f("a") == Counter("ab") and f("a") + f("b") == Counter("ab") and f("aab") & f("ab") == Counter("ab")
### defaultdict: factory
from collections import defaultdict
def group(words):
    d = defaultdict(list)
    for w in words: d[w[0]].append(w)
    return d
---
d = group(["ab", "ac", "b"])
assert d == {"a": ["ab", "ac"], "b": ["b"]} and d["z"] == [] and "z" in d
### OrderedDict: order
from collections import OrderedDict
def f(): return OrderedDict([("b", 1), ("a", 2)])
---
d = f()
assert list(d) == ["b", "a"] and d.popitem(last=False) == ("b", 1)
d["c"] = 3
d.move_to_end("a")
assert list(d.items()) == [("c", 3), ("a", 2)]
### deque: maxlen and rotate
from collections import deque
def last(n, xs): return deque(xs, maxlen=n)
---
d = last(3, range(5))
assert list(d) == [2, 3, 4] and d.maxlen == 3
d.rotate(1)
d.append(9)
assert list(d) == [2, 3, 9]
### lru_cache: cache_info
from functools import lru_cache
@lru_cache(maxsize=None)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
---
assert fib(20) == 6765 and fib.cache_info().hits == 18 and fib.cache_info().misses == 21
fib.cache_clear()
assert fib.cache_info().currsize == 0
### Decimal: exact
from decimal import Decimal
def price(x): return Decimal(x) * 3
---
from decimal import Decimal
assert price("0.10") == Decimal("0.30") and str(price("0.10")) == "0.30" and price("1").quantize(Decimal("0.01")) == 3
### Fraction: parts
from fractions import Fraction
def half(x): return Fraction(x) / 2
---
assert half(3).numerator == 3 and half(3).denominator == 2 and half(3) + 1 == 2.5
### complex
def roots(): return [1j, -1j]
---
assert roots()[0] ** 2 == -1 and roots()[1].conjugate() == 1j and abs(roots()[0]) == 1
### bytes and bytearray
def f(s): return s.encode(), bytearray(s.encode())
---
a, b = f("hi")
assert a == b"hi" and a.hex() == "6869" and b == bytearray(b"hi")
b.append(33)
assert bytes(b) == b"hi!"
### range
def f(n): return range(0, n, 2)
---
assert f(6) == range(0, 6, 2) and list(f(6)) == [0, 2, 4] and 4 in f(6) and len(f(6)) == 3
### frozenset in a set
def f(): return {frozenset({1, 2}), frozenset({3})}
---
assert f() == {frozenset({2, 1}), frozenset({3})} and frozenset({3}) in f()
### UUID and Path
import uuid
from pathlib import Path
def f(): return uuid.UUID(int=5), Path("a") / "b.txt"
---
u, p = f()
assert u.int == 5 and p.suffix == ".txt" and str(p) == "a/b.txt" and p.parent.name == "a"
### dict views
class Store:
    def __init__(self): self.d = {"a": 1, "b": 2}
    def keys(self): return self.d.keys()
    def items(self): return self.d.items()
---
s = Store()
assert s.keys() == {"a", "b"} and sorted(s.items()) == [("a", 1), ("b", 2)] and "a" in s.keys() and len(s.keys()) == 2
### vector: times a number
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    __rmul__ = __mul__
    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)
---
v = Vector(1, 2)
assert v * 3 == Vector(3, 6) and 3 * v == Vector(3, 6) and (v * 3).x == 3
### vector: negative
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __neg__(self): return Vector(-self.x, -self.y)
    def __pos__(self): return self
    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** .5
    def __invert__(self): return Vector(self.y, self.x)
---
v = -Vector(3, 4)
assert (v.x, v.y) == (-3, -4) and abs(v) == 5 and (~v).x == -4 and (+v).y == -4
### vector: division and other operators
class N:
    def __init__(self, v): self.v = v
    def __truediv__(self, o): return N(self.v / o.v)
    def __floordiv__(self, o): return N(self.v // o.v)
    def __mod__(self, o): return N(self.v % o.v)
    def __pow__(self, o): return N(self.v ** o.v)
    def __matmul__(self, o): return self.v * o.v
---
assert (N(7) / N(2)).v == 3.5 and (N(7) // N(2)).v == 3 and (N(7) % N(2)).v == 1 and (N(7) ** N(2)).v == 49 and N(2) @ N(3) == 6
### operators of sets
class Bag:
    def __init__(self, *xs): self.xs = set(xs)
    def __or__(self, o): return Bag(*(self.xs | o.xs))
    def __and__(self, o): return Bag(*(self.xs & o.xs))
    def __xor__(self, o): return Bag(*(self.xs ^ o.xs))
    def __eq__(self, o): return self.xs == o.xs
---
assert Bag(1, 2) | Bag(3) == Bag(1, 2, 3) and Bag(1, 2) & Bag(2) == Bag(2) and Bag(1, 2) ^ Bag(2, 3) == Bag(1, 3)
### in-place operator
class Account:
    def __init__(self): self.total = 0
    def __iadd__(self, n): self.total += n; return self
---
a = b = Account()
a += 5
a += 6
assert a.total == 11 and a is b
### operator with a number on an object made by the test
class Money:
    def __init__(self, n): self.n = n
    def __add__(self, k): return Money(self.n + k)
    def __float__(self): return float(self.n)
    def __int__(self): return self.n
    def __index__(self): return self.n
    def __round__(self, digits=0): return round(self.n, digits)
---
m = Money(5) + 3
assert m.n == 8 and float(m) == 8.0 and int(m) == 8 and [0] * m == [0] * 8 and round(m) == 8
### sum of objects
class Money:
    def __init__(self, n): self.n = n
    def __add__(self, o): return Money(self.n + o.n)
    def __radd__(self, o): return self if o == 0 else self + o
---
assert sum([Money(1), Money(2), Money(3)]).n == 6
### hash
class P:
    def __init__(self, x): self.x = x
    def __eq__(self, o): return isinstance(o, P) and self.x == o.x
    def __hash__(self): return hash(self.x)
---
assert hash(P(1)) == hash(P(1)) and len({P(1), P(1), P(2)}) == 2 and {P(1): "a"}[P(1)] == "a"
### unhashable
from dataclasses import dataclass
@dataclass
class P:
    x: int
---
try:
    hash(P(1))
    assert False
except TypeError:
    pass
### order
from functools import total_ordering
@total_ordering
class V:
    def __init__(self, n): self.n = n
    def __eq__(self, o): return self.n == o.n
    def __lt__(self, o): return self.n < o.n
---
assert V(1) < V(2) and V(2) >= V(1) and sorted([V(3), V(1)])[0].n == 1 and max(V(1), V(5)).n == 5 and not V(1) > V(2)
### in: an object with __contains__
class Trie:
    def __init__(self): self.words = set()
    def insert_word(self, w): self.words.add(w)
    def __contains__(self, w): return w in self.words
---
t = Trie()
t.insert_word("apple")
assert "apple" in t and "app" not in t
### in: an object with __iter__
class Ring:
    def __init__(self, n): self.n = n
    def __iter__(self): return iter(range(self.n))
---
assert 3 in Ring(5) and 7 not in Ring(5) and list(Ring(3)) == [0, 1, 2]
### del item and del attribute
class Box:
    def __init__(self): self.d = {"a": 1}; self.size = 3
    def __delitem__(self, k): del self.d[k]
    def __getitem__(self, k): return self.d[k]
    def __setitem__(self, k, v): self.d[k] = v
    def __len__(self): return len(self.d)
---
b = Box()
b["x"] = [1]
del b["a"]
del b.size
assert len(b) == 1 and b["x"] == [1] and not hasattr(b, "size")
### slices
class Seq:
    def __init__(self, xs): self.xs = list(xs)
    def __getitem__(self, i): return Seq(self.xs[i]) if isinstance(i, slice) else self.xs[i]
    def __setitem__(self, i, v): self.xs[i] = v
    def __len__(self): return len(self.xs)
---
s = Seq(range(5))
assert s[1:3].xs == [1, 2] and s[-1] == 4 and s[::-1].xs == [4, 3, 2, 1, 0]
s[0:2] = [9]
assert s.xs == [9, 2, 3, 4]
### matrix index
class Matrix:
    def __init__(self, rows): self.rows = rows
    def __getitem__(self, ij): return self.rows[ij[0]][ij[1]]
    def __matmul__(self, o): return Matrix([[sum(a * b for a, b in zip(r, c)) for c in zip(*o.rows)] for r in self.rows])
---
m = Matrix([[1, 2], [3, 4]])
assert m[1, 0] == 3 and (m @ m)[0, 0] == 7
### with
class Timer:
    def __enter__(self): self.log = ["in"]; return self
    def __exit__(self, *error): self.log.append("out" if error[0] is None else error[0].__name__)
---
with Timer() as t:
    assert t.log == ["in"]
assert t.log == ["in", "out"]
try:
    with Timer() as t:
        raise KeyError("x")
except KeyError:
    pass
assert t.log == ["in", "KeyError"]
### with: contextmanager
from contextlib import contextmanager
log = []
@contextmanager
def tag(name):
    log.append(f"<{name}>")
    yield name
    log.append(f"</{name}>")
---
with tag("b") as name:
    log.append(name)
assert log == ["<b>", "b", "</b>"]
### with: suppresses an error
class Suppress:
    def __init__(self, *kinds): self.kinds = kinds
    def __enter__(self): return self
    def __exit__(self, kind, error, trace): return kind is not None and issubclass(kind, self.kinds)
---
with Suppress(ZeroDivisionError):
    1 / 0
with Suppress(ValueError):
    raise ValueError("x")
try:
    with Suppress(ValueError):
        raise KeyError("y")
    assert False
except KeyError:
    pass
### issubclass and isinstance
class A: pass
class B(A): pass
---
assert issubclass(B, A) and not issubclass(A, B) and isinstance(B(), A) and not isinstance(A(), B) and not isinstance(3, A)
### abstract class
from abc import ABC, abstractmethod
class Shape(ABC):
    @abstractmethod
    def area(self): ...
class Square(Shape):
    def __init__(self, s): self.s = s
    def area(self): return self.s ** 2
---
assert Square(3).area() == 9 and isinstance(Square(1), Shape) and issubclass(Square, Shape)
try:
    Shape()
    assert False
except TypeError:
    pass
### is: sentinel
MISSING = object()
def get(d, k): return d.get(k, MISSING)
---
assert get({}, "a") is MISSING and get({"a": 1}, "a") is not MISSING
### is: singleton class
class Config:
    _one = None
    def __new__(cls):
        if cls._one is None: cls._one = super().__new__(cls)
        return cls._one
---
assert Config() is Config()
a, b = Config(), Config()
a.level = 5
assert b.level == 5
### is: None, True, NotImplemented, Ellipsis
def f(): return None, True, NotImplemented, ...
---
a, b, c, d = f()
assert a is None and b is True and c is NotImplemented and d is ...
### is: the same list is returned
def sort_in_place(xs): xs.sort(); return xs
def sorted_copy(xs): return sorted(xs)
---
xs = [3, 1, 2]
assert sorted_copy(xs) is not xs and xs == [3, 1, 2]
assert sort_in_place(xs) is xs and xs == [1, 2, 3]
### type(x)
class A: pass
def make(): return A()
---
assert type(make()) is A and type(make()) == A and type(make()).__name__ == "A" and make().__class__ is A
### type of plain results
def f(): return [1, 2.0, "a", (), {}, set(), None, True, b""]
---
assert [type(x) for x in f()] == [int, float, str, tuple, dict, set, type(None), bool, bytes]
### class defined by the test: attributes read
def total(items): return sum(i.price * i.count for i in items)
---
class Item:
    def __init__(self, price, count): self.price, self.count = price, count
assert total([Item(2, 3), Item(5, 1)]) == 11
### class defined by the test: attributes set, identity
def link(a, b): a.next = b; return a
---
class Node:
    def __init__(self, v): self.v, self.next = v, None
a, b = Node(1), Node(2)
assert link(a, b) is a and a.next is b and a.next.v == 2
### class defined by the test: linked list and tree
def reverse(head):
    before = None
    while head: head.next, before, head = before, head, head.next
    return before
def depth(t): return 0 if t is None else 1 + max(depth(t.left), depth(t.right))
---
class Node:
    def __init__(self, v, next=None): self.v, self.next = v, next
class Tree:
    def __init__(self, left=None, right=None): self.left, self.right = left, right
head, seen = reverse(Node(1, Node(2, Node(3)))), []
while head:
    seen.append(head.v)
    head = head.next
assert seen == [3, 2, 1] and depth(Tree(Tree(), Tree(None, Tree()))) == 3
### class defined by the test: operators used by the program
def top(xs): return sorted(xs)[-1], sum(xs[1:], xs[0])
---
class M:
    def __init__(self, n): self.n = n
    def __lt__(self, o): return self.n < o.n
    def __add__(self, o): return M(self.n + o.n)
a, b = top([M(1), M(5), M(2)])
assert a.n == 5 and b.n == 8
### class defined by the test: dataclass
def older(p): return type(p)(p.name, p.age + 1)
---
from dataclasses import dataclass
@dataclass
class Person:
    name: str
    age: int
assert older(Person("a", 1)) == Person("a", 2)
### class defined by the test: passed as a class
def build(cls, rows): return [cls(*row) for row in rows]
---
class P:
    def __init__(self, x, y): self.x, self.y = x, y
ps = build(P, [(1, 2), (3, 4)])
assert [p.x for p in ps] == [1, 3] and isinstance(ps[0], P)
### class defined by the test: observer
class Subject:
    def __init__(self): self.seen = []
    def attach(self, o): self.seen.append(o)
    def notify(self, *a): [o.update(*a) for o in self.seen]
---
class Logger:
    def __init__(self): self.log = []
    def update(self, event): self.log.append(event)
s, l = Subject(), Logger()
s.attach(l)
s.notify("x")
s.notify("y")
assert l.log == ["x", "y"]
### class defined by the test: file-like
def copy(source, target): target.write(source.read().upper())
---
import io
out = io.StringIO()
copy(io.StringIO("abc"), out)
assert out.getvalue() == "ABC"
### iterator as an argument
def take(n, xs): return [x for x, _ in zip(xs, range(n))]
---
import itertools
assert take(3, itertools.count()) == [0, 1, 2] and take(2, iter("abc")) == ["a", "b"] and take(5, (x * x for x in [1, 2])) == [1, 4]
### map, filter and zip as arguments
def total(xs): return sum(xs)
---
assert total(map(int, "123")) == 6 and total(filter(None, [0, 1])) == 1 and sum(a for a, _ in zip([1], [2])) == 1
### iterator of the program
class Count:
    def __init__(self, n): self.n = n
    def __iter__(self): return self
    def __next__(self):
        if self.n == 0: raise StopIteration
        self.n -= 1
        return self.n
---
c = Count(3)
assert next(c) == 2 and list(c) == [1, 0] and next(c, "end") == "end"
try:
    next(c)
    assert False
except StopIteration:
    pass
### generator: send and close
def average():
    total = n = 0
    value = None
    while True:
        x = yield value
        total += x; n += 1
        value = total / n
---
g = average()
next(g)
assert g.send(10) == 10 and g.send(20) == 15
g.close()
### generator: isinstance
def f(n):
    for i in range(n): yield i
---
import types, inspect
from collections.abc import Iterator, Generator
assert isinstance(f(1), types.GeneratorType) and inspect.isgenerator(f(1)) and isinstance(f(1), Iterator) and isinstance(f(1), Generator)
### generator: endless
def primes():
    n = 2
    while True:
        if all(n % d for d in range(2, n)): yield n
        n += 1
---
from itertools import islice, takewhile
assert list(islice(primes(), 4)) == [2, 3, 5, 7] and list(takewhile(lambda p: p < 6, primes())) == [2, 3, 5]
### lambda as an argument
def compose(f, g): return lambda x: f(g(x))
---
assert compose(lambda x: x + 1, lambda x: x * 2)(5) == 11
### lambda as key
def by(xs, key, reverse=False): return sorted(xs, key=key, reverse=reverse)
---
assert by(["bb", "a"], key=lambda s: len(s)) == ["a", "bb"] and by([1, 3], key=lambda x: x, reverse=True) == [3, 1]
### keyword callback
def run(items, on_item=None, on_done=None):
    for i in items: on_item(value=i, index=i)
    on_done()
---
seen = []
run([1, 2], on_item=lambda value, index: seen.append((value, index)), on_done=lambda: seen.append("done"))
assert seen == [(1, 1), (2, 2), "done"]
### standard functions as arguments
def reduce_all(f, xs, start):
    for x in xs: start = f(start, x)
    return start
---
import operator, math
assert reduce_all(operator.mul, [2, 3], 1) == 6 and reduce_all(max, [2, 3], 1) == 3 and reduce_all(math.gcd, [12, 18], 0) == 6
### bound method and partial as arguments
def each(f, xs): return [f(x) for x in xs]
---
from functools import partial
out = []
each(out.append, [1, 2])
assert out == [1, 2] and each(partial(pow, 2), [3, 4]) == [8, 16] and each(str.upper, ["a"]) == ["A"] and each({"a": 1}.get, ["a"]) == [1]
### decorator of the program on a function of the test
import functools
def twice(f):
    @functools.wraps(f)
    def inner(*a, **k): return [f(*a, **k), f(*a, **k)]
    return inner
---
@twice
def hello(name, mark="!"):
    """Says hello."""
    return name + mark
assert hello("a", mark="?") == ["a?", "a?"] and hello.__name__ == "hello" and hello.__doc__ == "Says hello."
### decorator with state
def counted(f):
    def inner(*a):
        inner.calls += 1
        return f(*a)
    inner.calls = 0
    return inner
---
@counted
def g(x): return x
g(1), g(2)
assert g.calls == 2
g.calls = 0
assert g.calls == 0
### memoize a function of the test
def memoize(f):
    cache = {}
    def inner(*a):
        if a not in cache: cache[a] = f(*a)
        return cache[a]
    inner.cache = cache
    return inner
---
calls = []
@memoize
def slow(x):
    calls.append(x)
    return x * x
assert slow(3) == 9 and slow(3) == 9 and calls == [3] and slow.cache == {(3,): 9}
### closure with state
def counter():
    n = 0
    def inc():
        nonlocal n
        n += 1
        return n
    return inc
---
c, d = counter(), counter()
assert [c(), c(), d()] == [1, 2, 1]
### curry
def curry(f, n): return f if n == 0 else lambda *a: curry(lambda *b: f(*a, *b), n - 1) if n > 1 else f(*a)
---
assert curry(lambda a, b, c: a + b + c, 3)(1)(2)(3) == 6
### stdout: redirect_stdout
def hello(name): print("Hello", name)
---
import io
from contextlib import redirect_stdout
out = io.StringIO()
with redirect_stdout(out):
    hello("Ann")
    print("and me")
assert out.getvalue() == "Hello Ann\\nand me\\n"
### stdout: replaced
import sys
def show(): sys.stdout.write("x\\n"); print("y", file=sys.stderr)
---
import io, sys
old, sys.stdout = sys.stdout, io.StringIO()
show()
text, sys.stdout = sys.stdout.getvalue(), old
assert text == "x\\n"
### stdout: of a method, between values
class Stack:
    def __init__(self): self.xs = []
    def push_all(self, *xs):
        for x in xs: print(f"push {x}"); self.xs.append(x)
---
import contextlib, io
s = Stack()
with contextlib.redirect_stdout(io.StringIO()) as out:
    s.push_all(1, 2)
assert out.getvalue().splitlines() == ["push 1", "push 2"] and s.xs == [1, 2]
### print to a file of the test
def report(out): print("a", 1, sep="-", file=out)
---
import io
out = io.StringIO()
report(out)
assert out.getvalue() == "a-1\\n"
### global: number after a call
count = 0
def inc():
    global count
    count += 1
---
assert count == 0
inc()
inc()
assert count == 2
### global: list after a call
log = []
def add(x): log.append(x)
---
add(1)
add([2])
assert log == [1, [2]]
log.clear()
add(3)
assert log == [3]
### global: rebound
state = {"on": False}
def switch():
    global state
    state = {"on": True}
---
switch()
assert state == {"on": True}
### constant and helper
LIMIT = 10
def helper(x): return min(x, LIMIT)
def f(x): return helper(x) * 2
---
assert f(20) == 2 * LIMIT and helper(3) == 3
### helper named like a builtin
def sum(xs):
    total = 0
    for x in xs: total += x
    return total
def mean(xs): return sum(xs) / len(xs)
---
assert mean([1, 2, 3]) == 2 and sum([1, 2]) == 3
### the function itself is named like a builtin
def max(a, b): return a if a > b else b
---
assert max(1, 2) == 2
assert max(5, 2) == 5
### callable
class A:
    def method(self): pass
class B:
    def __call__(self): return 1
---
assert not callable(A()) and callable(A().method) and callable(B()) and callable(A) and B()() == 1
### hasattr
class A:
    x = 1
    def __init__(self): self.y = 2
---
a = A()
assert hasattr(a, "x") and hasattr(a, "y") and not hasattr(a, "z") and hasattr(A, "x") and not hasattr(A, "y")
assert not hasattr(a, "__len__") and not hasattr(a, "__iter__") and getattr(a, "z", 5) == 5
### isinstance with abstract classes
class Bag:
    def __init__(self): self.xs = []
    def __len__(self): return len(self.xs)
    def __iter__(self): return iter(self.xs)
    def __contains__(self, x): return x in self.xs
class Plain: pass
---
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sized
assert isinstance(Bag(), Sized) and isinstance(Bag(), Iterable) and isinstance(Bag(), Collection) and not isinstance(Bag(), Callable)
assert not isinstance(Plain(), Iterable) and not isinstance(Bag(), Iterator) and isinstance(Plain(), Hashable) and not Bag()
### derived from an abstract collection
from collections.abc import MutableMapping
class Lower(MutableMapping):
    def __init__(self): self.d = {}
    def __getitem__(self, k): return self.d[k.lower()]
    def __setitem__(self, k, v): self.d[k.lower()] = v
    def __delitem__(self, k): del self.d[k.lower()]
    def __iter__(self): return iter(self.d)
    def __len__(self): return len(self.d)
---
from collections.abc import Mapping
m = Lower()
m["A"] = 1
assert m["a"] == 1 and dict(m) == {"a": 1} and isinstance(m, Mapping) and m.get("B", 0) == 0 and list(m.items()) == [("a", 1)]
### derived from list
class Stack(list):
    def push(self, x): self.append(x)
    def peek(self): return self[-1]
---
s = Stack()
s.push(1)
s.push(2)
assert s == [1, 2] and s.peek() == 2 and s.pop() == 2 and len(s) == 1 and isinstance(s, list)
s.append(7)
assert s.peek() == 7 and s[0] == 1
### derived from dict
class Attr(dict):
    def __getattr__(self, k): return self[k]
    def __missing__(self, k): return k * 2
---
d = Attr(a=1)
d["b"] = 2
assert d.a == 1 and d.b == 2 and d == {"a": 1, "b": 2} and d["cc"] == "cccc"
### derived from int and str
class Celsius(float):
    @property
    def fahrenheit(self): return self * 9 / 5 + 32
class Name(str):
    def initials(self): return "".join(w[0] for w in self.split())
---
assert Celsius(100).fahrenheit == 212 and Celsius(5) == 5.0 and Name("Ann Lee").initials() == "AL" and Name("x").upper() == "X"
### enumeration
from enum import Enum
class Color(Enum):
    RED = 1
    BLUE = "b"
    def hot(self): return self is Color.RED
---
assert Color.RED.name == "RED" and Color("b") is Color.BLUE and Color["RED"] is Color.RED and Color.RED.hot()
assert [c.value for c in Color] == [1, "b"] and len(Color) == 2 and Color.RED != Color.BLUE and isinstance(Color.RED, Color)
assert {Color.RED: 5}[Color(1)] == 5 and repr(Color.RED) == "<Color.RED: 1>"
### IntEnum
from enum import IntEnum
class Level(IntEnum):
    LOW = 1
    HIGH = 3
def level(): return Level.HIGH
---
assert level() == 3 and level() is Level.HIGH and level() > Level.LOW and level() + 1 == 4 and level().name == "HIGH"
### dataclass
from dataclasses import dataclass, field
@dataclass(order=True)
class Task:
    priority: int
    name: str = field(compare=False, default="")
    tags: list = field(default_factory=list)
---
t = Task(1, "a")
t.tags.append("x")
assert t == Task(1, "b", ["x"]) and t < Task(2) and repr(t) == "Task(priority=1, name='a', tags=['x'])" and t.tags == ["x"]
import dataclasses
### property and setter
class T:
    def __init__(self): self._c = 0
    @property
    def c(self): return self._c
    @c.setter
    def c(self, v):
        if v < -273: raise ValueError("too cold")
        self._c = v
---
t = T()
t.c = 5
assert t.c == 5
try:
    t.c = -300
    assert False
except ValueError as e:
    assert "cold" in str(e)
### class attribute, classmethod, staticmethod
class Dog:
    count = 0
    def __init__(self, name): self.name = name; Dog.count += 1
    @classmethod
    def parse(cls, text): return cls(text.strip())
    @staticmethod
    def bark(n): return "wow" * n
---
assert Dog.count == 0 and Dog.parse(" a ").name == "a" and Dog.count == 1 and Dog.bark(2) == "wowwow" and isinstance(Dog.parse("b"), Dog)
Dog.count = 10
assert Dog("c").count == 11
### text of objects
class P:
    def __init__(self, x): self.x = x
    def __repr__(self): return f"P({self.x})"
    def __str__(self): return f"p{self.x}"
    def __format__(self, spec): return f"{self.x:{spec or 'd'}}"
---
assert repr(P(1)) == "P(1)" and str(P(2)) == "p2" and f"{P(3):03d}" == "003" and f"{P(4)!r}" == "P(4)" and repr([P(5)]) == "[P(5)]"
### truth of objects
class Flag:
    def __init__(self, on): self.on = on
    def __bool__(self): return self.on
class Plain: pass
---
assert Flag(True) and not Flag(False) and Plain()
### nested structures changed in place
def clear_row(grid, i):
    for j in range(len(grid[i])): grid[i][j] = 0
---
row = [1, 2]
grid = [row, [3, 4]]
clear_row(grid, 0)
assert grid == [[0, 0], [3, 4]] and row == [0, 0] and grid[0] is row
### attribute that is a list, changed by the test
class Cart:
    def __init__(self): self.items = []
    def total(self): return sum(self.items)
---
c = Cart()
c.items.append(3)
c.items += [4]
assert c.total() == 7 and c.items == [3, 4]
### list kept by the program, changed by the test
class Keep:
    def __init__(self, xs): self.xs = xs
    def size(self): return len(self.xs)
---
xs = [1]
k = Keep(xs)
xs.append(2)
assert k.size() == 2 and k.xs is xs
### cycles
def loop():
    a = [1]
    a.append(a)
    return a
---
a = loop()
assert a[1] is a and a[1][1][0] == 1
### graph of program objects
class Node:
    def __init__(self, v): self.v, self.children, self.parent = v, [], None
    def add(self, c): c.parent = self; self.children.append(c); return c
---
root = Node(1)
child = root.add(Node(2))
assert child.parent is root and root.children == [child] and root.children[0] is child and root.parent is None
### copy and deepcopy
class P:
    def __init__(self): self.xs = [1]
---
import copy
p = P()
q, r = copy.copy(p), copy.deepcopy(p)
p.xs.append(2)
assert q.xs == [1, 2] and r.xs == [1] and q is not p and isinstance(r, P)
### vars and __dict__
class P:
    def __init__(self): self.a, self.b = 1, 2
---
assert vars(P()) == {"a": 1, "b": 2} and P().__dict__["a"] == 1 and "a" in dir(P())
### documentation and name of a function
def f(x):
    """Doubles."""
    return 2 * x
class C:
    """A class."""
---
assert f.__doc__ == "Doubles." and f.__name__ == "f" and C.__doc__ == "A class." and C.__name__ == "C"
### coroutine
import asyncio
async def fetch(x):
    await asyncio.sleep(0)
    return x + 1
---
import asyncio
async def main(): return await asyncio.gather(fetch(1), fetch(2))
assert asyncio.run(fetch(1)) == 2 and asyncio.run(main()) == [2, 3]
### threads of the program
import threading
class Safe:
    def __init__(self): self.n, self.lock = 0, threading.Lock()
    def inc(self):
        with self.lock: self.n += 1
def run(s, k):
    ts = [threading.Thread(target=s.inc) for _ in range(k)]
    [t.start() for t in ts]; [t.join() for t in ts]
---
s = Safe()
run(s, 5)
assert s.n == 5
### json of results
def f(): return {"a": [1, None, True], "b": {"c": 1.5}}
---
import json
assert json.dumps(f(), sort_keys=True) == '{"a": [1, null, true], "b": {"c": 1.5}}'
### match of a regular expression
import re
def find(s): return re.search(r"(\\d+)-(\\d+)", s)
---
m = find("a 12-34")
assert m and m.group(1) == "12" and m.groups() == ("12", "34") and m.span() == (2, 7) and find("x") is None
### keyword and default arguments
def f(a, /, b=2, *args, c, **kw): return a, b, args, c, kw
---
assert f(1, c=3) == (1, 2, (), 3, {}) and f(1, 5, 6, c=7, d=8) == (1, 5, (6,), 7, {"d": 8})
try:
    f()
    assert False
except TypeError:
    pass
### near equality
def root(x): return x ** 0.5
---
import math
assert abs(root(2) - 1.41421356) < 1e-6 and math.isclose(root(2) ** 2, 2) and round(root(2), 2) == 1.41
### linked classes of two kinds
class Engine:
    def __init__(self, power): self.power = power
class Car:
    def __init__(self, engine): self.engine = engine
    def faster(self, other): return self.engine.power > other.engine.power
---
a, b = Car(Engine(5)), Car(Engine(3))
assert a.faster(b) and not b.faster(a) and a.engine.power == 5
b.engine = a.engine
assert b.engine is a.engine
### signature of a function
def f(a, b=2): pass
---
import inspect
assert list(inspect.signature(f).parameters) == ["a", "b"]
''',
    IDIOMS,
)

_add(
    """
### comparison of an object with a plain value
class Money:
    def __init__(self, n): self.n = n
    def __eq__(self, o): return self.n == (o.n if isinstance(o, Money) else o)
---
assert Money(5) == 5
### plain result of an operator with a plain value, of an object that a function returned
class Money:
    def __init__(self, n): self.n = n
    def __sub__(self, k): return self.n - k
def make(): return Money(5)
---
assert make() - 3 == 2
### class of the test that derives from a class of the program
class Animal:
    def speak(self): return self.sound()
---
class Dog(Animal):
    def sound(self): return "wow"
assert Dog().speak() == "wow"
### input and patches
def f(): return int(input())
---
from unittest.mock import patch
with patch("builtins.input", return_value="5"):
    assert f() == 5
### isinstance with Enum
from enum import Enum
class Color(Enum):
    RED = 1
---
from enum import Enum
assert isinstance(Color.RED, Enum)
""",
    UNSUPPORTED,
)
