"""Word problems: correct answers, disjoint held-out arithmetic, and long problems that guessing does not solve."""

from __future__ import annotations

import re
import zlib
from collections import Counter

from engine.data.rows import Source, read_rows
from engine.data.wordproblems import LONG, demonstrations, problems, tasks, write


def chain(row: dict) -> str:
    """The arithmetic of a problem, such as "10*2-4", parsed from its worked answer."""
    steps = re.findall(r"(\d+) ([-+*]) (\d+) = ", row["messages"][1]["content"])
    return steps[0][0] + "".join(operator + operand for _, operator, operand in steps)


def test_word_problems_are_worked_right():
    rows = problems(500, seed=0)
    for question, answer in (tuple(message["content"] for message in row["messages"]) for row in rows):
        assert re.fullmatch(r"(\w+) has \d+ (\w+)(, [\w ]+)*( and [\w ]+)\. How many \2 does \1 have now\?", question)
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", answer)
        values = [int(steps[0][0]), *(int(step[3]) for step in steps)]
        operation = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        for before, (_, operator, operand, after) in zip(values, steps, strict=False):
            assert operation[operator](before, int(operand)) == int(after)
        assert all(1 <= value <= 39 for value in values)
        assert answer.endswith(f"Answer: {values[-1]}")
        numbers = [steps[0][0], *(operand for _, operator, operand, _ in steps if operator != "*")]
        assert re.findall(r"\d+", question) == numbers
        assert question.count("doubles them") == sum(operator == "*" for _, operator, _, _ in steps)
    assert Counter(len(re.findall("=", row["messages"][1]["content"])) for row in rows).keys() == {1, 2, 3}


def test_held_out_problems_share_no_arithmetic(tmp_path):
    training, held_out = problems(2000, seed=0), problems(300, seed=0, held_out=True)
    assert not {chain(row) for row in training} & {chain(row) for row in held_out}
    assert all(zlib.crc32(chain(row).encode()) % 10 == 0 for row in held_out)
    assert training[:5] == problems(5, seed=0) != problems(5, seed=1)
    write(tmp_path / "rows.jsonl", training)
    assert [row for _, row in read_rows(Source(str(tmp_path / "rows.jsonl")))] == training


def test_long_problems_cannot_be_guessed_but_worked_out():
    """55 % of the demonstrations show no work; for 2000 rows, the standard error of this share is 1.1 points."""
    rows = demonstrations(2000, 0, kind=LONG)
    asked, message = ([row["messages"][i]["content"] for row in rows] for i in (0, 1))
    operands = [re.findall(r"\d+", question)[1:] for question in asked]
    assert all(len(set(each)) == len(each) for each in operands)
    assert {len(each) + question.count("doubles") for each, question in zip(operands, asked, strict=True)} == {3, 4}
    truths = [task["truth"] for task in tasks(300, 7, kind=LONG)]
    assert len(set(truths)) > 80
    assert all(1 <= int(truth) <= 99 for truth in truths)
    worked = [answer for answer in message if "=" in answer]
    assert all(re.fullmatch(r"Answer: \d+", answer) for answer in message if "=" not in answer)
    assert abs(len(worked) / len(rows) - 0.45) < 0.04
