"""MMLU: the most likely of four letters, after five examples from the same subject.

Hendrycks et al., "Measuring massive multitask language understanding" (arXiv 2009.03300), with the prompt of the repository
hendrycks/test. Rows come from a Hugging Face dataset, or from a folder with that repository's files: SUBJECT_dev.csv for examples, and
SUBJECT_test.csv (or _val) for questions.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from engine.data.rows import Source, read_rows
from engine.evals.suite import Item, Row, Suite

LETTERS = ("A", "B", "C", "D")


def rows(source: Source) -> Iterator[tuple[str, Row]]:
    """(where, row) for each question, with row = {"subject", "question", "choices", "answer": 0 to 3, "examples": rows of its subject}."""
    folder = Path(source.path)
    if folder.is_dir() and any(folder.glob("*_dev.csv")):
        yield from _folder(folder)
        return
    examples: dict[str, list[Row]] = defaultdict(list)
    for _, row in read_rows(replace(source, split="dev")):
        examples[row["subject"]].append(row)
    for where, row in read_rows(source):
        yield where, row | {"examples": examples[row["subject"]]}


def _folder(folder: Path) -> Iterator[tuple[str, Row]]:
    for dev in sorted(folder.glob("*_dev.csv")):
        subject = dev.stem.removesuffix("_dev")
        examples = [row for _, row in _table(dev, subject)]
        files = [dev.with_name(f"{subject}_{part}.csv") for part in ("test", "val")]
        questions = next((file for file in files if file.is_file()), None)
        if questions is None:
            raise ValueError(f"{dev} has neither {files[0].name} nor {files[1].name} next to it; add the file with the questions")
        for where, row in _table(questions, subject):
            yield where, row | {"examples": examples}


def _table(path: Path, subject: str) -> Iterator[tuple[str, Row]]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            if len(cells) != 6 or cells[5] not in LETTERS:
                raise ValueError(f"{path}:{number}: a row must be a question, four choices and a letter from A to D, not {cells!r:.80}")
            yield f"{path}:{number}", {"subject": subject, "question": cells[0], "choices": cells[1:5], "answer": LETTERS.index(cells[5])}


def question_text(row: Row) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}\n{choices}Answer:"


def item(row: Row, chat: bool) -> Item:
    subject = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    questions = [question_text(each) for each in (*row["examples"], row)]
    questions[0] = head + questions[0]
    letters = [LETTERS[example["answer"]] for example in row["examples"]]
    return Item(questions[-1], row["answer"], tuple(zip(questions, letters, strict=False)), LETTERS)


MMLU = Suite(name="mmlu", source=Source("cais/mmlu", split="test", name="all"), item=item, rows=rows)
