"""Finds training prompts that overlap with evaluations: Tülu 3's rule, computed exactly, in one pass over the training data.

The rule (arXiv 2411.15124, section 3.2): a token of a test instance matches a training prompt if an 8-gram that contains it also occurs in
the prompt; a prompt hits an instance if more than 50 % of the instance's tokens match that prompt; a training set is contaminated if it
hits more than 2 % of an evaluation.

An instance shorter than an n-gram has none, so by that rule not even a verbatim copy hits it. Here it is one n-gram by itself: a prompt
that contains all of it hits it. One or two words also stand in ordinary text: such an instance must be the whole prompt.

Tokens are lower-case text, split at `SEPARATORS`. These are the separators of the analyzer that allenai/open-instruct defines in
decontamination/index.py ("tulu_analyzer") but does not attach to the indexed text, which therefore gets Elasticsearch's default analyzer.
That one also splits at operators and drops them. Another difference: that tool counts a test instance in spaCy tokens, where a punctuation
mark is a token; here, punctuation is not counted. As in that tool, each user turn of a conversation is a separate prompt.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.data.rows import Source, read_rows

SEPARATORS = ' ,.?!:;()"-\n\\'
FIELDS = (
    "prompt",
    "question",
    "problem",
    "instruction",
)  # fields that may hold the prompt of a row without messages, in order of preference

Gram = tuple[str, ...]
CONTAINED = 3  # tokens; a shorter instance is hit only by a prompt that is equal to it
Removal = Literal["instances", "sets"]

_WORD = re.compile(f"[^{re.escape(SEPARATORS)}]+")


@dataclass(frozen=True)
class Rule:
    """Thresholds of contamination. Shares are in [0, 1) and must be exceeded."""

    ngram: int = 8  # tokens
    instance: float = 0.5  # share of the instance's tokens
    evaluation: float = 0.02  # share of the evaluation's instances

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram={self.ngram} must be at least 1; Tülu 3 uses 8")
        for name in ("instance", "evaluation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share and must be in [0, 1)")


@dataclass(frozen=True)
class Hit:
    """A test instance, the first training row that hits it, and the share of the instance's tokens that match."""

    instance: str  # "file.jsonl:12"
    row: str
    share: float


@dataclass
class Overlap:
    """The overlap of one training set with one evaluation."""

    evaluation: str
    instances: int
    short: int  # instances shorter than an n-gram, which are matched whole
    hits: list[Hit] = field(default_factory=list)

    @property
    def share(self) -> float:
        return len(self.hits) / self.instances


@dataclass
class Finding:
    """The result for one training set: its number of rows, the indices of rows that hit any instance, and the overlap per evaluation."""

    train: str
    overlaps: list[Overlap]
    rows: int = 0
    hitting: list[int] = field(default_factory=list)

    def contaminated(self, rule: Rule) -> bool:
        return any(overlap.share > rule.evaluation for overlap in self.overlaps)


def words(text: str) -> list[str]:
    """The tokens of `text`."""
    return _WORD.findall(text.lower())


def grams(tokens: Sequence[str], n: int) -> Iterator[Gram]:
    """Every n consecutive tokens, in order."""
    return zip(*(tokens[k:] for k in range(n)), strict=False)


def covered(tokens: Sequence[str], shared: Collection[Gram], n: int) -> int:
    """Number of `tokens` that are part of an n-gram in `shared`."""
    count = end = 0
    for start, gram in enumerate(grams(tokens, n)):
        if gram in shared:
            count += start + n - max(start, end)
            end = start + n
    return count


class Index:
    """An index of test instances. Exact: no lossy hashes, sampling or truncation.

    Only the rarest n-grams of each instance are indexed. The others together cover too few of its tokens for a hit, so every prompt that
    hits it contains at least one indexed n-gram. Wording that many instances share adds almost no cost this way.
    """

    def __init__(self, instances: Sequence[Sequence[str]], rule: Rule):
        self.rule = rule
        names: dict[str, str] = {}
        self.instances = [[names.setdefault(word, word) for word in tokens] for tokens in instances]  # one string object per distinct word
        frequency = Counter(gram for tokens in self.instances for gram in set(grams(tokens, self._ngram(tokens))))
        self.postings: dict[int, dict[Gram, list[int]]] = defaultdict(lambda: defaultdict(list))  # n -> n-gram -> instances
        for number, tokens in enumerate(self.instances):
            n = self._ngram(tokens)
            for gram in _rarest(tokens, frequency, n, rule.instance):
                self.postings[n][gram].append(number)

    def candidates(self, tokens: Sequence[str]) -> set[int]:
        """A superset of the instances that a prompt of these tokens hits."""
        found: set[int] = set()
        for n, postings in self.postings.items():
            if n >= min(CONTAINED, self.rule.ngram) or n == len(tokens):
                found.update(*map(postings.__getitem__, postings.keys() & grams(tokens, n)))
        return found

    def hits(self, tokens: Sequence[str], candidates: Collection[int]) -> Iterator[tuple[int, float]]:
        """(instance, share of its tokens that match) for those of `candidates` that a prompt of these tokens hits."""
        prompt = {n: set(grams(tokens, n)) for n in {self._ngram(self.instances[number]) for number in candidates}}
        for number in sorted(candidates):
            instance = self.instances[number]
            n = self._ngram(instance)
            share = covered(instance, prompt[n], n) / len(instance)
            if share > self.rule.instance:
                yield number, share

    def _ngram(self, instance: Sequence[str]) -> int:
        return min(self.rule.ngram, len(instance))


def _rarest(tokens: Sequence[str], frequency: Counter[Gram], n: int, limit: float) -> list[Gram]:
    """The n-grams that remain after removing the most frequent ones, as long as the removed ones cover at most `limit` of the tokens."""
    places: dict[Gram, int] = defaultdict(int)  # bit t: token t is part of the n-gram
    for start, gram in enumerate(grams(tokens, n)):
        places[gram] |= ((1 << n) - 1) << start
    mask, rare = 0, []
    for gram in sorted(places, key=frequency.__getitem__, reverse=True):
        if (mask | places[gram]).bit_count() / len(tokens) > limit:
            rare.append(gram)
        else:
            mask |= places[gram]
    return rare


class Search:
    """Searches any number of training sets for the instances of evaluations, which are indexed once.

    Raises ValueError, which names the row, if it has no prompt.
    """

    def __init__(self, evaluations: Sequence[Source], rule: Rule, field_: str = ""):
        self.rule, self.evaluations = rule, evaluations
        self.where: list[tuple[int, str]] = []  # of each instance: index of its evaluation, and its row there
        tokens = []
        for number, source in enumerate(evaluations):
            for where, row in read_rows(source):
                tokens.append(words("\n".join(prompts(row, field_, where))))
                self.where.append((number, where))
        self.index = Index(tokens, rule)

    def finding(self, train: Source, field_: str = "") -> Finding:
        """The overlap of `train` with the evaluations, in one pass over it."""
        finding = Finding(train.path, self._overlaps())
        known: set[int] = set()
        for where, row in read_rows(train):
            if self._hits(prompts(row, field_, where), where, known, finding):
                finding.hitting.append(finding.rows)
            finding.rows += 1
        return finding

    def _overlaps(self) -> list[Overlap]:
        instances = Counter(number for number, _ in self.where)
        lengths = zip(self.where, map(len, self.index.instances), strict=True)
        short = Counter(number for (number, _), length in lengths if length < self.rule.ngram)
        return [Overlap(source.path, instances[i], short[i]) for i, source in enumerate(self.evaluations)]

    def _hits(self, texts: Sequence[str], where: str, known: set[int], finding: Finding) -> bool:
        """Whether any of a row's prompts hits an instance. Adds instances that were not hit before to `known` and `finding`."""
        hit = False
        for tokens in map(words, texts):
            candidates = self.index.candidates(tokens)
            for number, share in self.index.hits(tokens, candidates - known):
                hit = True
                known.add(number)
                evaluation, instance = self.where[number]
                finding.overlaps[evaluation].hits.append(Hit(instance, where, share))
            hit = hit or any(self.index.hits(tokens, candidates & known))
        return hit


def prompts(row: dict[str, Any], field_: str, where: str) -> list[str]:
    """The text of `field_`; by default the user turns of "messages", or the first of FIELDS that the row has.

    Raises ValueError, which names the row, if there is no such text.
    """
    if not field_ and "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{where}: messages must be a list of objects with role and content, not {turns!r:.60}")
        return [_text(turn.get("content"), f"{where}: messages.content") for turn in turns if turn.get("role") == "user"]
    name = field_ or next((name for name in FIELDS if name in row), "")
    if name not in row:
        expected = name or "messages, " + ", ".join(FIELDS)
        raise ValueError(f"{where} has no {expected}; it has {', '.join(row)}; name the field of the prompt")
    return [_text(row[name], f"{where}: {name}")]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__}")
    return value


def decontaminate(
    train: Sequence[Source], search: Search, field_: str = "", remove: Removal | None = None, out: Path | None = None
) -> list[Finding]:
    """The overlap of each training set; with `remove` and `out`, also writes clean copies as .jsonl files to the folder `out`.

    remove: "instances" removes every row that hits an instance; "sets" copies only the sets that are not contaminated, unchanged. Raises
    ValueError for a row without a prompt and, before reading any data, if a copy would overwrite a file.
    """
    targets = copies([source.path for source in train], out) if remove and out else []
    findings = [search.finding(source, field_) for source in train]
    for source, finding, target in zip(train, findings, targets, strict=False):
        if remove == "instances":
            _copy(source, target, set(finding.hitting))
        elif not finding.contaminated(search.rule):
            _copy(source, target, set())
    return findings


def copies(paths: Sequence[str], out: Path) -> list[Path]:
    """The path in `out` for the copy of each training set. Raises ValueError if two are equal, or if one exists."""
    targets = [out / (path.replace("/", "_") + ".jsonl" if not path.endswith(".jsonl") else Path(path).name) for path in paths]
    for target, count in Counter(targets).items():
        if count > 1:
            raise ValueError(f"{count} training sets would be written to {target}; give their files different names")
        if target.exists():
            raise ValueError(f"{target} already exists; choose another folder, or remove it")
    return targets


def _copy(source: Source, target: Path, without: set[int]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for number, (_, row) in enumerate(read_rows(source)):
            if number not in without:
                file.write(json.dumps(row) + "\n")  # ASCII escapes can represent lone surrogates, which UTF-8 cannot
    os.replace(part, target)


def summary(finding: Finding, rule: Rule) -> str:
    """One line for the console."""
    shares = ", ".join(f"{each.evaluation} {len(each.hits)}/{each.instances} = {each.share:.2%}" for each in finding.overlaps)
    verdict = "contaminated" if finding.contaminated(rule) else "clean"
    return f"{finding.train}: {verdict}; {len(finding.hitting)} of {finding.rows} rows hit; instances hit: {shares}"


def report(findings: Sequence[Finding], rule: Rule) -> dict[str, Any]:
    """The findings as JSON values."""
    sets = [
        {
            "train": finding.train,
            "contaminated": finding.contaminated(rule),
            "rows": finding.rows,
            "rows_hitting": finding.hitting,
            "evaluations": [asdict(overlap) | {"share": overlap.share} for overlap in finding.overlaps],
        }
        for finding in findings
    ]
    return {"rule": asdict(rule), "separators": SEPARATORS, "sets": sets}
