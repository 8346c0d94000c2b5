"""Language detection for IFEval. Offline and deterministic."""

from __future__ import annotations

from functools import lru_cache

from langdetect import PROFILES_DIRECTORY, DetectorFactory, LangDetectException

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


@lru_cache(maxsize=1)
def _languages() -> DetectorFactory:
    factory = DetectorFactory()
    factory.seed = 0  # detection is a Monte Carlo estimate
    factory.load_profile(PROFILES_DIRECTORY)
    return factory
