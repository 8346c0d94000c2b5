"""`ifeval`, `ifeval_loose`: a response follows the instructions in its prompt, checked by rules (Zhou et al., arXiv 2311.07911).

truth = {"instruction_id_list": [id …], "kwargs": [{…} …], "prompt": text}, an unchanged row of the data set. A response is correct if it
follows all instructions: unmodified ("ifeval", strict), or each in at least one of eight variants of it ("ifeval_loose").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.verify.ifeval.instructions import INSTRUCTIONS
from engine.verify.pool import alone
from engine.verify.shown import shown
from engine.verify.verdict import Verdict, Verifier

Truth = Mapping[str, Any]
LONG = 20_000  # characters to check, over all instructions; more may take seconds and run in a worker with a time limit
LONG_TRUTH = 2_000  # characters of all arguments; searching for longer keywords is not linear


def follows(response: str, truth: Truth, variants: Callable[[str], list[str]]) -> list[bool]:
    """For each instruction of `truth`, whether one of `variants(response)` follows it. Blank variants follow none."""
    texts = [text for text in dict.fromkeys(variants(response)) if text.strip()]
    instructions = zip(truth["instruction_id_list"], truth["kwargs"], strict=True)
    return [any(INSTRUCTIONS[name].followed(text, **_given(arguments)) for text in texts) for name, arguments in instructions]


def strict(response: str) -> list[str]:
    """The unmodified response only."""
    return [response]


def loose(response: str) -> list[str]:
    """Eight variants: with and without the first line, the last line and asterisks."""
    lines = response.split("\n")
    kept = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*kept, *(text.replace("*", "") for text in kept)]


def verify(response: str, truth: Truth) -> Verdict:
    """Whether the unmodified response follows every instruction."""
    return _judge_strict(response, truth) if _is_quick(response, truth) else alone(IFEVAL, response, truth)


def verify_loose(response: str, truth: Truth) -> Verdict:
    """Whether each instruction is followed by at least one of the eight variants, not necessarily the same one."""
    return _judge_loose(response, truth) if _is_quick(response, truth) else alone(IFEVAL_LOOSE, response, truth)


def _is_quick(response: str, truth: Truth) -> bool:
    values = [value for arguments in truth["kwargs"] for value in arguments.values()]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return len(response) * len(truth["instruction_id_list"]) < LONG and sum(map(len, texts)) < LONG_TRUTH


def check(truth: Any) -> None:
    """Raises ValueError, which names the field, for an unknown instruction or for missing, unknown or invalid arguments."""
    if not isinstance(truth, dict):
        raise ValueError(f"truth={shown(truth)} must be an object with instruction_id_list and kwargs")
    names, given = truth.get("instruction_id_list"), truth.get("kwargs")
    if not isinstance(names, list) or not names:
        raise ValueError(f"truth.instruction_id_list={shown(names)} must be a list of at least one instruction")
    if not isinstance(given, list) or len(given) != len(names):
        raise ValueError(f"truth.kwargs={shown(given)} must be a list of {len(names)} objects, one per instruction")
    for place, (name, arguments) in enumerate(zip(names, given, strict=True)):
        if not isinstance(name, str) or name not in INSTRUCTIONS:
            raise ValueError(f"truth.instruction_id_list[{place}]={shown(name)} is unknown; use one of {', '.join(sorted(INSTRUCTIONS))}")
        _check_arguments(name, arguments, f"truth.kwargs[{place}]")


def _check_arguments(name: str, arguments: Any, where: str) -> None:
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}={shown(arguments)} must be an object with the arguments of {name}")
    expected, given = INSTRUCTIONS[name].arguments, _given(arguments)
    if set(given) != set(expected):
        raise ValueError(f"{where} has {shown(sorted(map(str, given)))}; {name} takes {sorted(expected)}")
    for argument, kind in expected.items():
        if not kind.holds(given[argument]):
            raise ValueError(f"{where}.{argument}={shown(given[argument])} must be {kind.what}")


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not null. Tables of the data set have a column for every argument of every instruction."""
    return {name: value for name, value in arguments.items() if value is not None}


def _judge_strict(response: str, truth: Truth) -> Verdict:
    return _verdict(truth, follows(response, truth, strict))


def _judge_loose(response: str, truth: Truth) -> Verdict:
    return _verdict(truth, follows(response, truth, loose))


def _verdict(truth: Truth, followed: list[bool]) -> Verdict:
    missed = [name for name, ok in zip(truth["instruction_id_list"], followed, strict=True) if not ok]
    return Verdict(not missed, f"does not follow {', '.join(missed)}" if missed else f"follows all {len(followed)}")


IFEVAL = Verifier("ifeval", verify, check, judge=_judge_strict)
IFEVAL_LOOSE = Verifier("ifeval_loose", verify_loose, check, judge=_judge_loose)
