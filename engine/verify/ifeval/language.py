"""What the checks of IFEval ask of language libraries: which language, how many sentences. Offline and deterministic."""

from __future__ import annotations

from functools import lru_cache

from langdetect import PROFILES_DIRECTORY, DetectorFactory, LangDetectException
from punkt import PunktSentenceTokenizer, tokenizer_for

DETECTED_CHARACTERS = 20_000  # langdetect looks at 10,000, after it has cleaned the whole text


def language_of(text: str) -> str | None:
    """The code of the language that `text` is most likely in, such as "en" or "zh-cn"; None when none can be told."""
    detector = _languages().create()
    try:
        detector.append(text[:DETECTED_CHARACTERS])
        found = detector.detect()
    except LangDetectException:
        return None
    return None if found == detector.UNKNOWN_LANG else found


def languages() -> list[str]:
    """The codes that `language_of` may give."""
    return sorted(_languages().get_lang_list())


def count_sentences(text: str) -> int:
    """By Punkt, as trained on English: what IFEval counts with."""
    return len(_sentences().tokenize(text))


@lru_cache(maxsize=1)
def _languages() -> DetectorFactory:
    factory = DetectorFactory()
    factory.seed = 0  # its answer is a Monte Carlo estimate
    factory.load_profile(PROFILES_DIRECTORY)
    return factory


@lru_cache(maxsize=1)
def _sentences() -> PunktSentenceTokenizer:
    return tokenizer_for("english")
