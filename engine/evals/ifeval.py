"""IFEval: share of prompts with all instructions followed (prompt level) and of instructions followed, each strict and loose.

Zhou et al., "Instruction-following evaluation for large language models" (arXiv 2311.07911). The limit of 1,280 tokens is lm-eval's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.data.rows import Source
from engine.evals.generation import Decoding
from engine.evals.suite import Item, Row, Scores, Suite


def item(row: Row, chat: bool) -> Item:
    return Item(row["prompt"], {name: row[name] for name in ("instruction_id_list", "kwargs", "prompt")})


def cases(item: Item, response: str) -> list[tuple[str, Any]]:
    """One case per instruction."""
    ids, kwargs = item.truth["instruction_id_list"], item.truth["kwargs"]
    return [(response, item.truth | {"instruction_id_list": [id_], "kwargs": [each]}) for id_, each in zip(ids, kwargs, strict=True)]


def scores(verdicts: Sequence[Sequence[bool]]) -> Scores:
    """The four metrics. The first half of a response's verdicts is strict, the second loose."""
    values: Scores = {f"{level}, {mode}": [] for level in ("prompt", "instruction") for mode in ("strict", "loose")}
    for verdict in verdicts:
        half = len(verdict) // 2
        for mode, followed in (("strict", verdict[:half]), ("loose", verdict[half:])):
            values[f"prompt, {mode}"].append(float(all(followed)))
            values[f"instruction, {mode}"] += map(float, followed)
    return values


IFEVAL = Suite(
    name="ifeval",
    source=Source("google/IFEval"),
    item=item,
    decoding=Decoding(max_tokens=1280),
    verifiers=("ifeval", "ifeval_loose"),
    cases=cases,
    scores=scores,
)
