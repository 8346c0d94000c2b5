"""IFEval: are the instructions of a prompt followed, all of them (prompt level) and each (instruction level), strictly and loosely.

Zhou et al., "Instruction-following evaluation for large language models" (arXiv 2311.07911). Loosely (section 2.2): in the response, or in
it without its first line, its last line, both, each with and without asterisks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.data.rows import Source
from engine.evals.generation import Decoding
from engine.evals.suite import Item, Row, Scores, Suite

READINGS = 8  # of a response: the first is strict, all of them loose


def item(row: Row, chat: bool) -> Item:
    """Its truth is the verifier's; a dataset that gives every keyword to every instruction leaves those not meant None."""
    kwargs = [{name: value for name, value in each.items() if value is not None} for each in row["kwargs"]]
    return Item(row["prompt"], {"instruction_id_list": row["instruction_id_list"], "kwargs": kwargs, "prompt": row["prompt"]})


def readings(response: str) -> list[str]:
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [text for each in cut for text in (each, each.replace("*", ""))]


def cases(item: Item, response: str) -> list[tuple[str, Any]]:
    """Each instruction on its own, in each reading."""
    ids, kwargs, prompt = (item.truth[name] for name in ("instruction_id_list", "kwargs", "prompt"))
    alone = [{"instruction_id_list": [id_], "kwargs": [each], "prompt": prompt} for id_, each in zip(ids, kwargs, strict=True)]
    return [(text, truth) for truth in alone for text in readings(response)]


def scores(verdicts: Sequence[Sequence[bool]]) -> Scores:
    found: Scores = {f"{level}, {how}": [] for level in ("prompt", "instruction") for how in ("strict", "loose")}
    for verdict in verdicts:
        by_instruction = [verdict[i : i + READINGS] for i in range(0, len(verdict), READINGS)]
        for how, followed in (("strict", [each[0] for each in by_instruction]), ("loose", [any(each) for each in by_instruction])):
            found[f"prompt, {how}"].append(float(all(followed)))
            found[f"instruction, {how}"] += map(float, followed)
    return found


IFEVAL = Suite(
    name="ifeval",
    source=Source("google/IFEval", split="train"),
    item=item,
    decoding=Decoding(max_tokens=1280),
    verifier="ifeval",
    cases=cases,
    scores=scores,
)
