"""Language detection and sentence counting for IFEval. Offline and deterministic."""

from __future__ import annotations

from functools import lru_cache

from langdetect import PROFILES_DIRECTORY, DetectorFactory, LangDetectException
from punkt import PunktSentenceTokenizer, tokenizer_for

DETECTED_CHARACTERS = 20_000  # langdetect uses 10,000 characters, after cleaning the whole text


def language_of(text: str) -> str | None:
    """Code of the most likely language of `text`, such as "en" or "zh-cn"; None if it cannot be detected."""
    detector = _languages().create()
    try:
        detector.append(text[:DETECTED_CHARACTERS])
        found = detector.detect()
    except LangDetectException:
        return None
    return None if found == detector.UNKNOWN_LANG else found


def languages() -> list[str]:
    """The codes that `language_of` may return."""
    return sorted(_languages().get_lang_list())


def count_sentences(text: str) -> int:
    """Number of sentences by the English Punkt model, as in IFEval."""
    return len(_sentences().tokenize(text))


@lru_cache(maxsize=1)
def _languages() -> DetectorFactory:
    factory = DetectorFactory()
    factory.seed = 0  # detection is a Monte Carlo estimate
    factory.load_profile(PROFILES_DIRECTORY)
    return factory


@lru_cache(maxsize=1)
def _sentences() -> PunktSentenceTokenizer:
    return tokenizer_for("english")
