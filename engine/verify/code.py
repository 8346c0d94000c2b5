"""`code`: the response's program passes all tests, in a sandbox (engine/verify/sandbox). No partial credit.

The program is the last ```python block, else the last fenced block, else the whole response. For HumanEval, it continues the prompt
unless it defines the entry point itself. The prompt's imports and helpers are available in both cases, and the tests use those of the
prompt, never the program's. Programs can import the standard library of the Python that runs the engine, but no packages.
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
    """Runs the response's program against the tests in truth: {"tests": [lines]}, or HumanEval's {"prompt", "test", "entry_point"}.

    The first call in a process starts its sandbox. `unsafe` runs the program without isolation. Raises NoIsolation (an Unjudged) if no
    sandbox can be created and `unsafe` is not set, and Unjudged if the machine fails twice in a row.
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
    """Raises ValueError unless `truth` contains tests and a sandbox can be created on this machine."""
    if not isinstance(truth, Mapping) or not (_strings(truth.get("tests")) or _strings([truth.get(key) for key in HUMANEVAL])):
        expected = '{"tests": [lines]} or HumanEval\'s {"prompt", "test", "entry_point"}'
        raise ValueError(f"truth={truth!r:.80} has no tests for verifier=code; give {expected}")
    _sandbox(os.getpid(), unsafe, LIMITS)


@lru_cache(maxsize=2)
def _sandbox(pid: int, unsafe: bool, limits: Limits) -> Sandbox:
    """Keyed by pid, because a forked worker must not share its parent's launcher."""
    return Sandbox(limits, unsafe=unsafe)


def _job(program: str, truth: Mapping[str, Any]) -> dict[str, Any]:
    if _strings(truth.get("tests")):
        return {"program": program, "tests": "\n".join(truth["tests"])}
    prompt, test, name = (truth[key] for key in HUMANEVAL)
    stub = f"{prompt}\n    pass\n"
    whole = f"{stub}\n{program}" if _defines(program, name) else prompt + program
    return {"program": whole, "tests": test, "setup": stub, "entry_point": name}


def _defines(program: str, name: str) -> bool:
    """Whether the text of `program` defines `name`. It may not parse."""
    return re.search(rf"^(?:(?:async )?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*=", program, re.MULTILINE) is not None


def _strings(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) > 0 and all(isinstance(value, str) for value in values)


def extract(response: str) -> str:
    """The program in a response. An unclosed block extends to the end."""
    blocks = [(match[1].lower(), match[2]) for match in FENCE.finditer(response)]
    python = [body for language, body in blocks if language in ("python", "python3", "py")]
    return (python or [body for _, body in blocks] or [response])[-1]


# The sandbox has its own time limit; this one covers a sandbox that is lost and restarted.
CODE = Verifier("code", verify, check, judge=verify, limit_s=60.0)
# Not in VERIFIERS: data rows can select a verifier, but only the user may select this one.
UNSAFE_CODE = Verifier("code", partial(verify, unsafe=True), partial(check, unsafe=True), judge=partial(verify, unsafe=True), limit_s=60.0)
