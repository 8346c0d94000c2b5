"""`code`: the response's program passes every test, in a sandbox (sandbox.py). All or nothing: a share of tests is no share of a program.

The program is the last ```python block, else the last fenced block, else the whole response. For HumanEval it continues the prompt
unless it defines the entry point itself; the prompt's imports and helpers are there either way, and the tests use the prompt's own, never
the program's. Programs have the standard library of the Python that runs the engine, and no packages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

from engine.verify.sandbox.host import Sandbox
from engine.verify.sandbox.inside.namespaces import Limits
from engine.verify.verdict import Unjudged, Verdict, Verifier

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
HUMANEVAL = ("prompt", "test", "entry_point")
PROGRAM_MAX = 1 << 20  # characters
LIMITS = Limits()


def verify(response: str, truth: Any, *, unsafe: bool = False, limits: Limits = LIMITS) -> Verdict:
    """Runs the response's program against truth: {"tests": [lines]}, or HumanEval's {"prompt", "test", "entry_point"}.

    The first call in a process starts its sandbox. Raises NoIsolation, an Unjudged, where none can be built and `unsafe` does not say to go
    without; Unjudged when the machine fails twice in a row.
    """
    job = _job(extract(response), truth)
    if len(job["program"]) > PROGRAM_MAX:
        return Verdict(False, f"the program has {len(job['program'])} characters, over the limit of {PROGRAM_MAX}")
    try:
        return _sandbox(os.getpid(), unsafe, limits).run(**job)
    except Unjudged:
        _sandbox.cache_clear()
    return _sandbox(os.getpid(), unsafe, limits).run(**job)


def check(truth: Any, *, unsafe: bool = False) -> None:
    """Raises ValueError unless `truth` holds tests and this machine can hold programs."""
    if not isinstance(truth, Mapping) or not (_strings(truth.get("tests")) or _strings([truth.get(key) for key in HUMANEVAL])):
        wanted = '{"tests": [lines]} or HumanEval\'s {"prompt", "test", "entry_point"}'
        raise ValueError(f"truth={truth!r:.80} is not for verifier=code; give {wanted}")
    _sandbox(os.getpid(), unsafe, LIMITS)


@lru_cache(maxsize=2)
def _sandbox(pid: int, unsafe: bool, limits: Limits) -> Sandbox:
    """By process: a forked worker that shared its parent's launcher would read its parent's verdicts."""
    return Sandbox(limits, unsafe=unsafe)


def _job(program: str, truth: Mapping[str, Any]) -> dict[str, Any]:
    if _strings(truth.get("tests")):
        return {"program": program, "tests": "\n".join(truth["tests"])}
    prompt, test, name = (truth[key] for key in HUMANEVAL)
    stub = f"{prompt}\n    pass\n"
    whole = f"{stub}\n{program}" if _defines(program, name) else prompt + program
    return {"program": whole, "tests": test, "setup": stub, "entry_point": name}


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


# The sandbox keeps its own time; the pool's is for a sandbox that was lost and started again.
CODE = Verifier("code", verify, check, judge=verify, limit_s=60.0)
# Not among the names: a data set may ask for a verifier, and only the user may ask for this one.
UNSAFE_CODE = Verifier("code", partial(verify, unsafe=True), partial(check, unsafe=True), judge=partial(verify, unsafe=True), limit_s=60.0)
