r"""Which part of a text is its final answer: boxes, statements and formulas, in the order of the text, and empty boxes."""

from __future__ import annotations

import pytest

from engine.verify.final_answer import final_answer
from engine.verify.math import check, verify

COMMITS = [
    (r"So $\boxed{72}$.", "72"),
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{ {a} {b{c}} }", "{a} {b{c}}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed {7}", "7"),
    (r"\boxed 7", "7"),
    (r"\fbox{7}", "7"),
    (r"\\boxed{7}", "7"),
    (r"\boxed{5} but \boxed{6", "5"),
    (r"\boxed{$7$}", "7"),
    (r"\boxed5", "5"),
    (r"\boxed \frac{1}{2}$", r"\frac{1}{2}"),
    (r"\boxed{5}, by the \boxed command", "5"),
    # the later statement counts
    (r"\boxed{7}. The final answer is 8", "8"),
    (r"\boxed{9}, so: The final answer is $12$.", "12"),
    (r"\boxed{9}. The final answer is \(12\).", "12"),
    ("\\boxed{9}\nThe final answer is:\n\\[\n12\n\\]", "12"),
    (r"\boxed{9}. **Final Answer:** 12 inches.", "12 inches"),
    (r"\boxed{9}. The final answer is –12.", "-12"),
    (r"\boxed{9}. The final answer is 12, as shown above.", "12"),
    (r"\boxed{9}. The final answer is 1/2 of the total.", "1/2"),
    (r"\boxed{A}. The final answer is (B)", "(B)"),
    (r"The final answer is $9$. No: \boxed{12}", "12"),
    (r"The final answer is \boxed{12}", "12"),
    # but it must state an answer
    (r"\boxed{5}. I hope my final answer is correct.", "5"),
    (r"\boxed{5}. The final answer is a boxed number, found in 3 steps.", "5"),
    (r"\boxed{5}. The final answer is (see above) 3", "5"),
    (r"\boxed{5}. The final answer is $$.", "5"),
    (r"\boxed{5}. The final answer is $\boxed{}$.", "5"),
    (r"\boxed{5}. The final answer is \boxed{1", "5"),
    (r"\boxed{5}. Final answer:", "5"),
    ("Final Answer: The final answer is $\\frac12$. I hope it is correct.", r"\frac12"),
    ("The final answer is 5. I hope it is correct.", "5"),
    ("the FINAL ANSWER is: 5.", "5"),
    ("The final answer is 4. No: the final answer is 5.\nBye.", "5"),
    ("The final answer is 5, and $x$ was $3$\n", "5"),
    ("The final answer is that $x$ is $3$\n", "3"),
    ("The final answer is 3.5.", "3.5"),
    ("The final answer is 5!", "5!"),
    ("It is $3$ and then $4$.", "4"),
    ("It is $$4$$", "4"),
    (r"It is \(4\).", "4"),
    (r"\[ x = 4 \]", "x = 4"),
    (r"It costs \$5 or \$6", r"It costs \$5 or \$6"),
    ("5", "5"),
    ("  5.  ", "5"),
    ("５", "5"),
    ("", ""),
    (r"\boxed{}", ""),
    ("}{", ""),
    ("It is $4$ or $ $", "4"),
    ("So the answer is 42.", "42"),
    (r"\boxed{\{\}}", r"\{\}"),
    (r"\boxed{\emptyset}", r"\emptyset"),
    (r"\boxed{5}, \boxed{-}", "-"),
]
EMPTY_BOXES = [
    *(
        r"\boxed{}",
        r"\boxed .",
        r"\boxed{.}",
        r"\boxed{\text{}}",
        r"\boxed{ }",
        "\\boxed{\n}",
        r"\boxed{\quad}",
        r"\boxed{\mathrm{}}",
        r"\boxed{~}",
    ),
    *(
        r"\boxed{\,}",
        r"\boxed{\ }",
        r"\boxed{\text{ }}",
        r"\boxed{\textbf{\quad}}",
        r"\boxed{$ $}",
        r"\boxed{{}}",
        r"\boxed{\boxed{}}",
        r"\fbox{}",
    ),
    *(
        r"\boxed{\phantom{5}}",
        r"\boxed{\hspace{1cm}}",
        r"\boxed{\displaystyle}",
        r"\boxed{\left(\right)}",
        r"\boxed{?}",
        r"\boxed{\_\_}",
        "\\boxed{\u200b}",
    ),
    *(
        r"\boxed{\ldots}",
        r"\boxed{\operatorname{}}",
        r"\boxed{\underline{\hspace{1cm}}}",
        r"\boxed{\color{red}}",
        "\\boxed{\u00a0}",
        r"\boxed{,}",
    ),
]


@pytest.mark.parametrize(("response", "answer"), COMMITS)
def test_what_a_response_commits_to(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize("box", EMPTY_BOXES)
def test_an_empty_box_hides_no_answer(box: str) -> None:
    assert final_answer(rf"So \boxed{{12}} and {box}") == "12"
    assert final_answer(f"So $12$, {box}") == "12"
    assert final_answer(f"The final answer is $12$. {box}") == "12"
    assert final_answer(f"{box} The final answer is 12.") == "12"
    assert final_answer(rf"{box} \boxed{{12}}") == "12"
    assert not verify(box, "12").correct
    with pytest.raises(ValueError, match="must be a string with an answer"):
        check(box)


def test_an_answer_cannot_be_hedged() -> None:
    offers = [
        r"$5$ \boxed{5} The final answer is 6.",
        r"$5$ The final answer is 5. \boxed{6}",
        r"\boxed{5} \boxed{6} $5$",
        "The answer is 5. $6$",
    ]
    assert [verify(response, "5").correct for response in offers] == [False] * 4
