"""`ifeval` and `ifeval_loose` beside lm-eval's task `ifeval`, with NLTK's own splitting of sentences and words.

Responses are random combinations of fragments that the rules of some instruction look at; each is checked against all 25 instructions,
strict and loose. lm-eval reads null, 0 and "" alike, as "choose a value at random"; no argument here is 0. Its language detection is random
unless it is seeded.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from engine.verify.ifeval import loose, verify, verify_loose
from engine.verify.ifeval.instructions import INSTRUCTIONS
from tests.peers.nltk_data import write_punkt_tab
from tests.support.paths import SHARED

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install -e '.[peers]'")
nltk = pytest.importorskip("nltk", reason="NLTK is not installed; pip install -e '.[peers]'")
immutabledict = pytest.importorskip("immutabledict", reason="lm-eval[ifeval] is not installed; pip install -e '.[peers]'")

IFEVAL_DATA = SHARED / "ifeval.jsonl"
PROMPT = "Write a letter about the river."
RESPONSES = 90
GERMAN = "Das Wetter war heute Morgen schön, und wir gingen eine Stunde am Fluss entlang."
LOWER = "the weather was nice this morning and we walked along the river for an hour"
FRAGMENTS = [
    "The weather was nice this morning, and we walked along the river for an hour.",
    LOWER,
    f"{LOWER.upper()}.",
    GERMAN,
    "आज सुबह मौसम अच्छा था और हम नदी के किनारे टहलने गए।",
    PROMPT,
    PROMPT.upper(),
    '"We walked along the river for an hour,"',
    '"',
    "Dr. Smith went to Washington at 5 p.m. on Jan. 3. He didn't say why.",
    'What?! No... It is 3.5 km away. (Really.) He said "Yes." Then he left.',
    "I'll meet NATO's chief; it's A-OK, and the U.S.A. won't mind. CAN'T WE GO?",
    "CANNOT stop. Gonna win. 'Tis the END.",
    "P.S. Bring the dog.",
    "p. s. the cat too",
    "P.P.S. And the tickets.",
    "* one point",
    "- another point",
    "  * an indented point",
    "** not a bullet",
    "*",
    "*a highlight* of the day",
    "**a bold highlight** and * * nothing",
    "<<The river>>",
    "<< >> or <<>",
    "[name] lives in [city]",
    "[ ] and [[x]]",
    "SECTION 1 begins here",
    "Section 2",
    "Section3 and section 4",
    '{"river": "long", "length": [1, 2]}',
    '```json\n{"river": 1}\n```',
    "```",
    "My answer is yes.",
    "My answer is maybe",
    "***",
    "******",
    "weekend plans are made.",
    "'Weekend' is near",
    '"weekend", he said',
    "Is there anything else I can help with?",
    "Any other questions?",
    "A résumé, a naïve café — 12 000 people… twelve rivers",
    "quick quiz question",
    "The end",
]
SEPARATORS = ["\n", "\n\n", "\n\n", " ", " ", "\n***\n", "\n******\n", "\r\n", ", "]
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "keywords:existence": [{"keywords": ["river"]}, {"keywords": ["weather", "hour"]}],
    "keywords:frequency": [
        {"keyword": "river", "frequency": 2, "relation": "at least"},
        {"keyword": " the ", "frequency": 3, "relation": "less than"},
    ],
    "keywords:forbidden_words": [{"forbidden_words": ["river", "walk"]}, {"forbidden_words": ["end", "is"]}],
    "keywords:letter_frequency": [
        {"letter": "q", "let_frequency": 2, "let_relation": "at least"},
        {"letter": "E", "let_frequency": 12, "let_relation": "less than"},
    ],
    "language:response_language": [{"language": "en"}, {"language": "de"}, {"language": "hi"}],
    "length_constraints:number_sentences": [{"num_sentences": n, "relation": r} for n in (2, 5) for r in ("at least", "less than")],
    "length_constraints:number_paragraphs": [{"num_paragraphs": n} for n in (1, 2, 3)],
    "length_constraints:number_words": [{"num_words": n, "relation": r} for n in (20, 41) for r in ("at least", "less than")],
    "length_constraints:nth_paragraph_first_word": [
        {"num_paragraphs": n, "nth_paragraph": i, "first_word": w} for n, i, w in ((1, 1, "the"), (2, 2, "weekend"), (3, 2, "the"))
    ],
    "detectable_content:number_placeholders": [{"num_placeholders": n} for n in (1, 2, 3)],
    "detectable_content:postscript": [{"postscript_marker": marker} for marker in ("P.S.", "P.P.S")],
    "detectable_format:number_bullet_lists": [{"num_bullets": n} for n in (1, 2, 3)],
    "detectable_format:constrained_response": [{}],
    "detectable_format:number_highlighted_sections": [{"num_highlights": n} for n in (1, 2, 4)],
    "detectable_format:multiple_sections": [{"section_spliter": s, "num_sections": n} for s in ("Section", "SECTION") for n in (1, 2)],
    "detectable_format:json_format": [{}],
    "detectable_format:title": [{}],
    "combination:two_responses": [{}],
    "combination:repeat_prompt": [{"prompt_to_repeat": PROMPT}],
    "startend:end_checker": [{"end_phrase": "Any other questions?"}, {"end_phrase": " the END"}],
    "startend:quotation": [{}],
    "change_case:capital_word_frequency": [
        {"capital_frequency": n, "capital_relation": r} for n in (1, 6) for r in ("at least", "less than")
    ],
    "change_case:english_capital": [{}],
    "change_case:english_lowercase": [{}],
    "punctuation:no_comma": [{}],
}


class Case(NamedTuple):
    """One instruction, its arguments, and a response to check."""

    instruction: str
    arguments: dict[str, Any]
    response: str


NO_LANGUAGE = "a text of no detectable language is in no language; lm-eval counts it as in every one"
LITERAL = "a keyword is literal text; lm-eval reads it as a pattern"
DEEP_JSON = "JSON nested too deeply for Python is not followed; lm-eval raises RecursionError and stops"
SIGN = "a sign is counted like a letter; lm-eval counts a random letter in its place"
EDGE = "a forbidden word may begin or end with a punctuation mark; lm-eval wants a letter beside it there"
# What each finds, (ours, lm-eval's), strict. None: it raises an exception.
DISAGREEMENTS: list[tuple[Case, tuple[bool, bool | None], str]] = [
    (Case("language:response_language", {"language": "de"}, "1234"), (False, True), NO_LANGUAGE),
    (Case("language:response_language", {"language": "en"}, "🙂🙂"), (False, True), NO_LANGUAGE),
    (Case("keywords:existence", {"keywords": ["a.c"]}, "abc"), (False, True), LITERAL),
    (Case("keywords:existence", {"keywords": ["what?"]}, "wha"), (False, True), LITERAL),
    (Case("keywords:existence", {"keywords": ["f(x)"]}, "f(x) = 2"), (True, False), LITERAL),
    (Case("keywords:existence", {"keywords": [":)"]}, "fine :)"), (True, None), LITERAL),
    (Case("keywords:frequency", {"keyword": "$5", "frequency": 1, "relation": "at least"}, "It costs $5."), (True, False), LITERAL),
    (Case("keywords:frequency", {"keyword": "a|b", "frequency": 2, "relation": "at least"}, "a b"), (False, True), LITERAL),
    (Case("keywords:forbidden_words", {"forbidden_words": ["U.S."]}, "The U.S. won."), (False, True), EDGE),
    (Case("keywords:forbidden_words", {"forbidden_words": ["#1"]}, "We are #1 now"), (False, True), EDGE),
    (Case("keywords:forbidden_words", {"forbidden_words": ["a.b"]}, "see axb"), (True, False), LITERAL),
    (Case("keywords:letter_frequency", {"letter": "#", "let_frequency": 3, "let_relation": "at least"}, "###"), (True, False), SIGN),
    (Case("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, "!!!"), (False, True), SIGN),
    (Case("keywords:letter_frequency", {"letter": "é", "let_frequency": 1, "let_relation": "at least"}, "é"), (True, False), SIGN),
    (Case("detectable_format:multiple_sections", {"section_spliter": "Part.", "num_sections": 1}, "Part2 1"), (False, True), LITERAL),
    (Case("detectable_format:json_format", {}, "[" * 100_000), (False, None), DEEP_JSON),
]


@pytest.fixture(scope="module", autouse=True)
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """NLTK finds its English model, and langdetect is deterministic."""
    from langdetect import DetectorFactory

    folder = tmp_path_factory.mktemp("nltk_data")
    write_punkt_tab(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(folder)])
        patch.setattr(DetectorFactory, "seed", 0)
        yield


def ours(case: Case) -> tuple[bool, bool]:
    truth = {"instruction_id_list": [case.instruction], "kwargs": [case.arguments], "prompt": PROMPT}
    return verify(case.response, truth).correct, verify_loose(case.response, truth).correct


def theirs(case: Case) -> tuple[bool, bool]:
    from lm_eval.tasks.ifeval.utils import process_results  # type: ignore[import-not-found]

    row = {"key": 0, "instruction_id_list": [case.instruction], "prompt": PROMPT, "kwargs": [case.arguments]}
    found = process_results(row, [case.response])
    return found["prompt_level_strict_acc"], found["prompt_level_loose_acc"]


def responses(count: int) -> list[str]:
    """Combinations of one to seven fragments, a function of `count` alone."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        parts = draw.choices(FRAGMENTS, k=draw.randint(1, 7))
        made.append("".join(part + draw.choice(SEPARATORS) for part in parts[:-1]) + parts[-1])
    return made


def has_language(text: str) -> bool:
    """Whether every loose variant of `text` has letters, by which its language can be detected. For others: DISAGREEMENTS."""
    return all(any(letter.isalpha() for letter in variant) for variant in loose(text) if variant.strip())


def differences(cases: list[Case]) -> list[tuple[Case, tuple[bool, bool], tuple[bool, bool]]]:
    compared = [(case, ours(case), theirs(case)) for case in cases]
    return [found for found in compared if found[1] != found[2]]


def test_every_instruction_is_compared() -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT  # type: ignore[import-not-found]

    assert set(ARGUMENTS) == set(INSTRUCTIONS) == set(INSTRUCTION_DICT)
    assert len(ARGUMENTS) == 25


@pytest.mark.parametrize("instruction", ARGUMENTS)
def test_an_instruction_is_followed_where_it_is_in_lm_eval(instruction: str) -> None:
    """At least one response follows each instruction, and one does not."""
    texts = [*FRAGMENTS, *responses(RESPONSES)]
    if instruction in ("language:response_language", "change_case:english_capital", "change_case:english_lowercase"):
        texts = [text for text in texts if has_language(text)]
    cases = [Case(instruction, arguments, text) for arguments in ARGUMENTS[instruction] for text in texts]
    assert len(cases) >= 100
    assert differences(cases) == []
    assert {ours(case)[0] for case in cases} == {True, False}


@pytest.mark.parametrize(("case", "verdicts", "reason"), DISAGREEMENTS, ids=str)
def test_disagreements(case: Case, verdicts: tuple[bool, bool | None], reason: str) -> None:
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    if verdicts[1] is None:
        with pytest.raises(Exception):  # noqa: B017
            theirs(case)
        assert ours(case)[0] == verdicts[0]
    else:
        assert (ours(case)[0], theirs(case)[0]) == verdicts, reason


@pytest.mark.skipif(not IFEVAL_DATA.exists(), reason="the data set is not here")
def test_the_instructions_of_the_data_set() -> None:
    """Every instruction of every row, with its real arguments, on two responses of the room."""
    rows = [json.loads(line) for line in IFEVAL_DATA.read_text(encoding="utf-8").splitlines()]
    texts, cases = [text for text in responses(RESPONSES) if has_language(text)], []
    for place, row in enumerate(rows):
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            if arguments.get("letter", "a") not in ("#", "!"):  # signs: DISAGREEMENTS
                cases += [Case(name, arguments, texts[(place + shift) % len(texts)]) for shift in (0, 37)]
    assert len(cases) > 1000
    assert differences(cases) == []
