"""HumanEval: pass@1 and pass@10, by the unbiased estimator, from 20 samples at temperature 0.8.

Chen et al., "Evaluating large language models trained on code" (arXiv 2107.03374): a base model completes the function and stops where a
new top-level statement begins (the paper's five stop strings). A chat model is prompted for the whole function in a code block (our
wording). The verifier accepts both.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.rows import Source
from engine.evals.generation import Decoding
from engine.evals.statistics import pass_at_k
from engine.evals.suite import Item, Row, Scores, Suite

KS = (1, 10)
CHAT_PROMPT = (
    "Complete this Python function. Answer with the whole function, its imports included, in one ```python block.\n\n```python\n{}```"
)


def item(row: Row, chat: bool) -> Item:
    truth = {name: row[name] for name in ("prompt", "test", "entry_point")}
    return Item(CHAT_PROMPT.format(row["prompt"]) if chat else row["prompt"], truth)


def scores(verdicts: Sequence[Sequence[bool]]) -> Scores:
    samples, correct = len(verdicts), sum(verdict[0] for verdict in verdicts)
    return {f"pass@{k}": [pass_at_k(samples, correct, k)] for k in KS if k <= samples}


HUMANEVAL = Suite(
    name="humaneval",
    source=Source("openai/openai_humaneval", split="test"),
    item=item,
    decoding=Decoding(max_tokens=512, n=20, temperature=0.8, top_p=0.95, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
    verifiers=("code",),
    scores=scores,
)
