"""Data: strict parsing of rows, cached corpora, and reproducible sample order."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from engine.data.corpus import Corpus, Counts, prepare
from engine.data.mixture import Mixture
from engine.data.rows import Source, identity, read_rows
from engine.data.template import TULU, ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.data.wordproblems import problems, write
from engine.types import Sample
from tests.support.paths import SHARED


def ask(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def jsonl(path: Path, rows: list[dict]) -> Source:
    write(path, rows)
    return Source(str(path))


# ---------------------------------------------------------------- rows


def lines(tmp_path: Path, content: bytes, **options) -> list[tuple[str, dict]]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return list(read_rows(Source(str(path), **options)))


def test_rows_come_with_their_line(tmp_path):
    rows = lines(tmp_path, '\ufeff{"a": 1}\r\n\r\n  \n{"a": "é\u2028"}\r\n{"a": 3}'.encode())
    assert [row for _, row in rows] == [{"a": 1}, {"a": "é\u2028"}, {"a": 3}]
    assert [where.rsplit("/", 1)[1] for where, _ in rows] == ["rows.jsonl:1", "rows.jsonl:4", "rows.jsonl:5"]


def test_a_limit_reads_no_further(tmp_path):
    assert len(lines(tmp_path, b'{"a": 1}\n{"a": 2}\nbroken', limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter at column 8"),
        (b'{"a": 1} {"a": 2}', "not valid JSON: Extra data"),
        (b"[1]", "must be a JSON object, not list"),
        (b"null", "must be a JSON object, not NoneType"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate key 'c'"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: .*" + re.escape(complaint)):
        lines(tmp_path, b'{"a": 0}\n\n' + line + b"\n")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path, content):
    with pytest.raises(ValueError, match="has no rows"):
        lines(tmp_path, content)


def test_a_missing_source_is_an_error(tmp_path):
    for path, complaint in (("no.jsonl", "does not exist"), ("", "cannot be loaded as a .jsonl file, a folder written by save_to_disk")):
        with pytest.raises(ValueError, match=complaint):
            list(read_rows(Source(str(tmp_path / path))))


@pytest.mark.parametrize("bad", [{"path": ""}, {"weight": 0}, {"weight": float("nan")}, {"limit": -1}])
def test_a_source_checks_itself(bad):
    with pytest.raises(ValueError, match=f"source.{next(iter(bad))}"):
        Source(**({"path": "x.jsonl"} | bad))


def test_saved_datasets_are_read_by_split(tmp_path):
    train, test = (datasets.Dataset.from_list([{"messages": ask("q", answer)}] * 2) for answer in ("train", "test"))
    datasets.DatasetDict({"train": train, "test": test.with_format("numpy")}).save_to_disk(tmp_path / "both")
    source = Source(str(tmp_path / "both"), split="test")
    assert list(read_rows(source)) == [(f"{tmp_path}/both[{i}]", {"messages": ask("q", "test")}) for i in range(2)]
    assert identity(source) == identity(source) != identity(Source(source.path))
    with pytest.raises(ValueError, match=r"split='dev' is not in .*; use one of train, test"):
        list(read_rows(Source(source.path, split="dev")))


def test_a_hub_id_is_loaded_by_datasets(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list([{"x": 1}]))
    assert list(read_rows(Source("someone/something", split="dev"))) == [("someone/something[0]", {"x": 1})]
    list(read_rows(Source("someone/something", name="main")))
    assert asked == [(("someone/something", None), {"split": "dev"}), (("someone/something", "main"), {"split": "train"})]


# ---------------------------------------------------------------- corpus


class Counting(ChatTemplate):
    """Counts the rows that it encodes, and runs an action at one of them."""

    seen = 0
    at = 0
    action: Callable[[], object] | None = None

    def encode_row(self, row):
        self.seen += 1
        if self.seen == self.at and self.action:
            self.action()
        return super().encode_row(row)


def counting() -> Counting:
    return Counting(load_tokenizer("bytes"))


def whole(corpus: Corpus) -> list[Sample]:
    return [corpus[i] for i in range(len(corpus))]


def plain_rows(count: int, length: int = 3) -> list[dict]:
    return [{"tokens": [i % 256] * (length + 1)} for i in range(count)]


def test_a_corpus_returns_every_row(tmp_path):
    chat = counting()
    rows = problems(20, seed=1)
    corpus = prepare(jsonl(tmp_path / "rows.jsonl", rows), chat, max_length=4096, cache=tmp_path / "deep" / "cache")
    encoded = [chat.encode_row(row) for row in rows]
    assert len(corpus) == 20
    for sample, (tokens, mask) in zip(whole(corpus), encoded, strict=True):
        assert sample.tokens.dtype == np.int32
        assert sample.mask.dtype == np.uint8
        np.testing.assert_array_equal(sample.tokens, tokens)
        np.testing.assert_array_equal(sample.mask, mask)
    assert corpus.lengths.tolist() == [len(mask) for _, mask in encoded]
    trained = sum(int(mask.sum()) for _, mask in encoded)
    assert corpus.counts == Counts(rows=20, kept=20, tokens=int(corpus.lengths.sum()), trained=trained)
    for i in (-1, 20):
        with pytest.raises(IndexError):
            corpus[i]
    with pytest.raises(ValueError, match="read-only"):
        corpus[0].tokens[0] = 1


def test_corpora_are_memory_mapped(tmp_path):
    corpus = prepare(jsonl(tmp_path / "rows.jsonl", plain_rows(5)), counting(), max_length=9, cache=tmp_path)
    sample = corpus[3]
    base = sample.tokens
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert sample.tokens.base is not None
    assert sample.mask.base is not None


def test_the_cache_key_covers_all_inputs(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", plain_rows(5))
    chat, cache = counting(), tmp_path / "cache"
    prepare(source, chat, max_length=9, cache=cache)
    corpus = prepare(Source(source.path, weight=2.0), chat, max_length=9, cache=cache)
    assert (chat.seen, len(corpus), len(list(cache.iterdir()))) == (5, 5, 1)

    prepare(source, chat, max_length=8, cache=cache)
    prepare(source, chat, max_length=9, too_long="drop", cache=cache)
    prepare(Source(source.path, limit=4), chat, max_length=9, cache=cache)
    prepare(source, ChatTemplate(load_tokenizer("bytes"), "{{ '' }}" + TULU), max_length=9, cache=cache)
    other = load_tokenizer("bytes")
    other.add_tokens("extra")
    prepare(source, ChatTemplate(other), max_length=9, cache=cache)
    os.utime(source.path, ns=(1, 1))
    prepare(source, chat, max_length=9, cache=cache)
    assert (chat.seen, len(list(cache.iterdir()))) == (5 + 5 + 5 + 4 + 5, 7)


def test_a_dataset_is_keyed_by_its_content(tmp_path):
    lengths = []
    for name, count in (("a", 3), ("b", 4)):
        datasets.Dataset.from_list(plain_rows(count)).save_to_disk(tmp_path / name)
        (tmp_path / name).rename(tmp_path / "set")
        lengths += [len(prepare(Source(str(tmp_path / "set")), counting(), max_length=9, cache=tmp_path / "cache")) for _ in range(2)]
        (tmp_path / "set").rename(tmp_path / name)
    assert lengths == [3, 3, 4, 4]


def test_too_long_is_an_error_by_default(tmp_path):
    rows = [
        {"tokens": [1, 2, 3, 4]},
        {"tokens": [1, 2, 3, 4, 5], "mask": [0, 0, 0, 1]},
        {"tokens": [1, 2, 3, 4, 5], "mask": [0, 0, 1, 1]},
    ]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    message = (
        "rows.jsonl:2 has 4 tokens, 4 of them in the prompt, more than max_length=3, with too_long=error; "
        "set too_long=truncate or drop, or raise max_length"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(source, counting(), max_length=3, cache=tmp_path / "cache")
    cut = prepare(source, counting(), max_length=3, too_long="truncate", cache=tmp_path / "cache")
    assert cut.counts == Counts(rows=3, kept=2, truncated=1, dropped=1, tokens=6, trained=4)
    assert (cut[1].tokens.tolist(), cut[1].mask.tolist()) == ([1, 2, 3, 4], [0, 0, 1])
    dropped = prepare(source, counting(), max_length=3, too_long="drop", cache=tmp_path / "cache")
    assert dropped.counts == Counts(rows=3, kept=1, dropped=2, tokens=3, trained=3)
    with pytest.raises(ValueError, match="all 3 rows are too long and were dropped"):
        prepare(source, counting(), max_length=2, too_long="drop", cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        prepare(source, counting(), max_length=0, cache=tmp_path)
    with pytest.raises(ValueError, match="too_long='cut' must be one of error, truncate, drop"):
        prepare(source, counting(), max_length=3, too_long="cut", cache=tmp_path)  # pyright: ignore[reportArgumentType]


def test_a_bad_row_names_its_line(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [*plain_rows(2), {"messages": ask("q", "a")[:1]}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: messages needs an assistant turn"):
        prepare(source, counting(), max_length=9, cache=tmp_path / "cache")


def test_a_long_line_is_shortened_in_the_error(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"messages": ask("q", "é<|end|>" * 100_000)}])
    corpus = prepare(source, counting(), max_length=64, too_long="truncate", cache=tmp_path)
    assert corpus.counts == Counts(rows=1, kept=1, truncated=1, tokens=64, trained=64 - 5)
    assert corpus[0].tokens.tolist().count(259) == 0


def test_an_interrupted_preparation_leaves_nothing(tmp_path):
    source, chat, cache = jsonl(tmp_path / "rows.jsonl", plain_rows(5)), counting(), tmp_path / "cache"

    def interrupt():
        assert list(cache.rglob("tokens.bin")), "the files are being written"
        raise KeyboardInterrupt

    chat.at, chat.action = 3, interrupt
    with pytest.raises(KeyboardInterrupt):
        prepare(source, chat, max_length=9, cache=cache)
    assert list(cache.iterdir()) == []
    assert len(prepare(source, chat, max_length=9, cache=cache)) == 5


def test_a_corpus_can_be_prepared_twice_at_the_same_time(tmp_path):
    source, chat, cache = jsonl(tmp_path / "rows.jsonl", plain_rows(5)), counting(), tmp_path / "cache"
    chat.at, chat.action = 3, lambda: prepare(source, counting(), max_length=9, cache=cache)
    assert len(prepare(source, chat, max_length=9, cache=cache)) == 5
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_cache_is_detected(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", plain_rows(5))
    prepare(source, counting(), max_length=9, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("trained.bin")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"trained\.bin is damaged: 19 bytes for 20 values; delete .* to prepare it again"):
        prepare(source, counting(), max_length=9, cache=tmp_path / "cache")


# ---------------------------------------------------------------- mixture


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[Corpus]:
    """Corpora of 10, 7 and 40 rows. Row i of corpus c has the tokens [c, i]."""
    folder = tmp_path_factory.mktemp("corpora")
    chat = counting()
    sources = [jsonl(folder / f"{c}.jsonl", [{"tokens": [c, i]} for i in range(count)]) for c, count in enumerate((10, 7, 40))]
    return [prepare(source, chat, max_length=9, cache=folder) for source in sources]


def drawn(mixture: Mixture, start: int, end: int) -> list[tuple[int, ...]]:
    return [tuple(mixture.batch(index, 1)[0].tokens.tolist()) for index in range(start, end)]


def test_an_epoch_has_every_row_once_in_a_new_order(corpora):
    mixture = Mixture(corpora, [1, 1, 1], seed=3)
    epochs = [drawn(mixture, epoch * 57, (epoch + 1) * 57) for epoch in range(3)]
    everything = {(c, i) for c, corpus in enumerate(corpora) for i in range(len(corpus))}
    assert len(mixture) == 57
    for epoch in epochs:
        assert len(epoch) == len(set(epoch))
        assert set(epoch) == everything
    assert epochs[0] != epochs[1] != epochs[2] != sorted(everything)
    assert {c for c, _ in epochs[0][:20]} == {0, 1, 2}, "mixed, not one corpus after the other"
    assert [c for c, _ in epochs[0]] != [c for c, _ in epochs[1]], "nor interleaved in the same pattern"


def test_weights_set_the_proportions(corpora):
    mixture = Mixture(corpora, [2.5, 1, 0.25], seed=0)
    assert len(mixture) == 25 + 7 + 10
    for epoch in range(4):
        samples = drawn(mixture, epoch * 42, (epoch + 1) * 42)
        assert Counter(c for c, _ in samples) == {0: 25, 1: 7, 2: 10}
        assert set(Counter(sample for sample in samples if sample[0] == 0).values()) <= {2, 3}
    four = [sample for sample in drawn(mixture, 0, 4 * 42) if sample[0] == 2]
    assert sorted(four) == [(2, i) for i in range(40)], "four quarters cover each row once"


def test_over_epochs_every_row_is_seen_equally(corpora):
    mixture = Mixture([corpora[0]], [0.3], seed=5)
    assert set(Counter(drawn(mixture, 0, 30)).values()) == {3}
    assert drawn(mixture, 0, 10) != drawn(mixture, 10, 20), "each pass has its own order"


def test_the_order_is_a_function_of_seed_and_index(corpora):
    weights = [1.5, 1, 0.2]
    order = drawn(Mixture(corpora, weights, seed=1), 0, 120)
    resumed = Mixture(corpora, weights, seed=1)
    assert [tuple(s.tokens.tolist()) for s in resumed.batch(7, 16)] == order[112:] + drawn(resumed, 120, 128)
    assert [tuple(s.tokens.tolist()) for step in range(15) for s in resumed.batch(step, 8)] == order
    assert drawn(Mixture(corpora, weights, seed=2), 0, 120) != order
    assert [i for _, i in drawn(Mixture(corpora[:1], [1], seed=0), 0, 10)] == [1, 2, 6, 9, 7, 5, 3, 8, 0, 4], (
        "a change of order breaks every resume"
    )


def test_bad_mixtures_are_errors(corpora):
    for weights, seed, complaint in (
        ([1, 1], 0, "got 3 corpora and 2 weights"),
        ([1, 0.01, 1], 0, "weight=0.01 of a corpus of 7 rows yields no samples"),
        ([1, 1, 1], -1, "seed=-1 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Mixture(corpora, weights, seed)
    with pytest.raises(ValueError, match="step=-1"):
        Mixture(corpora, [1, 1, 1], 0).batch(-1, 4)


# ---------------------------------------------------------------- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_all_of_gsm8k_is_encoded(tmp_path):
    rows = [row for _, row in read_rows(Source(str(SHARED / "gsm8k_test.jsonl")))]
    pairs = jsonl(tmp_path / "gsm8k.jsonl", [{"prompt": row["question"], "response": row["answer"]} for row in rows])
    corpus = prepare(pairs, ChatTemplate(load_tokenizer("bytes")), max_length=4096, cache=tmp_path)
    assert corpus.counts.rows == corpus.counts.kept == len(rows) == 1000
    for sample, row in zip(whole(corpus), rows, strict=True):
        assert bytes(sample.tokens[1:-1][sample.mask[:-1] == 1].tolist()).decode() == row["answer"]
        assert sample.tokens[-1] == 259
        assert sample.mask[-1] == 1
