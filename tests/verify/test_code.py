"""The code verifier: program extraction, passing and failing programs, and HumanEval's reference solutions."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.__main__ import main
from engine.verify import verifier
from engine.verify.code import CODE, LIMITS, UNSAFE_CODE, _sandbox, check, extract, verify
from engine.verify.pool import Case, Pool, alone
from engine.verify.sandbox.host import START, NoIsolation, Sandbox
from engine.verify.verdict import Verdict, Verifier
from tests.support.paths import SHARED

HUMANEVAL = SHARED / "humaneval.jsonl"
ADD = {"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}


@pytest.fixture(scope="module")
def code() -> Iterator[Verifier]:
    """The verifier, without isolation where the machine has none; the programs of these tests are harmless."""
    try:
        Sandbox(LIMITS).close()
    except NoIsolation:
        yield UNSAFE_CODE
    else:
        yield CODE
    _sandbox.cache_clear()


def judge(code: Verifier, program: str, *tests: str) -> Verdict:
    return code.verify(program, {"tests": list(tests)})


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Sure:\n```python\na = 1\n```\nthat is it", "a = 1\n"),
        ("```python\na = 1\n```\n```python\na = 2\n```", "a = 2\n"),
        ("```python\na = 1\n```\nwhich prints\n```\n1\n```", "a = 1\n"),
        ("```py\na = 1\n```", "a = 1\n"),
        ("```Python3 title=x\na = 1\n```", "a = 1\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```cpp\nint a;\n```\n```\na = 1\n```", "a = 1\n"),
        ("```python\na = 1", "a = 1"),
        ("  ```python\n  a = 1\n  ```", "a = 1\n"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```\n2. Done", "def f():\n    return 1\n"),
        ("- So:\n\t```python\n\ta = 1\n\t```", "a = 1\n"),
        (
            '```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```',
            'def f():\n    """\n    ```\n    f()\n    ```\n    """\n',
        ),
        ('def f():\n    """\n    ```\n    f()\n    ```\n    """', 'def f():\n    """\n    ```\n    f()\n    ```\n    """'),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("~~~python\na = 1\n~~~", "a = 1\n"),
        ("```{python}\r\na = 1\r\n```\r\n", "a = 1\r\n"),
        ("```python\na = 1\n``` and so on\n```", "a = 1\n``` and so on\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("no fence ``` here", "no fence ``` here"),
        ("", ""),
        ("```python\n```", ""),
    ],
)
def test_extract(response: str, program: str) -> None:
    assert extract(response) == program


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def add(a, b):\n    return a + b", ["assert add(1, 2) == 3", "assert add(b=1, a='x' and 2) == 3"]),
        ("import math\ndef f(x): return math.sqrt(x)", ["assert math.isclose(f(2), 1.4142, rel_tol=1e-3)"]),
        ("def f(x): return [x, (x, {x}), {'a': [x]}, None, True, 1.5]", ["assert f(1) == [1, (1, {1}), {'a': [1]}, None, True, 1.5]"]),
        ("def f(): return {(1, 2): frozenset([3])}, b'x', 1j, range(3)", ["assert f() == ({(1, 2): frozenset([3])}, b'x', 1j, range(3))"]),
        ("def f(n): return 10 ** n", ["assert f(5000) == 10 ** 5000", "assert f(0) == 1"]),
        ("def f(): return float('nan'), float('inf')", ["a, b = f()", "assert a != a and b > 10 ** 300"]),
        ("def f(): return '\\ud800é\\0'", ["assert f() == '\\ud800é\\0'"]),
        ("def f(n):\n    for i in range(n): yield i", ["assert list(f(3)) == [0, 1, 2]", "assert next(f(3)) == 0", "assert 2 in f(3)"]),
        ("def f(n):\n    while True:\n        yield n", ["from itertools import islice", "assert list(islice(f(2), 2)) == [2, 2]"]),
        ("def f(x): x.sort()", ["x = [3, 1, 2]", "f(x)", "assert x == [1, 2, 3]"]),
        ("def f(x): x.update(a=1); x.pop('b')", ["x = {'b': 2}", "f(x)", "assert x == {'a': 1}"]),
        ("def f(g, x): return [g(y) for y in x]", ["assert f(lambda y: y * 2, [1, 2]) == [2, 4]", "assert f(str, [1]) == ['1']"]),
        ("def f(g): return g(lambda x: x + 1)", ["assert f(lambda h: h(1)) == 2"]),
        ("def f(x): raise KeyError(x)", ["try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass"]),
        (
            "class Mine(ValueError): pass\ndef f(): raise Mine",
            ["try:\n    f()\nexcept ValueError as e:\n    assert type(e) is Mine"],
        ),
        (
            "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
            "    def __len__(self): return len(self.items)\n    def __getitem__(self, i): return self.items[i]",
            ["s = Stack()", "s.push(4)", "assert len(s) == 1 and s[0] == 4 and s.items == [4]", "s.items = []", "assert not s"],
        ),
        (
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    def __add__(self, o): return P(self.x + o.x)",
            [
                "assert P(1) + P(2) == P(3)",
                "assert (P(1) + P(1)).x == 2",
                "assert P(1) != P(2) and isinstance(P(1), P)",
                "assert repr(P(1)) == 'P(x=1)'",
            ],
        ),
        ("from collections import Counter, deque\ndef f(s): return Counter(s), deque(s)", ["assert f('aa')[0] == {'a': 2}"]),
        (
            "from fractions import Fraction\ndef f(): return Fraction(1, 3)",
            ["import fractions", "assert f() == fractions.Fraction(1, 3)"],
        ),
        ("from enum import IntEnum\nclass C(IntEnum):\n    A = 1\ndef f(): return C.A", ["assert f() == 1"]),
        ("f = len", ["assert f([1]) == 1"]),
        ("def f(g): return g([1, 2]), g is max", ["assert f(max) == (2, True)", "assert f(len)[0] == 2"]),
        ("def f(x): return type(x)", ["assert f(1) is int", "assert f(int) not in (int, str)"]),
        ("def sum(a, b): return a + b", ["assert sum(10, 15) == 25"]),
        ("LIMIT = 3\ndef f(): return LIMIT", ["assert f() == LIMIT"]),
        ("def f(x): return x\nif __name__ == '__main__':\n    raise SystemExit", ["assert f(1) == 1"]),
        ("import asyncio, threading\nasync def g(): return 1\ndef f(): return asyncio.run(g())", ["assert f() == 1"]),
        ("def f():\n    with open('notes', 'w') as n: n.write('x')\n    return open('notes').read()", ["assert f() == 'x'"]),
        ("print('hello')\ndef f(): return 1", ["assert f() == 1"]),
    ],
)
def test_right_programs_pass(code: Verifier, program: str, tests: list[str]) -> None:
    verdict = judge(code, program, *tests)
    assert verdict == (True, "all tests passed")


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def add(a, b): return a - b", ADD["tests"], "AssertionError at assert add(1, 2) == 3"),
        ("def other(a, b): return a + b", ADD["tests"], "NameError: name 'add' is not defined"),
        ("def add(a, b) return", ADD["tests"], "does not load: SyntaxError"),
        ("", ADD["tests"], "NameError"),
        ("import numpy", ADD["tests"], "does not load: ModuleNotFoundError"),
        ("1 / 0", ADD["tests"], "does not load: ZeroDivisionError"),
        ("def add(a, b): return a / 0", ADD["tests"], "ZeroDivisionError: division by zero at assert add(1, 2) == 3"),
        ("def f(x): return iter([1])", ["assert f(1) == [1]"], "AssertionError"),
        ("def f(x): return x", ["assert f(1) == 1", "assert f(2) == 3"], "AssertionError at assert f(2) == 3"),
        ("def f(x): return '3'", ["assert f(1) == 3"], "AssertionError"),
        ("def f(x): pass", ["exit()"], ""),
        ("def f(x): raise Exception('a\\n\\x1b\\ud800' + 'b' * 10**6)", ["f(1)"], "Exception: a b"),
        ("class C: pass\ndef f(x): return C()", ["assert isinstance(f(1), int)"], "AssertionError"),
    ],
)
def test_wrong_programs_fail_and_say_why(code: Verifier, program: str, tests: list[str], reason: str) -> None:
    verdict = judge(code, program, *tests)
    assert not verdict.correct
    assert reason in verdict.reason
    assert "\n" not in verdict.reason
    assert len(verdict.reason) < 400


def problem(**changes: str) -> dict[str, str]:
    prompt = 'from typing import List\n\ndef helper(x: int) -> int:\n    return x + 1\n\n\ndef twice(x: int) -> int:\n    """Twice x."""\n'
    test = "def check(candidate):\n    assert candidate(2) == 4\n    assert helper(candidate(2)) == 5\n"
    return {"prompt": prompt, "test": test, "entry_point": "twice"} | changes


AGREEABLE = "class All:\n    def __add__(self, other): return 5\n    def __eq__(self, other): return True"


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("    return 2 * x\n", True),
        ("    return helper(x) + x - 1", True),
        ("    return 3 * x\n", False),
        ("", False),
        ("```python\n    return 2 * x\n```", True),
        ("```python\ndef twice(x: int) -> int:\n    return helper(x) + x - 1\n```", True),
        ("```python\ntwice = lambda x: 2 * x\n```", True),
        ("def twice(x):\n    return 2 * x", True),
        ("```python\ndef other(x):\n    return 2 * x\n```", False),
        # The tests use the prompt's helper, even if the program redefines it.
        ("def helper(x): return 5\ndef twice(x): return 4 if x == 2 else 0", True),
        (f"{AGREEABLE}\ndef helper(x): return 5\ndef twice(x): return All()", False),
    ],
)
def test_humaneval_answers(code: Verifier, response: str, correct: bool) -> None:
    assert code.verify(response, problem()).correct is correct


def test_humaneval_does_not_credit_the_prompt(code: Verifier) -> None:
    """The prompt's empty function returns None; a program that does not define the function must still fail."""
    truth = problem(test="def check(candidate):\n    assert candidate(1) is None\n")
    assert not code.verify("```python\ndel twice\n```", truth).correct


@pytest.mark.parametrize(
    "truth", [None, "", "assert True", {}, {"tests": []}, {"tests": "assert f()"}, {"tests": [1]}, {"prompt": "", "test": ""}]
)
def test_a_truth_without_tests_is_refused_at_the_start(truth: Any) -> None:
    with pytest.raises(ValueError, match=r"truth=.*verifier=code; give"):
        check(truth)


CHECK = "def check(candidate):\n"


@pytest.mark.parametrize(
    ("truth", "why"),
    [
        ({"tests": [""]}, "runs no assert"),
        ({"tests": ["# assert f() == 1"]}, "runs no assert"),
        ({"tests": ["f(1) == 2"]}, "runs no assert"),
        ({"tests": ["'assert f() == 1'"]}, "runs no assert"),
        ({"tests": ["assert True, f(1)"]}, "runs no assert"),
        ({"tests": ["assert (f(1) == 2, 'one')"]}, "runs no assert"),
        ({"tests": ["def test_f():\n    assert f(1) == 2"]}, "runs no assert"),
        ({"tests": ["class Test:\n    def test_f(self):\n        assert f(1) == 2"]}, "runs no assert"),
        ({"tests": ["assert 1 + 1 == 2"]}, "reads no name"),
        ({"tests": ["import math", "assert math.gcd(4, 6) == 2"]}, "reads no name"),
        ({"tests": ["assert sorted(range(3)) == [0, 1, 2]"]}, "reads no name"),
        ({"tests": ["assert f(1) == 2", "assert f(2 == 3"]}, "is not valid Python"),
        ({"tests": ["assert f('\0') == 2"]}, "is not valid Python"),
        ({"tests": ["assert " + "(" * 10**5]}, "is not valid Python|nested too deeply"),
        ({"tests": ["assert " + "-" * 10**5 + "f(1)"]}, "nested too deeply"),
        ({"tests": ["assert f(1) == 2" + " " * 2**20]}, "over the limit"),
        ({"tests": ["import numpy as np", "assert f(1) == np.ones(1)"]}, "imports numpy, which is not in the standard library"),
        ({"tests": ["from solution import f", "assert f(1) == 2"]}, "imports solution"),
        ({"tests": ["assert f(1) == 2"], "entry_point": "f()"}, "entry_point='f\\(\\)' is not a name"),
        (problem(test=""), "defines no function check"),
        (problem(test="assert twice(1) == 2"), "defines no function check"),
        (problem(test="def check():\n    assert twice(1) == 2"), "defines no function check"),
        (problem(test="def check(a, b):\n    assert twice(1) == 2"), "defines no function check"),
        (problem(test=CHECK + "    pass"), "runs no assert"),
        (problem(test=CHECK + "    candidate(1) == 2"), "runs no assert"),
        (problem(test=CHECK + "    def inner():\n        pass\nassert True"), "runs no assert"),
        (problem(test=CHECK + "    assert 1 + 1 == 2"), "reads no name"),
        (problem(test=CHECK + "    assert candidate(1) == = 2"), "is not valid Python"),
        (problem(entry_point="thrice"), "does not define entry_point='thrice'"),
        (problem(entry_point=""), "entry_point='' is not a name"),
        (problem(entry_point="a b"), "is not a name"),
        (problem(prompt="Write a function that doubles."), "is not valid Python"),
        (problem(prompt="import torch\ndef twice(x):\n"), "imports torch"),
    ],
)
def test_a_truth_that_judges_nothing_or_that_nothing_can_pass_is_refused(truth: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        check(truth, unsafe=True)
    assert str(caught.value).startswith("truth: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "truth",
    [
        {"tests": ["assert sum(10, 15) == 25"]},
        {"tests": ["if f(1) != 2:\n    raise ValueError"]},
        {"tests": ["def test_f():\n    assert f(1) == 2", "test_f()"]},
        {"tests": ["import unittest", "unittest.TestCase().assertEqual(f(1), 2)"]},
        {"tests": ["try:\n    import numpy\nexcept ImportError:\n    numpy = None", "assert f(1) == 2"]},
        {"tests": ["assert pow(2, 3) == 8 and abs(max(1, 2)) == 2"], "entry_point": "max"},
        problem(),
        problem(test="def helper(f):\n    assert f(1) == 2\ndef check(candidate, times=2):\n    helper(candidate)"),
        problem(test="def check(*functions):\n    assert twice(1) == 2"),
    ],
)
def test_a_truth_that_judges_is_accepted(truth: Any) -> None:
    check(truth, unsafe=True)


def test_every_problem_of_humaneval_is_accepted() -> None:
    for _, row in solutions():
        check(row, unsafe=True)


def test_a_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rows = [{"response": "", "truth": ADD}, {"response": "", "truth": {"tests": ["add(1, 2)"]}}]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(map(json.dumps, rows)).encode())))
    assert main(["verify", "--verifier", "code", "--workers", "1", "--unsafe-code"]) == 1
    assert capsys.readouterr().err.startswith("error: stdin:2: truth: tests=['add(1, 2)'] runs no assert")


HOSTILE = ["`" * 10**6, "```" * 333_333, "```\n" * 250_000, "\n" * 10**6, " " * 10**6, " \t" * 500_000 + "```", "~~~x\n \t~~~ " * 90_000]
HOSTILE += ["```python\n" * 100_000, "def twice" * 110_000, "def " + " " * 10**6, "(" * 10**6, "-" * 10**6 + "1", "x = '" + "\\" * 10**6]


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_a_megabyte_of_anything_is_judged_within_its_limit(code: Verifier, response: str) -> None:
    """By a worker with the verifier's limit, which a quadratic scan would exceed."""
    verdict = alone(code, response, problem())
    assert not verdict.correct
    assert "time limit" not in verdict.reason


@pytest.mark.parametrize(
    "response",
    [
        "```python\nfrom __future__ import annotations\n\ndef twice(x: int) -> int:\n    return 2 * x\n```",
        "1. Here:\n\n   ```python\n   def twice(x):\n       return 2 * x\n   ```\n",
        "```python\n\ndef twice(x):\n    return 2 * x\n```",
        "```python\ntwice: object = lambda x: 2 * x\n```",
    ],
)
def test_answers_as_chat_models_write_them(code: Verifier, response: str) -> None:
    assert code.verify(response, problem()).correct


@pytest.mark.parametrize("helper", ["def sorted(xs): return xs", "def abs(x): return 0", "len = lambda x: 3"])
def test_the_tests_builtins_are_not_the_programs(code: Verifier, helper: str) -> None:
    truth = problem(test=CHECK + "    assert sorted([candidate(1), 0]) == [0, 2] and abs(candidate(-1)) == 2 and len([candidate(1)]) == 1")
    assert code.verify(f"{helper}\ndef twice(x): return 2 * x", truth).correct
    assert not code.verify(f"{helper}\ndef twice(x): return x", truth).correct


def test_names() -> None:
    assert verifier("code") is CODE
    with pytest.raises(ValueError):
        verifier("unsafe_code")  # a data set must not be able to select it


def test_without_isolation_it_refuses_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(limits: object, unsafe: bool) -> Sandbox:
        if unsafe:
            return Sandbox(LIMITS, unsafe=True)
        raise NoIsolation("verifier=code: no isolation")

    monkeypatch.setattr("engine.verify.code.Sandbox", refuse)
    _sandbox.cache_clear()
    with pytest.raises(ValueError, match="no isolation"):
        CODE.check(ADD)
    with pytest.raises(NoIsolation):
        verify("", ADD)
    UNSAFE_CODE.check(ADD)
    assert UNSAFE_CODE.verify("def add(a, b): return a + b", ADD).correct
    _sandbox.cache_clear()


def test_a_lost_sandbox_is_started_again(code: Verifier) -> None:
    answer = "def add(a, b): return a + b"
    assert code.verify(answer, ADD).correct
    _sandbox(os.getpid(), code is UNSAFE_CODE, LIMITS).launcher.kill()
    assert code.verify(answer, ADD).correct


def test_a_large_program_is_wrong(code: Verifier) -> None:
    assert "over the limit" in code.verify("#" * 2_000_000, ADD).reason


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.text(alphabet="`python\n ()[]:='\"\\#\0\ud800"))
def test_no_response_raises(code: Verifier, response: str) -> None:
    assert code.verify(response, ADD).correct is False
    assert code.verify(f"```python\n{response}\n```", ADD).correct is False


def solutions() -> list[tuple[str, dict[str, str]]]:
    if not HUMANEVAL.is_file():
        pytest.skip(f"no {HUMANEVAL}")
    rows = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]
    return [(row["canonical_solution"], row) for row in rows]


def test_humaneval_solutions_pass_and_shortened_ones_fail(code: Verifier) -> None:
    """All 164 solutions pass through the pool in shuffled order; each fails without its last line."""
    rows = solutions()
    cases = [Case(code, solution, row) for solution, row in rows]
    cases += [Case(code, "\n".join(solution.rstrip().split("\n")[:-1]), row) for solution, row in rows]
    order = random.Random(0).sample(range(len(cases)), len(cases))
    with Pool(workers=2) as pool:
        answers = dict(zip(order, pool.verify([cases[index] for index in order]), strict=True))
    assert len(rows) == 164
    for index, case in enumerate(cases):
        answer = answers[index]
        assert isinstance(answer, Verdict)
        assert answer.correct is (index < len(rows)), (case.truth["task_id"], answer)


@pytest.mark.parametrize("flags", [[], ["--unsafe-code"]])
def test_the_command_line_refuses_unless_told(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On a machine without isolation (unshare fails in the launcher), both in this process and in workers."""
    refuse = "lambda flags: (_ for _ in ()).throw(PermissionError(1, 'unshare'))"
    broken = f"from engine.verify.sandbox.inside import kernel; kernel.unshare = {refuse}; "
    monkeypatch.setattr("engine.verify.sandbox.host.START", START.replace("from", broken + "from", 1))
    _sandbox.cache_clear()
    rows = [{"response": "def add(a, b): return a + b", "truth": ADD}, {"response": "def add(a, b): return a - b", "truth": ADD}]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(map(json.dumps, rows)).encode())))
    code = main(["verify", "--verifier", "code", "--workers", "1", *flags])
    out, err = capsys.readouterr()
    if flags:
        assert code == 0
        assert [json.loads(line)["correct"] for line in out.splitlines()] == [True, False]
    else:
        assert code == 1
        assert out == ""
        assert err.startswith("error: stdin:1: verifier=code: cannot isolate programs on this machine")
        assert "--unsafe-code" in err
    _sandbox.cache_clear()
