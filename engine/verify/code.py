"""`code`: the response's program passes every test, in a sandbox (sandbox.py). All or nothing: a share of tests is no share of a program.

The program is the last ```python block, else the last fenced block, else the whole response. For HumanEval it continues the prompt
unless it defines the entry point itself; the prompt's imports and helpers are there either way, and the tests use the prompt's own, never
the program's. Programs have the standard library of the Python that runs the engine, and no packages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from engine.jail.walls import Limits
from engine.verify.sandbox import Sandbox
from engine.verify.verdict import Unjudged, Verdict

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
PROGRAM_MAX = 1 << 20  # characters


def verify(response: str, truth: Any, *, unsafe: bool = False, limits: Limits = Limits()) -> Verdict:  # noqa: B008  (frozen)
    """Runs the response's program against truth: {"tests": [lines]}, or HumanEval's {"prompt", "test", "entry_point"}.

    The first call in a process starts its sandbox. Raises NoIsolation where none can be built and `unsafe` does not say to go without,
    Unjudged when the machine fails twice in a row, and ValueError when truth is neither.
    """
    job = _job(response, truth)
    if len(job["program"]) > PROGRAM_MAX:
        return Verdict(False, f"the program has {len(job['program'])} characters, over the limit of {PROGRAM_MAX}")
    try:
        return _sandbox(os.getpid(), unsafe, limits).run(**job)
    except Unjudged:
        _sandbox.cache_clear()
    return _sandbox(os.getpid(), unsafe, limits).run(**job)


@lru_cache(maxsize=2)
def _sandbox(pid: int, unsafe: bool, limits: Limits) -> Sandbox:
    """By process: a forked worker that shared its parent's launcher would read its parent's verdicts."""
    return Sandbox(limits, unsafe=unsafe)


def _job(response: str, truth: Any) -> dict[str, Any]:
    program = extract(response)
    if isinstance(truth, Mapping) and _strings(truth.get("tests")):
        return {"program": program, "tests": "\n".join(truth["tests"])}
    if isinstance(truth, Mapping) and _strings([truth.get(key) for key in ("prompt", "test", "entry_point")]):
        prompt, name = truth["prompt"], truth["entry_point"]
        stub = f"{prompt}\n    pass\n"
        whole = f"{stub}\n{program}" if _defines(program, name) else prompt + program
        return {"program": whole, "tests": truth["test"], "setup": stub, "entry_point": name}
    wanted = '{"tests": [lines]} or HumanEval\'s {"prompt", "test", "entry_point"}'
    raise ValueError(f"truth={truth!r:.80} is not for verifier=code; give {wanted}")


def _defines(program: str, name: str) -> bool:
    """By its text: whether it parses is found out in the sandbox."""
    return re.search(rf"^(?:(?:async )?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*=", program, re.MULTILINE) is not None


def _strings(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) > 0 and all(isinstance(value, str) for value in values)


def extract(response: str) -> str:
    """The program in a response; a block that the response leaves open ends with it."""
    blocks = [(match[1].lower(), match[2]) for match in FENCE.finditer(response)]
    python = [body for language, body in blocks if language in ("python", "python3", "py")]
    return (python or [body for _, body in blocks] or [response])[-1]
