"""`code`: the response's program passes all tests, in a sandbox (engine/verify/sandbox). No partial credit.

The program is the last ```python block, else the last fenced block, else the whole response. For HumanEval, it continues the prompt
unless it defines the entry point itself. The prompt's imports and helpers are available in both cases, and the tests use those of the
prompt, never the program's. Programs can import the standard library of the Python that runs the engine, but no packages.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

from engine.verify.sandbox.host import Sandbox
from engine.verify.sandbox.inside.names import check_prompt, check_tests
from engine.verify.sandbox.inside.namespaces import Limits
from engine.verify.verdict import Unjudged, Verdict, Verifier

HUMANEVAL = ("prompt", "test", "entry_point")
RESPONSE_MAX = TESTS_MAX = 1 << 20  # characters
FENCE_INDENT = 3  # columns; deeper fences may be part of an indented text, such as a docstring
LIMITS = Limits()


def verify(response: str, truth: Any, *, unsafe: bool = False, limits: Limits = LIMITS) -> Verdict:
    """Runs the response's program against the tests in truth: {"tests": [lines]}, or HumanEval's {"prompt", "test", "entry_point"}.

    The first call in a process starts its sandbox. `unsafe` runs the program without isolation. Raises NoIsolation (an Unjudged) if no
    sandbox can be created and `unsafe` is not set, and Unjudged if the machine fails twice in a row.
    """
    if len(response) > RESPONSE_MAX:
        return Verdict(False, f"the response has {len(response)} characters, over the limit of {RESPONSE_MAX}")
    job = _job(extract(response), truth)
    try:
        return _sandbox(os.getpid(), unsafe, limits).run(**job)
    except Unjudged:
        _sandbox.cache_clear()
    return _sandbox(os.getpid(), unsafe, limits).run(**job)


def check(truth: Any, *, unsafe: bool = False) -> None:
    """Raises ValueError unless `truth` contains tests that can fail and can pass, and a sandbox can be created on this machine.

    With {"tests"}, an optional "entry_point" names what the program defines where this is not clear from the tests.
    """
    if not isinstance(truth, Mapping) or not (_strings(truth.get("tests")) or _strings([truth.get(key) for key in HUMANEVAL])):
        expected = '{"tests": [lines]} or HumanEval\'s {"prompt", "test", "entry_point"}'
        raise ValueError(f"truth={truth!r:.80} has no tests for verifier=code; give {expected}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about the tests' strings
        _check_tests(truth)
    _sandbox(os.getpid(), unsafe, LIMITS)


def _check_tests(truth: Mapping[str, Any]) -> None:
    humaneval = not _strings(truth.get("tests"))
    tests, name = truth["test"] if humaneval else "\n".join(truth["tests"]), truth.get("entry_point")
    if name is not None and (not isinstance(name, str) or not name.isidentifier()):
        raise ValueError(f"truth: entry_point={name!r:.80} is not a name; give the name of the function that the tests call")
    if len(tests) > TESTS_MAX:
        raise ValueError(f"truth: the tests have {len(tests)} characters, over the limit of {TESTS_MAX}; give fewer")
    field = "test" if humaneval else "tests"
    try:
        check_tests(tests, name, humaneval)
        if humaneval:
            field = "prompt"
            check_prompt(_stub(truth["prompt"]), truth["entry_point"])
    except ValueError as error:
        raise ValueError(f"truth: {field}={truth[field]!r:.80} {error}; correct or remove this row") from None


@lru_cache(maxsize=2)
def _sandbox(pid: int, unsafe: bool, limits: Limits) -> Sandbox:
    """Keyed by pid, because a forked worker must not share its parent's launcher."""
    return Sandbox(limits, unsafe=unsafe)


def _job(program: str, truth: Mapping[str, Any]) -> dict[str, Any]:
    if _strings(truth.get("tests")):
        return {"program": [program], "tests": "\n".join(truth["tests"]), "entry_point": truth.get("entry_point")}
    prompt, test, name = (truth[key] for key in HUMANEVAL)
    parts = [_stub(prompt), program] if _defines(program, name) else [prompt + program]
    return {"program": parts, "tests": f"{test}\ncheck({name})", "setup": _stub(prompt), "entry_point": name}


def _stub(prompt: str) -> str:
    return f"{prompt}\n    pass\n"


def _defines(program: str, name: str) -> bool:
    """Whether the text of `program` defines `name`. It may not parse."""
    return re.search(rf"^(?:(?:async )?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*[:=]", program, re.MULTILINE) is not None


def _strings(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) > 0 and all(isinstance(value, str) for value in values)


class Block(NamedTuple):
    """A fenced block of Markdown."""

    language: str
    indent: int  # of its fence, in columns
    body: str


def extract(response: str) -> str:
    """The program in a response. An unclosed block extends to the end."""
    blocks = list(_blocks(response))
    if re.search(r"^(?:async )?(?:def|class) ", response, re.MULTILINE) and all(block.indent > FENCE_INDENT for block in blocks):
        return response  # a program without a block; the fences are in its docstrings
    python = [block for block in blocks if block.language in ("python", "python3", "py")]
    return (python or blocks or [Block("", 0, response)])[-1].body


def _blocks(response: str) -> Iterator[Block]:
    """The fenced blocks by CommonMark's rules, in linear time, except that a fence may be indented by any number of columns."""
    lines = iter(response.split("\n"))
    for line in lines:
        if opening := _fence(line):
            mark, indent, language = opening
            body: list[str] = []
            for inner in lines:
                closing = _fence(inner)
                if closing and closing.mark.startswith(mark) and not closing.rest and closing.indent <= indent + FENCE_INDENT:
                    body.append("")
                    break
                body.append(_dedent(inner, indent))
            yield Block(re.split(r"[^\w+-]", language.lstrip("{."), maxsplit=1)[0].lower(), indent, "\n".join(body))


class Fence(NamedTuple):
    """A line that opens or closes a block: ``` or ~~~, three or more."""

    mark: str
    indent: int
    rest: str


def _fence(line: str) -> Fence | None:
    text = line.strip(" \t\r")
    mark = text[: len(text) - len(text.lstrip(text[:1]))] if text[:1] in ("`", "~") else ""
    rest = text[len(mark) :].strip()
    if len(mark) < 3 or (mark[0] == "`" and "`" in rest):
        return None
    return Fence(mark, _columns(line[: line.index(mark[0])]), rest)


def _columns(blanks: str) -> int:
    return len(blanks.expandtabs(4))


def _dedent(line: str, columns: int) -> str:
    """`line` without up to `columns` columns of leading blanks."""
    text = line.lstrip(" \t")
    return line[: len(line) - len(text)].expandtabs(4)[columns:] + text if columns else line


# The sandbox has its own limits; this one, of CPU time in the worker, covers a fault of ours.
CODE = Verifier("code", verify, check, judge=verify, limit_s=60.0)
# Not in VERIFIERS: data rows can select a verifier, but only the user may select this one.
UNSAFE_CODE = Verifier("code", partial(verify, unsafe=True), partial(check, unsafe=True), judge=partial(verify, unsafe=True), limit_s=60.0)
