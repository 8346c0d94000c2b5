"""GSM8K with eight chain-of-thought examples, like lm-eval's task `gsm8k_cot` (version 3).

The examples are those of Wei et al., "Chain-of-thought prompting elicits reasoning in large language models" (arXiv 2201.11903, table 20).
Prompt, stop strings, greedy decoding and 256 tokens are lm-eval's. So are the two metrics: `strict` requires "The answer is N" (without
the final any-character of lm-eval's pattern, which removes a digit if the answer ends the response), `flexible` uses the last number, like
the verifier.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from engine.data.rows import Source
from engine.evals.generation import Decoding
from engine.evals.suite import Item, Row, Scores, Suite
from engine.verify.numbers import ascii_signs

EXAMPLES = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, there will be 21 trees. "
        "How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have been 21 - 15 = 6. "
        "The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, they had 74 - 35 = 39. "
        "The answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. The answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. The answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, from monday to thursday. "
        "How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 computers were added. "
        "9 + 20 is 29. The answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. "
        "How many golf balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, "
        "he had 35 - 2 = 33 golf balls. The answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars left. 23 - 15 is 8. "
        "The answer is 8.",
    ),
)
ANSWER = re.compile(r"The answer is (-?[\d.,]+)")


def question_text(question: str) -> str:
    return f"Q: {question}\nA:"


SHOTS = tuple((question_text(question), answer) for question, answer in EXAMPLES)


def item(row: Row, chat: bool) -> Item:
    return Item(question_text(row["question"]), row["answer"].split("####")[-1].strip(), SHOTS)


def cases(item: Item, response: str) -> list[tuple[str, Any]]:
    return [(response, item.truth), (strict_answer(response), item.truth)]


def strict_answer(response: str) -> str:
    """The number after the first "The answer is"; empty if there is none."""
    found = ANSWER.search(ascii_signs(response))
    return found[1] if found else ""


def scores(verdicts: Sequence[Sequence[bool]]) -> Scores:
    return {"flexible": [float(v[0]) for v in verdicts], "strict": [float(v[1]) for v in verdicts]}


GSM8K = Suite(
    name="gsm8k",
    source=Source("openai/gsm8k", split="test", name="main"),
    item=item,
    decoding=Decoding(max_tokens=256, stop=("Q:", "</s>", "<|im_end|>")),
    verifiers=("gsm8k",),
    cases=cases,
    scores=scores,
)
