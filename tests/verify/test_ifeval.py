"""The ifeval verifiers: every instruction followed and not followed, strict and loose, invalid truths, and exploits."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.verify.ifeval import LONG, LONG_TRUTH, check, loose, verify, verify_loose
from engine.verify.ifeval.instructions import INSTRUCTIONS
from engine.verify.ifeval.language import language_of
from engine.verify.ifeval.tokenize import sentences, words
from tests.support.paths import SHARED

IFEVAL_DATA = SHARED / "ifeval.jsonl"

ENGLISH = "the weather was nice this morning and we walked along the river for an hour"
GERMAN = "Das Wetter war heute Morgen schön und wir gingen eine Stunde am Fluss entlang."
HINDI = "आज सुबह मौसम अच्छा था और हम नदी के किनारे टहलने गए।"
THREE = "one two three"

# (instruction, its arguments, responses that follow it, responses that do not)
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, ["a cat, a dog", "DOG. Cat!", "concatenate a dogma"], ["a cat", "ca t dog", ""]),
    ("keywords:existence", {"keywords": ["C++", "a.b"]}, ["c++ and a.b"], ["c and a.b", "C++ and axb"]),
    (
        "keywords:frequency",
        {"keyword": "so", "frequency": 2, "relation": "at least"},
        ["so so", "Also, so", "so so so"],
        ["so", "none", ""],
    ),
    ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "less than"}, ["so", "none at all"], ["so so", "SO also"]),
    ("keywords:forbidden_words", {"forbidden_words": ["can", "ride"]}, ["we could", "candid rides", "scan"], ["I can", "CAN!", "a ride."]),
    ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, ["C and C+"], ["I like C++.", "c++"]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, ["qq", "Quack q"], ["q", "nothing", ""]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "less than"}, ["none"], ["# title", "##"]),
    ("language:response_language", {"language": "de"}, [GERMAN, GERMAN * 5], [ENGLISH, HINDI, "1234", "!?", ""]),
    ("language:response_language", {"language": "hi"}, [HINDI], [ENGLISH, GERMAN, "12", "🙂🙂"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two. Three.", "Is it? Yes! Good."],
        ["One. Two.", "Dr. Smith went home. He slept.", ""],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One.", "Mr. Smith came."], ["One. Two."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b", "***a***b***", "a***b\n***\n "],
        ["a", "a\n\nb", "a***b***c", "a***\n***b", "", "***"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, [THREE, "a-b c", "1 2 3 4"], ["one two", "...", ""]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two", "!", "मौसम अच्छा"], [THREE, "a-b c"]),
    ("length_constraints:number_words", {"num_words": 2, "relation": "less than"}, ["किनारे", "คำนี้", "cafe\u0301"], ["सुबह मौसम"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["a\n\nweekend b", "a\n\nWeekend, b", "a\n\n'weekend' b", 'a b\n\n"Weekend" c', "a\n\nweekend"],
        ["weekend\n\na", "a\n\nweekends", "a\nweekend", "a\n\nb\n\nweekend", "weekend", "a\n\n\n\nweekend", ""],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[a] [b]", "[a][b][c]", "[[a] []"],
        ["[a]", "[a b", "(a) (b)", "[\n] [x]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Hi\nP.S. more", "p.s. x", "P. S. x"],
        ["PS more", "P.S more", "p.p", ""],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more", "p. p. s"], ["P.S. more", "PPS"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        [
            "* a\n* b",
            "- a\n  - b",
            "* a\n\n- b",
            "*\n- b",
            "* a\n*\nb",
            "*\n* a\n* b",
            "-\n-",
            "*\r\n*\r\n",
            "* \n* ",
            "*a\n*b",
            "*\n\n*\n\n",
        ],
        ["* a", "* a\n* b\n* c", "**a**\n**b**", "", "* a\n*", "*\n* b", "*\n*\n", "*\n**a\n"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well. My answer is no.", "My answer is maybe. Bye"],
        ["yes", "My answer is yes", "my answer is no.", ""],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** *b*", "**a b** **c**", "*a* *b* *c*"],
        ["*a*", "a b", "** **  **", "*a\nb*", ""],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "Section1 Section2 Section3"],
        ["Section 1", "section 1 section 2", "Section one Section two", ""],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": [1]}\n```', "```\n[]\n```", " 5 "],
        ["{'a': 1}", '{"a": 1', 'Here: {"a": 1}', "", "[" * 10**5, '{"a": 1}{"b": 2}'],
    ),
    ("detectable_format:title", {}, ["<<A>>", "x <<a b>>\ny", "<<<a>>>"], ["<a>", "<<>>", "<< >>", "<<a\n>>", ">>a<<", ""]),
    (
        "combination:two_responses",
        {},
        ["a******b", "a\n******\nb", "******a******b******"],
        ["a", "a******a", "a***b", "a******b******c", "a************b", ""],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say hi."},
        ["Say hi. Hi!", "say HI.", "  Say hi.\nHi"],
        ["Hi!", "Hi. Say hi.", "Say h", ""],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "The end."},
        ["So. The end.", "the END.", '"x The end."', "The end.\n"],
        ["The end. Bye", "The end", "", "."],
    ),
    ("startend:quotation", {}, ['"a"', ' "a b"\n', '""'], ['"', '"a', "'a'", 'a "b"', "“a”", ""]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["THE END of it", "A B c", "WELL-KNOWN USA", "U.S. and UK", "I'll see NATO's plan", "CANNOT", "WON'T", "R&D", "A–B", "A/B C"],
        ["THE end", "The End", "WELL-KNOWN", "I'll go", "NATO's", "JOHN/JANE", ""],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, ["none here"], ["ONE here", "I am"]),
    ("change_case:english_capital", {}, [ENGLISH.upper(), f"{ENGLISH.upper()}. 123"], [ENGLISH, GERMAN.upper(), "1234", "", "!!!"]),
    ("change_case:english_lowercase", {}, [ENGLISH, f"{ENGLISH}. 123"], [ENGLISH.title(), ENGLISH.upper(), GERMAN.lower(), "1234", ""]),
    ("punctuation:no_comma", {}, ["no comma", "a; b", "1.000"], ["a, b", ",", "1,000", ""]),
]
FLAT = [(name, arguments, text, ok) for name, arguments, good, bad in CASES for texts, ok in ((good, True), (bad, False)) for text in texts]


def rule(name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"instruction_id_list": [name], "kwargs": [arguments or {}], "prompt": "Do it."}


@pytest.mark.parametrize(("name", "arguments", "response", "followed"), FLAT, ids=lambda value: str(value)[:40])
def test_each_instruction(name: str, arguments: dict[str, Any], response: str, followed: bool) -> None:
    check(rule(name, arguments))
    assert verify(response, rule(name, arguments)).correct is followed


def test_all_25_are_here_with_four_cases_or_more_of_either_kind() -> None:
    counts = Counter(name for name, *_ in FLAT)
    assert len(INSTRUCTIONS) == 25
    assert set(counts) == set(INSTRUCTIONS)
    assert min(counts.values()) >= 4
    assert {(name, ok) for name, _, _, ok in FLAT} == {(name, ok) for name in INSTRUCTIONS for ok in (True, False)}


def test_all_instructions_of_a_prompt_must_be_followed() -> None:
    truth = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "length_constraints:number_words"],
        "kwargs": [{}, {}, {"num_words": 2, "relation": "at least"}],
        "prompt": "…",
    }
    assert verify('"two words"', truth) == (True, "follows all 3")
    assert verify("two, words", truth) == (False, "does not follow punctuation:no_comma, startend:quotation")


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("punctuation:no_comma", "Sure, here it is:\nno comma"),
        ("punctuation:no_comma", "no comma\nHope this helps, bye"),
        ("punctuation:no_comma", "Sure, ok:\nno comma\nHope this helps, bye"),
        ("startend:quotation", '*"quoted"*'),
        ("startend:quotation", 'Sure:\n**"quoted"**\nBye'),
    ],
)
def test_loose_reads_past_a_first_line_a_last_line_and_asterisks(name: str, response: str) -> None:
    assert not verify(response, rule(name)).correct
    assert verify_loose(response, rule(name)).correct


def test_the_eight_loose_readings() -> None:
    assert loose("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]
    assert not verify_loose("", rule("punctuation:no_comma")).correct
    assert not verify_loose("a, b", rule("punctuation:no_comma")).correct  # what is left without its only line is nothing


@pytest.mark.parametrize("response", ["1234", "!!! ???", "🙂", "\ud800", "12 + 30 = 42", "\x00"])
@pytest.mark.parametrize("judge", [verify, verify_loose])
def test_no_detectable_language_is_no_language(response: str, judge: Any) -> None:
    assert language_of(response) is None
    for name, arguments in (("language:response_language", {"language": "en"}), ("change_case:english_capital", {})):
        assert not judge(response, rule(name, arguments)).correct


def test_language_detection_does_not_change_its_mind() -> None:
    doubtful = "hotel taxi radio menu"
    assert len({language_of(doubtful) for _ in range(20)}) == 1


# Results of NLTK 3.10.4 with the same Punkt model.
SENTENCES = [
    ("", 0),
    ("Dr. Smith paid $3.50 to Mrs. Jones. She left at 5 p.m. on Friday.", 2),
    ("Wow!!! Yes.", 2),
    ("Wow!!!", 2),
    ("What?!", 2),
    ("!!!", 3),
    ("...", 1),
    ("Wait . . . what?", 4),
    ("Wait... what?", 1),
    ("He said “Go.” Then left.", 2),
    ('He said "Go." Then left.', 2),
    ("‘Go.’ he said. ‘No.’", 3),
    ("end.” “New start. Yes", 3),
    ("Yes!!\nNo!!", 3),
    ("(Hi.) Bye.", 2),
    ("**Hi.** Bye.", 2),
    ("1. One\n2. Two\n3. Three", 4),
    ("P.S. Hello", 2),
]
WORDS = [
    ("I'll go", ["I", "'ll", "go"]),
    ("NATO's plan", ["NATO", "'s", "plan"]),
    ("It is NATO's.", ["It", "is", "NATO", "'s", "."]),
    ("DON'T YOU'VE", ["DO", "N'T", "YOU", "'VE"]),
    ("CANNOT gonna Lemme", ["CAN", "NOT", "gon", "na", "Lem", "me"]),
    ("'TIS 'twas", ["'", "TIS", "'", "twas"]),
    ("It’s NATO’s", ["It", "’", "s", "NATO", "’", "s"]),
    ("WELL-KNOWN U.S. e-mail—OK", ["WELL-KNOWN", "U.S.", "e-mail", "—", "OK"]),
    ("A–B C--D", ["A", "–", "B", "C", "--", "D"]),
    ('"THE END" (OK)', ["``", "THE", "END", "''", "(", "OK", ")"]),
    ("R&D Q&A", ["R", "&", "D", "Q", "&", "A"]),
    ("A,B 3,5 A:B", ["A", ",", "B", "3,5", "A", ":", "B"]),
    ("**BOLD** [X] #Y", ["*", "*", "BOLD", "*", "*", "[", "X", "]", "#", "Y"]),
    ("‘I'D':gimme'TIS", ["‘", "I", "'D", "'", ":", "gim", "me", "'T", "IS"]),
    ("JOHN/JANE A_B C.D", ["JOHN/JANE", "A_B", "C.D"]),
    ("Wait...OK", ["Wait", "...", "OK"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "count"), SENTENCES)
def test_sentences_are_those_of_nltk(text: str, count: int) -> None:
    assert len(sentences(text)) == count


@pytest.mark.parametrize(("text", "expected"), WORDS)
def test_words_are_those_of_nltk(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("truth", "complaint"),
    [
        ("no_comma", "truth='no_comma' must be an object"),
        ({}, "truth.instruction_id_list=None must be a list of at least one instruction"),
        ({"instruction_id_list": [], "kwargs": []}, r"truth.instruction_id_list=\[\] must be a list of at least one"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "truth.kwargs=None must be a list of 1 objects"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "must be a list of 1 objects"),
        (rule("punctuation:comma"), r"truth.instruction_id_list\[0\]='punctuation:comma' is unknown; use one of change_case:.*"),
        (rule(["x"]), r"truth.instruction_id_list\[0\]=\['x'\] is unknown"),  # type: ignore[arg-type]
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}, r"truth.kwargs\[0\]=None must be an object"),
        (rule("punctuation:no_comma", {"x": 1}), r"truth.kwargs\[0\] has \['x'\]; punctuation:no_comma takes \[\]"),
        (rule("startend:end_checker"), r"truth.kwargs\[0\] has \[\]; startend:end_checker takes \['end_phrase'\]"),
        (rule("startend:end_checker", {"end_phrase": " "}), r"kwargs\[0\].end_phrase=' ' must be a string that is not blank"),
        (rule("keywords:existence", {"keywords": "cat"}), r"keywords='cat' must be a list of strings"),
        (rule("keywords:existence", {"keywords": []}), r"keywords=\[\] must be a list of strings"),
        (rule("language:response_language", {"language": "xx"}), "language='xx' must be a language code"),
        (rule("detectable_format:number_bullet_lists", {"num_bullets": True}), "num_bullets=True must be a whole number"),
        (rule("detectable_format:number_bullet_lists", {"num_bullets": -1}), "num_bullets=-1 must be a whole number, 0 or more"),
        (rule("length_constraints:number_paragraphs", {"num_paragraphs": 0}), "num_paragraphs=0 must be a whole number, 1 or more"),
        (rule("length_constraints:number_words", {"num_words": 5, "relation": "around"}), "relation='around' must be one of 'less than', "),
        (
            rule("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}),
            "letter='ab' must be one char",
        ),
        (rule("keywords:letter_frequency", {"letter": " ", "let_frequency": 1, "let_relation": "at least"}), "letter=' ' must be one char"),
    ],
)
def test_a_wrong_truth_is_refused_by_field(truth: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(truth)


def test_arguments_that_are_null_are_not_there() -> None:
    check(rule("punctuation:no_comma", {"num_words": None, "keywords": None}))
    assert verify("fine", rule("punctuation:no_comma", {"num_words": None})).correct


def test_judging_leaves_the_truth_as_it_was() -> None:
    truth = rule("startend:end_checker", {"end_phrase": " The End. "})
    before = json.dumps(truth)
    assert verify("the end.", truth) == verify("the end.", truth) == (True, "follows all 1")
    assert json.dumps(truth) == before


def test_every_row_of_ifeval_is_accepted() -> None:
    if not IFEVAL_DATA.exists():
        pytest.skip("the shared data is not here")
    rows = [json.loads(line) for line in IFEVAL_DATA.open()]
    assert {name for row in rows for name in row["instruction_id_list"]} == set(INSTRUCTIONS)
    for row in rows:
        check(row)
        verify_loose(row["prompt"], row)


MEGABYTES = [
    "[" * 10**6,
    "\n" * 10**6,
    " " * 10**6,
    "<" * 10**6,
    "*" * 10**6,
    "a. " * 20_000,
    "-\n" * 500_000,
    "." * 10**6,
    "a" * 10**6,
    "p. " * 20_000,
]


@pytest.mark.parametrize("text", MEGABYTES, ids=lambda text: repr(text[:4]))
def test_long_texts_take_linear_time(text: str) -> None:
    """Quadratic work on a megabyte would take hours, not seconds. Punkt needs 10 us per character if every word ends in a dot."""
    for name, arguments, *_ in CASES:
        assert INSTRUCTIONS[name].followed(text, **arguments) in (True, False)


def test_a_long_response_is_judged_in_a_worker() -> None:
    text = "a word " * (LONG // 7 + 1)
    truth = rule("length_constraints:number_words", {"num_words": LONG // 4, "relation": "at least"})
    assert len(text) > LONG
    assert (verify(text, truth).correct, verify_loose(text, truth).correct) == (True, True)
    assert (verify(text[: LONG // 2], truth).correct, verify_loose(text[: LONG // 2], truth).correct) == (False, False)


def test_long_keywords_are_searched_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.verify.ifeval.alone", lambda *_: "in a worker")
    assert verify("a" * 1000, rule("keywords:existence", {"keywords": ["a" * 999]})) == (True, "follows all 1")
    assert verify("a" * 1000, rule("keywords:existence", {"keywords": ["a" * 999] * 3})) == "in a worker"
    assert (
        verify_loose("a" * 1000, rule("keywords:frequency", {"keyword": "a" * LONG_TRUTH, "frequency": 1, "relation": "at least"}))
        == "in a worker"
    )


@given(st.text(alphabet='aZ ,.*<>"[]\n#1é-Section', max_size=80) | st.text(max_size=80))
@settings(max_examples=40, deadline=None)
def test_no_response_makes_it_raise(response: str) -> None:
    for name, arguments, *_ in CASES:
        strictly = verify(response, rule(name, arguments)).correct
        assert not strictly or verify_loose(response, rule(name, arguments)).correct
