r"""The 25 instructions of IFEval (Zhou et al., arXiv 2311.07911): the check of each and its arguments.

The rules follow google-research/instruction_following_eval, with three fixes: a response in no detectable language follows no
instruction about its language; keywords are literal text, not patterns; and every check takes linear time for keywords of bounded length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import regex

from engine.verify.ifeval.language import language_of, languages
from engine.verify.ifeval.tokenize import sentences, words

RELATIONS = ("less than", "at least")
ALLOWED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")


class ArgumentType(NamedTuple):
    """The type of an argument: a description for errors, and a check."""

    what: str
    holds: Callable[[Any], bool]


class Instruction(NamedTuple):
    """`followed(response, **arguments)` checks a response. All arguments are required."""

    followed: Callable[..., bool]
    arguments: Mapping[str, ArgumentType] = {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


COUNT = ArgumentType("a whole number, 0 or more", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0)
PLACE = ArgumentType("a whole number, 1 or more", lambda value: COUNT.holds(value) and value >= 1)
RELATION = ArgumentType(f"one of {', '.join(map(repr, RELATIONS))}", lambda value: value in RELATIONS)
TEXT = ArgumentType("a string that is not blank", _is_text)
TEXTS = ArgumentType(
    "a list of strings that are not blank", lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value))
)
LETTER = ArgumentType("one character that is not blank", lambda value: _is_text(value) and len(value) == 1)
LANGUAGE = ArgumentType("a language code that langdetect knows, such as 'en'", lambda value: value in languages())


def _related(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _occurrences(word: str, response: str) -> int:
    return len(re.findall(re.escape(word), response, flags=re.IGNORECASE))


def _divided(response: str, divider: str) -> list[str]:
    """The parts between dividers, without a blank first or last one. Empty if any other part is blank."""
    parts = [part.strip() for part in response.split(divider)]
    return [part for part in parts if part] if all(parts[1:-1]) else []


def keywords_existence(response: str, keywords: Sequence[str]) -> bool:
    return all(_occurrences(keyword, response) for keyword in keywords)


def keywords_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return _related(_occurrences(keyword.strip(), response), relation, frequency)


def keywords_forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", response, re.IGNORECASE) for word in forbidden_words)


def keywords_letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _related(response.lower().count(letter.lower()), let_relation, let_frequency)


def language_response_language(response: str, language: str) -> bool:
    return language_of(response) == language


def length_number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return _related(len(sentences(response)), relation, num_sentences)


def length_number_paragraphs(response: str, num_paragraphs: int) -> bool:
    return len(_divided(response, "***")) == num_paragraphs


def length_number_words(response: str, num_words: int, relation: str) -> bool:
    """A word consists of letters, digits, underscores and combining marks, without which the words of Hindi or Thai fall apart."""
    return _related(len(regex.findall(r"\w+", response)), relation, num_words)


def length_nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by blank lines. The word ends at the first punctuation mark; case is ignored."""
    paragraphs = response.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if count != num_paragraphs or nth_paragraph > count:
        return False
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1)
    return bool(words) and re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower() == first_word.lower()


def content_number_placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", response)) >= num_placeholders


def content_postscript(response: str, postscript_marker: str) -> bool:
    """Case is ignored; spaces after dots are optional."""
    letters = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(postscript_marker.strip(), re.escape(postscript_marker.lower().strip()))
    return re.search(letters, response.lower()) is not None


def format_number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Lines that begin with - or *, but not with **. A line that is only * is a bullet whose text is the next line, whatever that is."""
    lines = [line.lstrip() for line in response.split("\n")]
    stars, following = 0, iter(range(len(lines)))
    for number in following:
        if lines[number] == "*":
            stars += next(following, None) is not None
        else:
            stars += lines[number][:1] == "*" and lines[number][1] != "*"
    return num_bullets == stars + sum(line.startswith("-") for line in lines)


def format_constrained_response(response: str) -> bool:
    return any(answer in response for answer in ALLOWED_ANSWERS)


def format_number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """Text between *single* or **double** asterisks on one line; blank text does not count."""
    single, double = re.findall(r"\*([^\n*]*)\*", response), re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(text.strip()) for text in (*single, *double)) >= num_highlights


def format_multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def format_json_format(response: str) -> bool:
    text = response.strip()
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def format_title(response: str) -> bool:
    """<<something>> on one line."""
    for line in response.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def combination_two_responses(response: str) -> bool:
    parts = _divided(response, "******")
    return len(parts) == 2 and parts[0] != parts[1]


def combination_repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def startend_end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def startend_quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def case_capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    """Counts words in all capitals. A hyphenated word is one word; a contraction is two: "I'll" and "NATO's" have one in capitals."""
    return _related(sum(word.isupper() for word in words(response)), capital_relation, capital_frequency)


def case_english_capital(response: str) -> bool:
    return response.isupper() and language_of(response) == "en"


def case_english_lowercase(response: str) -> bool:
    return response.islower() and language_of(response) == "en"


def punctuation_no_comma(response: str) -> bool:
    return "," not in response


INSTRUCTIONS = {
    "keywords:existence": Instruction(keywords_existence, {"keywords": TEXTS}),
    "keywords:frequency": Instruction(keywords_frequency, {"keyword": TEXT, "frequency": COUNT, "relation": RELATION}),
    "keywords:forbidden_words": Instruction(keywords_forbidden_words, {"forbidden_words": TEXTS}),
    "keywords:letter_frequency": Instruction(
        keywords_letter_frequency, {"letter": LETTER, "let_frequency": COUNT, "let_relation": RELATION}
    ),
    "language:response_language": Instruction(language_response_language, {"language": LANGUAGE}),
    "length_constraints:number_sentences": Instruction(length_number_sentences, {"num_sentences": COUNT, "relation": RELATION}),
    "length_constraints:number_paragraphs": Instruction(length_number_paragraphs, {"num_paragraphs": PLACE}),
    "length_constraints:number_words": Instruction(length_number_words, {"num_words": COUNT, "relation": RELATION}),
    "length_constraints:nth_paragraph_first_word": Instruction(
        length_nth_paragraph_first_word, {"num_paragraphs": PLACE, "nth_paragraph": PLACE, "first_word": TEXT}
    ),
    "detectable_content:number_placeholders": Instruction(content_number_placeholders, {"num_placeholders": COUNT}),
    "detectable_content:postscript": Instruction(content_postscript, {"postscript_marker": TEXT}),
    "detectable_format:number_bullet_lists": Instruction(format_number_bullet_lists, {"num_bullets": COUNT}),
    "detectable_format:constrained_response": Instruction(format_constrained_response),
    "detectable_format:number_highlighted_sections": Instruction(format_number_highlighted_sections, {"num_highlights": COUNT}),
    "detectable_format:multiple_sections": Instruction(format_multiple_sections, {"section_spliter": TEXT, "num_sections": COUNT}),
    "detectable_format:json_format": Instruction(format_json_format),
    "detectable_format:title": Instruction(format_title),
    "combination:two_responses": Instruction(combination_two_responses),
    "combination:repeat_prompt": Instruction(combination_repeat_prompt, {"prompt_to_repeat": TEXT}),
    "startend:end_checker": Instruction(startend_end_checker, {"end_phrase": TEXT}),
    "startend:quotation": Instruction(startend_quotation),
    "change_case:capital_word_frequency": Instruction(
        case_capital_word_frequency, {"capital_frequency": COUNT, "capital_relation": RELATION}
    ),
    "change_case:english_capital": Instruction(case_english_capital),
    "change_case:english_lowercase": Instruction(case_english_lowercase),
    "punctuation:no_comma": Instruction(punctuation_no_comma),
}
