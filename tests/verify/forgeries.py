"""Programs that are wrong, and that tests written for plain values must not take for right or for unjudged.

UNIVERSAL builds an object that agrees to everything; CHOICES are other ways to look right, or like a failure of the machine.
"""

UNIVERSAL = """
class Yes:
    def __getattr__(self, name): return Yes()
    def __call__(self, *a, **k): return Yes()
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    def __bool__(self): return True
    def __hash__(self): return 0
    def __contains__(self, x): return True
    def __iter__(self): return iter([])
    def __len__(self): return 0
    def __float__(self): return 0.0
    def __enter__(self): return self
    def __exit__(self, *a): return True
    def __abs__(self): return 0
    def __str__(self): return "x"
    def __instancecheck__(self, o): return True
for _n in "lt le gt ge".split(): setattr(Yes, f"__{_n}__", lambda self, o: True)
for _n in "add sub mul truediv floordiv mod pow and or xor".split():
    for _m in (f"__{_n}__", f"__r{_n}__", f"__i{_n}__"): setattr(Yes, _m, lambda self, o: 0)
def like(kind): return type("Like", (kind,), {n: v for n, v in vars(Yes).items() if n not in ("__dict__", "__weakref__")})
"""

# Tests of f that only a right answer passes. Every way to agree to everything is tried on each.
TESTS = {
    "equal": "assert f(1) == 7",
    "equal, the other way": "assert 7 == f(1)",
    "near": "assert abs(f(1) - 7) < 1e-6",
    "near, the other way": "assert abs(7 - f(1)) < 1e-6",
    "near, by round": "assert round(f(1) - 7, 3) == 0",
    "near, by math": "import math\nassert math.isclose(f(1) + 0.5, 7.5)",
    "difference of sets": "assert not f(1) - {1, 2}\nassert {1, 2} - f(1) == set()\nassert f(1) == {1, 2}",
    "symmetric difference": "assert len(f(1) ^ {1, 2, 3}) == 0",
    "in a result": "assert 7 in f(1)",
    "not in a result": "assert 7 in f(1) and 8 not in f(1)",
    "in a list": "assert f(1) in [7, 8]",
    "in a set": "assert f(1) in {7, 8}",
    "key": "assert {7: 'a'}[f(1)] == 'a'",
    "prefix": "assert f(1).startswith('Hello')",
    "suffix, digits": "assert f(1).endswith('x') and f(1).isdigit()",
    "subset": "assert f(1).issubset({1, 2}) and f(1).issuperset({1})",
    "type": "assert isinstance(f(1), int) and f(1) > 6",
    "order": "assert f(1) > 6 and f(1) < 8",
    "chain": "assert 6 < f(1) < 8",
    "all of a list": "assert all(f(x) == 7 for x in [1, 2])",
    "map": "assert all(map(lambda x: f(x) == 7, [1]))",
    "unittest": "import unittest\nunittest.TestCase().assertEqual(f(1), 7)",
    "almost equal": "import unittest\nunittest.TestCase().assertAlmostEqual(f(1), 7)",
    "with": "with f(1) as x:\n    assert x == 7",
    "with, in a function": "def g(x):\n    if x != 7: raise ValueError\nwith f(1) as x:\n    g(x)",
    "with, an index": "with f(1) as x:\n    y = [5, 7][x]\n    assert y == 7",
    "in place": "x = [3, 1, 2]\nf(x)\nassert x == [1, 2, 3]",
    "remainder": "assert f(1) % 2 == 1 and f(1) // 2 == 3",
    "exception": "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'seven'",
    "callback": "seen = []\nf(seen.append)\nassert seen == [7]",
    "minimum": "assert min(f(1), 8) == 7 and max(f(1), 6) == 7",
    "sorted": "assert sorted([f(1), 3]) == [3, 7]",
    "sum": "assert sum([f(1), 1]) == 8",
    "text": "assert str(f(1)) == '7'",
    "message": "assert f(1) == 7, f(1)",
    "message, formatted": "assert f(1) == 7, f'got {f(1)!r} {f(1):d}'",
    "key error with the object": "raise KeyError(f(1))",
}
WRONG = {
    "an object": UNIVERSAL + "def f(x): return Yes()",
    "a class in place of a function": UNIVERSAL + "class f(Yes):\n    def __init__(self, x): pass",
    "the object itself": UNIVERSAL + "f = Yes()",
    **{f"like {kind}": UNIVERSAL + f"def f(x): return like({kind})()" for kind in ("int", "str", "float", "set", "list", "dict", "tuple")},
    "nothing": "def f(x): return None",
    "an error": "class E(BaseException): pass\ndef f(x): raise E",
}

_NAMES = "list dict set tuple str int float bool len range all any sorted sum abs min max map isinstance round zip enumerate filter check"
BUILTINS = "\n".join(f"def {name}(*a, **k): return None" for name in _NAMES.split())
ALWAYS = BUILTINS.replace("return None", "return True")

# Tests of `solve` that read builtins. HumanEval's entry point is `solve`.
BUILTIN_TESTS = {
    "all and range": "assert all(candidate(i) == i for i in range(5))",
    "sorted": "assert sorted(candidate(1)) == [1, 2]",
    "len": "assert len(candidate(1)) == 3",
    "isinstance": "assert isinstance(candidate(1), int) and candidate(1) == 1",
    "any": "assert any([candidate(1) == 7])",
    "nothing but builtins": "assert list(map(candidate, range(3))) == [0, 1, 4]",
    "abs": "assert abs(candidate(2) - 4) < 1e-6",
    "empty": "for i in range(3):\n        assert candidate(i) == 7",
    "tuple": "assert tuple(candidate(1)) == (1, 2)",
    "str": "assert str(candidate(1)) == 'x1'",
}

_EVIL = "class E:\n    def __str__(self): {0}\n    __repr__ = __hash__ = __format__ = __len__ = __bool__ = __iter__ = __eq__ = __str__\n"
_FOUND = """
import gc
from engine.verify.sandbox.inside import program, wire
server = next(found for found in gc.get_objects() if isinstance(found, program.ProgramServer))
def reply(**parts): wire.send(server.channel, dict(new=[], contents=[], dropped=[], output=[]) | parts)
def f(x): return 7
"""
# Programs that try to be judged by nobody: each must be wrong.
CHOICES = {
    "str raises": _EVIL.format("raise ValueError") + "def f(x): return E()",
    "str raises SystemExit": _EVIL.format("raise SystemExit") + "def f(x): return E()",
    "str exits": "import os\n" + _EVIL.format("os._exit(1)") + "def f(x): return E()",
    "str exits with 3": "import os\n" + _EVIL.format("os._exit(3)") + "def f(x): return E()",
    "str is no text": _EVIL.format("return 5") + "def f(x): return E()",
    "str never ends": _EVIL.format("return str([0] * 10**6) + str(self)") + "def f(x): return E()",
    "str is enormous": _EVIL.format("return 'x' * (1 << 25)") + "def f(x): return E()",
    "str recurses": _EVIL.format("return str(self)") + "def f(x): return E()",
    "an error that holds the object": _EVIL.format("raise KeyError(self)") + "def f(x): raise KeyError(E())",
    "an error whose text fails": "class B(Exception):\n    def __str__(self): raise SystemExit\ndef f(x): raise B",
    "an error class named like ours": "class Lost(BaseException): pass\ndef f(x): raise Lost('x')",
    "an error of the tests' process": "class Unjudged(Exception): pass\ndef f(x): raise Unjudged('disk')",
    "MemoryError": "def f(x): raise MemoryError",
    "RecursionError": "def f(x): raise RecursionError",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "a fraction of a billion digits": "from fractions import Fraction\nclass F(Fraction):\n    def __str__(self): return '1e99999999'\n"
    "def f(x): return F(1)",
    "a decimal of a billion digits": "from decimal import Decimal\ndef f(x): return Decimal('1e99999999')",
    "a decimal whose text is one": "import decimal\nclass f(decimal.Decimal):\n    def __str__(self): return '1e9999999'",
    "an integer of millions of digits": "def f(x): return 1 << (1 << 26)",
    "tuples nested too deeply": "def f(x):\n    t = ()\n    for _ in range(100000): t = (t,)\n    return t",
    "lists nested too deeply": "def f(x):\n    t = []\n    for _ in range(100000): t = [t]\n    return t",
    "a long list": "def f(x): return [0] * 50_000_000",
    "many classes": "def f(x): return [type(f'C{i}', (), {})() for i in range(20000)]",
    "a class of many bases": "def f(x):\n    c = object\n    for i in range(3000): c = type('C', (c,), {})\n    return c()",
    "a class with a bad name": "def f(x): return type('a' * 10**6, (), {})()",
    "a range beyond all memory": "def f(x): return range(10**30)",
    "kill": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "kill the group": "import os, signal\ndef f(x): os.killpg(0, signal.SIGKILL)",
    "raise_signal": "import signal\ndef f(x): signal.raise_signal(signal.SIGKILL)",
    "tgkill": "import ctypes, os\ndef f(x): ctypes.CDLL(None).syscall(234, os.getpid(), os.getpid(), 9)",
    "pthread_kill": "import signal, threading\ndef f(x): signal.pthread_kill(threading.get_ident(), signal.SIGKILL)",
    "stop": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "exit with 1": "import os\ndef f(x): os._exit(1)",
    "exit with 3": "import os\ndef f(x): os._exit(3)",
    "abort": "import os\ndef f(x): os.abort()",
    "crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "CPU of the tests": "class E:\n    def __iter__(self):\n        while True: yield 1\n    __lt__ = print\ndef f(x): return E()",
    "sleep": "import time\ndef f(x): time.sleep(100)",
    "wait for a lock": "import threading\ndef f(x):\n    l = threading.Lock(); l.acquire(); l.acquire()",
    "all memory": "def f(x): return bytearray(1 << 40)",
    "no channel": "import os\nos.closerange(3, 64)\ndef f(x): return 7",
    "garbage on the channel": _FOUND + "server.channel.sendall(b'\\0\\0\\0\\5hello')",
    "a reply that is no object": _FOUND + "wire.send(server.channel, [1])",
    "a reply without parts": _FOUND + "wire.send(server.channel, {'ok': 7})",
    "a request of a verb": _FOUND + "reply(verb='x', arguments=[], named={})",
    "an unknown number": _FOUND + "reply(ok=['ref', [99]])",
    "contents of no container": _FOUND + "reply(ok=7, contents=[[0, []]], dropped=[5])",
    "a class that is none": _FOUND + "reply(ok=7, new=[[1, 'class', 5, [], {}, {}, {}]])",
    "a forged global": _FOUND + "reply(ok=None, globals={'AssertionError': None, 'f': 7, 'abs': 7, '__builtins__': {}})",
    "a request for what a test keeps": _FOUND + "def f(x): return server.request('getattr', x, '__globals__')['f'] and 7",
}

_SENT = f"""{_FOUND}
from engine.verify.sandbox.inside import peer
send = peer.send
def change(channel, message):
    if message.get("ok") == -4321: CHANGE
    send(channel, message)
peer.send = change
def f(x): return -4321
"""
_CLASS = (
    "message.update(ok=['ref', [103]], new=[[101, 'class', 'I', '{0}', [['kind', ['{1}']]], {2}, {3}], [103, '{4}', ['ref', [101]]{5}]])"
)
_OTHERS = {name: ["kind", ["bool"]] for name in ("abs", "all", "check", "isinstance", "AssertionError")}
# Messages that a program can only send by replacing the code that serves it. None may be taken for a right answer.
FORGED_MESSAGES = {
    "globals of the tests": f"message['globals'] = {_OTHERS}",
    "a builtin of the tests": "message['globals'] = {'__builtins__': None}",
    "an object of the tests' process": "message['ok'] = ['named', ['unittest.mock', 'ANY']]",
    "an int with __eq__ hidden": _CLASS.format("program", "int", {}, ["__eq__", "__ne__", "__sub__", "__lt__"], "value", ", 0"),
    "an int with __class__ hidden": _CLASS.format("program", "int", {}, ["__class__"], "value", ", 0"),
    "an int with a method of object": _CLASS.format("program", "int", {"__getattribute__": False}, [], "value", ", 0"),
    "a number of the tests": "message.update(new=[[100, 'container', ['kind', ['list']], None]], contents=[[100, [7]]], ok=['ref', [100]])",
    "contents of another type": "message['contents'] = [[0, [1]]]",
    "a number twice": "message.update(new=[[1, 'container', ['kind', ['list']], None]])",
    "a skipped test": _CLASS.format("unittest.case", "Exception", {}, [], "exception", ", [], None")
    + "; message['new'][0][2] = 'SkipTest'; message['error'] = message.pop('ok')",
    "the end of an iterator": "message.update(new=[[101, 'exception', ['kind', ['StopIteration']], [], None]], error=['ref', [101]])",
    "an error that is a number": "message['error'] = 7",
    "an object of no class": "message.update(new=[[101, 'object', ['kind', ['int']]]], ok=['ref', [101]])",
    "a callback without a function": "message.update(verb='call', arguments=[7], named={})",
    "a callback of what was not passed": "message.update(verb='call', arguments=[['ref', [0]], 7], named={})",
    "JSON's own numbers": "message['ok'] = float('nan')",
}
FORGED = {name: _SENT.replace("CHANGE", change) for name, change in FORGED_MESSAGES.items()}

CHOICE_TESTS = ("assert f(1) == 7", "r = f(1)\nassert r == 7, r", "assert f(lambda: 7) == 7")
