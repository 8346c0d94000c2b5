"""Which training prompts repeat an evaluation: Tülu 3's rule, exactly, by one pass over the training data.

The rule (arXiv 2411.15124, section 3.2): a token of a test instance matches a training prompt if an 8-gram that holds it is also in that
prompt; a prompt hits an instance if more than 50 % of the instance's tokens match that one prompt; a training set is contaminated if it
hits more than 2 % of an evaluation.

Tokens are those on which Tülu's phrase queries match: text in lower case, cut at `SEPARATORS` (the analyzer of allenai/open-instruct,
decontamination/index.py). One difference is stated: that tool counts a test instance in spaCy's tokens, where a punctuation mark is a
token; here marks are no tokens on either side. As there, each user turn of a conversation is a prompt of its own.
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
FIELDS = ("prompt", "question", "problem", "instruction")  # where the prompt of a row without messages is looked for, in this order

Gram = tuple[str, ...]
Removal = Literal["instances", "sets"]

_WORD = re.compile(f"[^{re.escape(SEPARATORS)}]+")


@dataclass(frozen=True)
class Rule:
    """When a training prompt repeats a test instance, and a training set an evaluation. Shares are in (0, 1) and must be exceeded."""

    ngram: int = 8
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
    """A test instance, the first training row that repeats it, and the share of the instance's tokens found there."""

    instance: str  # "file.jsonl:12"
    row: str
    share: float


@dataclass
class Overlap:
    """What one training set repeats of one evaluation."""

    evaluation: str
    instances: int
    short: int  # instances of fewer tokens than an n-gram, which the rule cannot hit
    hits: list[Hit] = field(default_factory=list)

    @property
    def share(self) -> float:
        return len(self.hits) / self.instances


@dataclass
class Finding:
    """One training set: how many rows it has, which of them (from 0) hit an instance of any evaluation, and each evaluation's overlap."""

    train: str
    overlaps: list[Overlap]
    rows: int = 0
    hitting: list[int] = field(default_factory=list)

    def contaminated(self, rule: Rule) -> bool:
        return any(overlap.share > rule.evaluation for overlap in self.overlaps)


def words(text: str) -> list[str]:
    """The tokens of a text."""
    return _WORD.findall(text.lower())


def grams(tokens: Sequence[str], n: int) -> Iterator[Gram]:
    """Every n consecutive tokens, in order."""
    return zip(*(tokens[k:] for k in range(n)), strict=False)


def covered(tokens: Sequence[str], shared: Collection[Gram], n: int) -> int:
    """How many of `tokens` lie inside an n-gram that is in `shared`."""
    count = end = 0
    for start, gram in enumerate(grams(tokens, n)):
        if gram in shared:
            count += start + n - max(start, end)
            end = start + n
    return count


class Index:
    """Test instances, found by prompts that hit them. Exact: nothing is hashed down, sampled or cut off.

    Of each instance only some n-grams are indexed, its rarest: the others, taken together, cover too little of it to make a hit, so
    every prompt that hits has at least one of the indexed ones. Wording that many instances share costs next to nothing this way.
    """

    def __init__(self, instances: Sequence[Sequence[str]], rule: Rule):
        self.rule = rule
        names: dict[str, str] = {}
        self.instances = [[names.setdefault(word, word) for word in tokens] for tokens in instances]  # equal words, one string
        frequency = Counter(gram for tokens in self.instances for gram in set(grams(tokens, rule.ngram)))
        self.postings: dict[Gram, list[int]] = defaultdict(list)
        for number, tokens in enumerate(self.instances):
            for gram in _rarest(tokens, frequency, rule):
                self.postings[gram].append(number)

    def candidates(self, tokens: Sequence[str]) -> set[int]:
        """All instances that a prompt of these tokens hits, and perhaps others."""
        found = self.postings.keys() & grams(tokens, self.rule.ngram)
        return {number for gram in found for number in self.postings[gram]}

    def hits(self, tokens: Sequence[str], candidates: Collection[int]) -> Iterator[tuple[int, float]]:
        """Those of `candidates` that a prompt of these tokens hits, each with the share of its tokens that match."""
        theirs = set(grams(tokens, self.rule.ngram)) if candidates else set()
        for number in sorted(candidates):
            share = covered(self.instances[number], theirs, self.rule.ngram) / len(self.instances[number])
            if share > self.rule.instance:
                yield number, share


def _rarest(tokens: Sequence[str], frequency: Counter[Gram], rule: Rule) -> list[Gram]:
    """The n-grams left when the most frequent ones are taken away for as long as those together make no hit."""
    places: dict[Gram, int] = defaultdict(int)  # bit t: token t lies inside the n-gram
    for start, gram in enumerate(grams(tokens, rule.ngram)):
        places[gram] |= ((1 << rule.ngram) - 1) << start
    mask, rare = 0, []
    for gram in sorted(places, key=frequency.__getitem__, reverse=True):
        if (mask | places[gram]).bit_count() / len(tokens) > rule.instance:
            rare.append(gram)
        else:
            mask |= places[gram]
    return rare


class Search:
    """Evaluations, indexed once, against any number of training sets.

    Raises ValueError, naming the row, for one without a prompt.
    """

    def __init__(self, evaluations: Sequence[Source], rule: Rule, field_: str = ""):
        self.rule, self.evaluations = rule, evaluations
        self.where: list[tuple[int, str]] = []  # of each instance: which evaluation, and its place there
        tokens = []
        for number, source in enumerate(evaluations):
            for where, row in read_rows(source):
                tokens.append(words("\n".join(prompts(row, field_, where))))
                self.where.append((number, where))
        self.index = Index(tokens, rule)

    def finding(self, train: Source, field_: str = "") -> Finding:
        """What `train` repeats, by one pass over it."""
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
        """Whether any of a row's prompts hits; instances not hit before go into `known` and `finding`."""
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
    """The text of `field_`; by default the user's turns of "messages", or the first of FIELDS that the row has.

    Raises ValueError, naming the row, when there is no such text.
    """
    if not field_ and "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{where}: messages must be a list of objects with role and content, not {turns!r:.60}")
        return [_text(turn.get("content"), f"{where}: messages.content") for turn in turns if turn.get("role") == "user"]
    name = field_ or next((name for name in FIELDS if name in row), "")
    if name not in row:
        wanted = name or "messages, " + ", ".join(FIELDS)
        raise ValueError(f"{where} has no {wanted}; it has {', '.join(row)}; name the field of the prompt")
    return [_text(row[name], f"{where}: {name}")]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__}")
    return value


def decontaminate(
    train: Sequence[Source], search: Search, field_: str = "", remove: Removal | None = None, out: Path | None = None
) -> list[Finding]:
    """What each training set repeats; with `remove` and `out`, clean copies of them as .jsonl files in the folder `out`.

    "instances" leaves out every row that hits an instance; "sets" copies only the sets that are not contaminated, and those whole. Raises
    ValueError for a row without a prompt, and, before anything is read, when a copy would replace a file.
    """
    targets = copies([source.path for source in train], out) if remove and out else []
    found = [search.finding(source, field_) for source in train]
    for source, finding, target in zip(train, found, targets, strict=False):
        if remove == "instances":
            _copy(source, target, set(finding.hitting))
        elif not finding.contaminated(search.rule):
            _copy(source, target, set())
    return found


def copies(paths: Sequence[str], out: Path) -> list[Path]:
    """Where in `out` the copy of each training set goes. Raises ValueError when two would share a file, or one is there already."""
    targets = [out / (path.replace("/", "_") + ".jsonl" if not path.endswith(".jsonl") else Path(path).name) for path in paths]
    for target, count in Counter(targets).items():
        if count > 1:
            raise ValueError(f"{count} training sets would be written to {target}; give their files different names")
        if target.exists():
            raise ValueError(f"{target} is there already; choose another folder, or remove it")
    return targets


def _copy(source: Source, target: Path, without: set[int]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for number, (_, row) in enumerate(read_rows(source)):
            if number not in without:
                file.write(json.dumps(row) + "\n")  # in ASCII, which also holds what UTF-8 cannot: a lone surrogate
    os.replace(part, target)


def summary(finding: Finding, rule: Rule) -> str:
    """A line for people."""
    shares = ", ".join(f"{each.evaluation} {len(each.hits)}/{each.instances} = {each.share:.2%}" for each in finding.overlaps)
    verdict = "contaminated" if finding.contaminated(rule) else "clean"
    return f"{finding.train}: {verdict}; {len(finding.hitting)} of {finding.rows} rows hit; instances hit: {shares}"


def report(found: Sequence[Finding], rule: Rule) -> dict[str, Any]:
    """The findings as plain JSON values."""
    sets = [
        {
            "train": finding.train,
            "contaminated": finding.contaminated(rule),
            "rows": finding.rows,
            "rows_hitting": finding.hitting,
            "evaluations": [asdict(overlap) | {"share": overlap.share} for overlap in finding.overlaps],
        }
        for finding in found
    ]
    return {"rule": asdict(rule), "separators": SEPARATORS, "sets": sets}
