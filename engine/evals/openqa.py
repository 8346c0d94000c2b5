"""Open questions, correct if the response contains a known answer: PopQA and NQ-Open.

Mallen et al., "When not to trust language models" (arXiv 2212.10511), whose prompt this is, without examples. Lee et al., "Latent retrieval
for weakly supervised open domain question answering" (arXiv 1906.00300).
"""

from __future__ import annotations

import json
from functools import partial

from engine.data.rows import Source
from engine.evals.generation import Decoding
from engine.evals.suite import Item, Row, Suite


def item(row: Row, chat: bool) -> Item:
    answers = row["answer"] if "answer" in row else json.loads(row["possible_answers"])  # PopQA stores the list as JSON text
    return Item(row["question"] if chat else f"Q: {row['question']} A:", answers)


_suite = partial(Suite, item=item, decoding=Decoding(max_tokens=32, stop=("\n", "Q:")), verifiers=("contains",))

POPQA = _suite(name="popqa", source=Source("akariasai/PopQA", split="test"))
NQ_OPEN = _suite(name="nq_open", source=Source("google-research-datasets/nq_open", split="validation"))
