"""python -m benchmarks svamp: Write the data of the svamp recipes: SFT, RLVR and held-out problems from SVAMP (arXiv 2103.07191).

Writes demonstrations.jsonl (problems with worked answers, for SFT), tasks.jsonl (other problems with the final answer only, for RLVR) and
held_out.jsonl. SVAMP uses each of some hundred stories several times, with different numbers and questions, so problems of one story may be
in several files.
"""

from __future__ import annotations

import argparse
import ast
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from engine.data.rows import Source, read_rows
from engine.data.wordproblems import write

DEMONSTRATED = 200
HELD_OUT_SHARE = 4  # one in 4 problems is held out
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}

Row = dict[str, Any]


def parts(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each file, in the order of `rows`. Problems whose equation does not give their answer are dropped."""
    files: dict[str, list[Row]] = {"demonstrations": [], "tasks": [], "held_out": []}
    for row in rows:
        value, steps = worked(row["Equation"])
        if value != row["Answer"]:
            continue
        body = row["Body"].strip()
        prompt, truth = f"{body}{'' if body.endswith('.') else ','} {row['Question'].strip()}", _plain(value)
        if zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0:
            files["held_out"].append({"prompt": prompt, "truth": truth})
        elif len(files["demonstrations"]) < DEMONSTRATED:
            files["demonstrations"].append({"prompt": prompt, "response": "\n".join(steps)})
        else:
            files["tasks"].append({"prompt": prompt, "truth": truth})
    return files


def worked(equation: str) -> tuple[Fraction, list[str]]:
    """The value of an equation and its steps, for example of "( ( 7.0 - 3.0 ) * 2.0 )": 8 and ["7 - 3 = 4", "4 * 2 = 8"]."""
    return _worked(ast.parse(equation, mode="eval").body)


def _worked(node: ast.expr) -> tuple[Fraction, list[str]]:
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value)), []
    assert isinstance(node, ast.BinOp), ast.dump(node)
    (left, left_steps), (right, right_steps), sign = _worked(node.left), _worked(node.right), OPERATORS[type(node.op)]
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left / (right or 1)}[sign]
    return value, [*left_steps, *right_steps, f"{_plain(left)} {sign} {_plain(right)} = {_plain(value)}"]


def _plain(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("problems", help='SVAMP as jsonl: {"Body", "Question", "Equation", "Answer"}')
    parser.add_argument("out", type=Path, help="output folder")


def main(arguments: argparse.Namespace) -> None:
    """Write the three files and print how many rows each has."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts(row for _, row in read_rows(Source(arguments.problems))).items():
        write(arguments.out / f"{name}.jsonl", rows)
        print(f"{arguments.out / name}.jsonl: {len(rows)} rows")
